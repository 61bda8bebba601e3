"""The attention of a run, stated once: that of each step in training, sampling, planning and benchmarks follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from radial import Dense, Fitted, Pattern, Random, VideoGrid, build_layout
from radial.serving import is_dense_step
from train.attention.sequence import SequenceGroup, SequenceShard
from train.attention.step import StepAttention
from train.config.schema import RunConfig
from train.errors import UserError


@dataclass(frozen=True)
class AttentionRecipe:
    """Which attention a model runs, in which layers and at which noise levels.

    Attributes:
        pattern: which block pairs attention keeps.
        block: tokens of a block.
        dense_layers: the first layers, which stay dense.
        dense_sigma: the noise level from which on all layers are dense; None: nowhere.
        dense_steps: in sampling, the first steps, in which all layers are dense, instead of ``dense_sigma``.
        backend: an attention backend by name; None: the fastest.
    """

    pattern: Pattern
    block: int = 128
    dense_layers: int = 0
    dense_sigma: float | None = None
    dense_steps: int | None = None
    backend: str | None = None

    @classmethod
    def of(cls, config: RunConfig, dense_sigma: float | None = None) -> AttentionRecipe:
        """The recipe of a run, for clips of which all layers are dense from a noise level on (`train.step`).

        Raises:
            RadialError: an unknown pattern, or a value that it refuses.
        """
        attention = config.attention
        return cls(
            pattern=config.pattern(),
            block=attention.block,
            dense_layers=attention.dense_layers,
            dense_sigma=dense_sigma,
            backend=attention.backend,
        )

    def check_model(self, layers: int, heads: int) -> None:
        """Raises where more layers are dense than the model has, or the pattern's masks are those of another model.

        Raises:
            UserError: too many dense layers.
            RadialError: it has other layers or heads.
        """
        if self.dense_layers > layers:
            raise UserError(f"attention.dense_layers is {self.dense_layers}, the model has {layers} layers")
        if isinstance(self.pattern, Fitted):
            self.pattern.masks.check_model(layers, heads, self.dense_layers)

    def under(self, pattern: Pattern) -> AttentionRecipe:
        """The same layers and noise levels under another pattern."""
        return replace(self, pattern=pattern)

    def dense(self) -> AttentionRecipe:
        """Dense attention in every layer, by the fastest backend."""
        return replace(self, pattern=Dense(), dense_layers=0, backend=None)

    def is_dense(self, sigma: float, step: int | None = None) -> bool:
        """Whether all layers are dense at a noise level, or in the sampling step of that number (from 0)."""
        return is_dense_step(self.dense_sigma, self.dense_steps, sigma=sigma, step=step)

    def is_dense_layer(self, layer: int) -> bool:
        """Whether a layer is dense in every step."""
        return isinstance(self.pattern, Dense) or layer < self.dense_layers

    def facts(self) -> dict[str, Any]:
        """What the header of a LoRA that is trained with it holds of it, by the names of `train.lora.header`."""
        pattern = self.pattern
        found: dict[str, Any] = {"pattern": pattern.name}
        if pattern.parameter is not None:  # as it was found, where attention.share was asked for
            found[pattern.parameter] = getattr(pattern, pattern.parameter)
        if isinstance(pattern, Random) and pattern.per_head:
            found["per_head"] = True
        if isinstance(pattern, Fitted):
            about = pattern.masks.about
            found |= {"masks_sha256": pattern.masks.digest, "masks_share": about.share}
            found |= {"masks_coverage": about.coverage, "masks_seed": about.seed}
            if about.separable:
                found["masks_separable"] = True
        return found | {"block": self.block, "dense_layers": self.dense_layers, "dense_sigma": self.dense_sigma}

    def step(self, grid: VideoGrid, *, dense: bool, sequence: SequenceGroup | None = None) -> StepAttention:
        """The attention of one step.

        Args:
            grid: tokens of the clips.
            dense: whether all layers are dense.
            sequence: the ranks that share each clip's tokens.
        """
        layout = build_layout(self.pattern, grid, self.block)
        order = None if dense else layout.order
        return StepAttention(
            pattern_layout=layout,
            dense_layout=build_layout(Dense(), grid),
            dense_layers=self.dense_layers,
            all_dense=dense,
            backend=self.backend,
            shard=None if sequence is None else SequenceShard(grid.video_tokens, sequence, order),
        )

    def density(self, grid: VideoGrid) -> float:
        """Share of token pairs that a layer under the pattern computes."""
        return 1.0 if isinstance(self.pattern, Dense) else build_layout(self.pattern, grid, self.block).density
