"""What a pattern changes: attention's output in a layer, and the velocity of the whole model, against dense.

The L1 distance between a row of dense attention and the same row under a mask needs no measurement of its own: the
mask drops 1 - m and scales what it keeps, m in all, up to 1, so that both parts are 1 - m and the distance 2 (1 - m).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from radial import BlockLayout, Dense, HeadLayout, VideoGrid, attention_over
from train.attention.recipe import AttentionRecipe
from train.attention.step import StepAttention
from train.decay.capture import Attended
from train.decay.settings import Candidate
from train.models.base import ModelAdapter
from train.models.conditions import Conditions


def attention_of(candidate: Candidate, grid: VideoGrid, dense_layers: int = 0) -> StepAttention:
    """The attention of a forward under a pattern."""
    return replace(candidate.recipe, dense_layers=dense_layers).step(grid, dense=False)


def dense_attention(grid: VideoGrid) -> StepAttention:
    """The attention of a dense forward."""
    return AttentionRecipe(Dense()).step(grid, dense=False)


def output_errors(attended: Attended, layout: BlockLayout | HeadLayout) -> Tensor:
    """(heads,) the norm of what a pattern changes in each head's output, over the norm of the dense output.

    Of the video's tokens, from the same q, k and v.
    """
    q, k, v = (x[None] for x in (attended.q, attended.k, attended.v))
    text = None
    if layout.grid.text_tokens:
        text = torch.tensor([attended.text_tokens], device=q.device)
    out = attention_over(q, k, v, layout, text_lengths=text)[0]
    video = layout.grid.video_tokens
    dense = attended.out[:video].float()
    return ((out[:video].float() - dense).norm(dim=(0, 2)) / dense.norm(dim=(0, 2))).cpu()


def velocity_error(
    adapter: ModelAdapter, x: Tensor, sigma: Tensor, conditions: Conditions, dense: Tensor, attention: StepAttention
) -> float:
    """The norm of what an attention changes in the model's velocity, over the norm of the dense velocity."""
    adapter.set_attention(attention)
    given = adapter.given_frames(conditions)
    velocity, dense = (y[:, :, given:] for y in (adapter.velocity(x, sigma, conditions), dense))
    return float((velocity - dense).norm() / dense.norm())
