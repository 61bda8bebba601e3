"""Fréchet distance in the base's own features: how far generated clips are from true ones as a set.

A feature is the mean over the tokens of a window of native length behind the middle layer of the base, with dense
attention, the empty prompt and a little noise, as the model knows it. The features are seen along the principal
components of the true clips' own, as many as 16 windows each can carry. Between normal distributions of the two sets
(arXiv 1706.08500, eq. 6)::

    d² = |m - m'|² + tr(C + C' - 2 (C C')^(1/2))
"""

from __future__ import annotations

import torch
from torch import Tensor

from data.shards.sample import TextTokens
from train.flow import noise_like, noised
from train.models.conditions import Conditions
from train.step.module import LengthExtensionModule
from train.study.losses import device

_SIGMA = 0.1


@torch.no_grad()
def features(base: LengthExtensionModule, clips: Tensor, native: int) -> Tensor:
    """One row for each whole window of each clip: (windows, channels) float64 on the CPU.

    Args:
        base: the model untuned, with dense attention.
        clips: (batch, C, F, H, W).
    """
    layers = base.adapter.layers()
    seen: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        seen.append(hidden.double().mean(1).cpu())

    hook = layers[len(layers) // 2].register_forward_hook(keep)
    text = {
        name: TextTokens(one.tokens[None].to(device()), one.mask[None].to(device()))
        for name, one in base.objective.empty_prompt.text.items()
    }
    try:
        for start in range(0, clips.shape[2] - native + 1, native):
            for number, window in enumerate(clips[:, :, start : start + native]):
                latent = window[None].to(device())
                level = torch.tensor([_SIGMA], device=device())
                x, _ = noised(latent, noise_like(latent, "features", start, number), level)
                base.adapter.set_attention(base.attention_at(latent, _SIGMA))
                base.adapter.velocity(x, level, Conditions(text))
    finally:
        hook.remove()
    return torch.cat(seen)


def frechet_distance(made: Tensor, true: Tensor) -> float:
    """The distance d² of two sets of features, (windows, channels) each, in the principal components of ``true``."""
    count = min(max(1, min(len(true), len(made)) // 16), true.shape[1])
    centre = true.mean(0)
    axes = torch.linalg.svd(true - centre, full_matrices=False).Vh[:count].T
    a, b = (made - centre) @ axes, (true - centre) @ axes
    first, second = (each.T.cov().reshape(count, count) for each in (a, b))
    # the eigenvalues of C C' are those of the symmetric C^(1/2) C' C^(1/2)
    values, vectors = torch.linalg.eigh(first)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross
    return max(0.0, float(distance))
