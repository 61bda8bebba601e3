"""Attention whose scores are scaled by their distance, in plain torch: the reference of `UltraViCo`.

Its cost: the operations of dense attention, and memory for the scores of one block of queries with all keys, several
times over (128 x 75,600 scores of 40 heads in float32 are 1.5 GB). Gradients go through torch's own operations, which
keep all of these scores: it is meant for sampling, not for training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from radial.grid import VideoGrid
from radial.patterns.ultravico import UltraViCo


def scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: VideoGrid,
    pattern: UltraViCo,
    *,
    block: int,
    text_lengths: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention under `UltraViCo`, a block of queries at a time.

    Args:
        q, k, v: (batch, tokens, heads, head_dim); video tokens, then text tokens, whose scores stay as they are.
        block: queries at a time.
        text_lengths: (batch,) valid text tokens of each sample, at most the grid's; keys after them are left out.
        scale: of the scores; None: head_dim ** -0.5.

    Returns:
        (batch, tokens, heads, head_dim), dtype of q. Scores and softmax are at least float32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    work = torch.promote_types(q.dtype, torch.float32)
    key = torch.arange(grid.tokens, device=q.device)
    padding = None if text_lengths is None else key >= grid.video_tokens + text_lengths[:, None]
    keys_BHDN, values_BHND = k.permute(0, 2, 3, 1), v.transpose(1, 2)
    rows = []
    for start in range(0, grid.tokens, block):
        query = key[start : start + block, None]
        scores = (q[:, start : start + block].transpose(1, 2) @ keys_BHDN).to(work) * scale
        scores = _scaled(scores, query, key, grid, pattern)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None, None], float("-inf"))
        rows.append(scores.softmax(-1).to(v.dtype) @ values_BHND)
    return torch.cat(rows, dim=2).transpose(1, 2).to(q.dtype)


def _scaled(scores: Tensor, query: Tensor, key: Tensor, grid: VideoGrid, pattern: UltraViCo) -> Tensor:
    """The scores, (..., queries, keys), of queries (queries, 1) and keys (keys,) by their numbers."""
    s = grid.tokens_per_frame
    video = (query < grid.video_tokens) & (key < grid.video_tokens)
    beyond = video & ((query - key).abs() > s * pattern.reach / 2)
    unseen = video & (query <= s) & (key > s * pattern.reach)
    scores = torch.where(beyond & (scores > 0), scores * pattern.factor, scores)
    return scores.masked_fill(unseen, float("-inf"))
