"""Two transformers of one family, an expert for high and one for low noise levels (Wan2.2-A14B), as one model.

In training all ranks run one of them in a step, and the other is left alone; a LoRA covers both, each with weights of
its own. Whoever trains them in a run each needs none of this: one expert is a model of its family, for a range of noise
levels (`ModelAdapter.sigma_range`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from radial import VideoGrid
from train.attention.step import StepAttention
from train.models.base import ModelAdapter
from train.models.conditions import Conditions


class Experts(nn.Module, PeftAdapterMixin):
    """The transformers under the names of their folders: their weights are ``transformer.…`` and ``transformer_2.…``.

    Args:
        transformer: for the noise levels from the boundary up.
        transformer_2: for those below.
    """

    def __init__(self, transformer: Any, transformer_2: Any) -> None:
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2


class TwoExperts(ModelAdapter):
    """Adapter of both; each noise level is the business of one.

    Args:
        high, low: the experts, of one family.
        boundary: the noise level from which on ``high`` runs.
    """

    def __init__(self, high: ModelAdapter, low: ModelAdapter, boundary: float) -> None:
        self.experts = [high, low]
        super().__init__(Experts(high.transformer, low.transformer), high.text_tokens)
        self.boundary = boundary

    def install_processors(self) -> None:
        pass  # each expert has its own

    @property
    def transformers(self) -> list[Any]:
        return [expert.transformer for expert in self.experts]

    def targets(self, *, text: bool) -> str:
        return rf"transformer(_2)?\.({self.experts[0].targets(text=text)})"

    def layers(self) -> list[nn.Module]:
        return [layer for expert in self.experts for layer in expert.layers()]

    def self_attention(self, layer: nn.Module) -> Any:
        return self.experts[0].self_attention(layer)

    def feed_forwards(self) -> list[nn.Module]:
        return [layer for expert in self.experts for layer in expert.feed_forwards()]

    def grid(self, latent: Tensor) -> VideoGrid:
        return self.experts[0].grid(latent)

    def set_attention(self, attention: StepAttention) -> None:
        for expert in self.experts:
            expert.rope = self.rope
            expert.set_attention(attention)

    def unset_attention(self) -> None:
        for expert in self.experts:
            expert.unset_attention()

    def hook_tokens(self) -> Sequence[RemovableHandle]:
        raise AssertionError("each expert has hooks of its own")

    def velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        assert self.boundary is not None
        high = sigma >= self.boundary
        assert high.all() or not high.any(), f"noise levels {sigma.tolist()} lie on both sides of {self.boundary}"
        return self.experts[0 if high.all() else 1].velocity(x, sigma, conditions)

    def given_frames(self, conditions: Conditions) -> int:
        return self.experts[0].given_frames(conditions)

    def noise_levels(self, steps: int, shift: float) -> list[float]:  # type: ignore[override]  # the same
        return self.experts[0].noise_levels(steps, shift)

    def random_conditions(self, latent: Tensor) -> Conditions:
        return self.experts[0].random_conditions(latent)

    def linear_flops(self, grid: VideoGrid) -> float:
        return self.experts[0].linear_flops(grid)

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.experts[0].patch

    @property
    def latent_channels(self) -> int:
        return self.experts[0].latent_channels

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        return self.experts[0].attention_shape
