"""What a model family must tell the trainer: one adapter a family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data.sample import TextTokens
from radial import VideoGrid
from train.errors import UserError
from train.plan import AttentionPlan


class ModelAdapter(ABC):
    """A frozen diffusers transformer with our attention on each self-attention.

    A new family is one file here with a subclass, a line in `train.models.ADAPTERS`, and a YAML in conf/model.
    """

    family: ClassVar[str]
    lora_targets: ClassVar[str]
    """Regex of the modules that carry the LoRA: Q, K, V and O of self-attention."""

    def __init__(self, transformer: Any, text_tokens: int) -> None:
        self.transformer = transformer  # a diffusers model; the library has no types
        self.text_tokens = text_tokens
        self.install_processors()

    @classmethod
    @abstractmethod
    def load(
        cls, path: str | Path, subfolder: str | None = None, *, text_tokens: int, dtype: torch.dtype
    ) -> ModelAdapter:
        """Loads the transformer from a diffusers folder or a hub id; what the family keeps in fp32 stays so."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], *, text_tokens: int) -> ModelAdapter:
        """A transformer with random weights (training a base, tests)."""

    @abstractmethod
    def install_processors(self) -> None:
        """Puts our processor on each self-attention."""

    @abstractmethod
    def feed_forwards(self) -> list[nn.Module]:
        """The feed-forward layers of the video tokens, (batch, tokens, dim) in and out."""

    @abstractmethod
    def grid(self, latent: Tensor) -> VideoGrid:
        """The token grid of a latent batch, (batch, C, F, H, W)."""

    @abstractmethod
    def set_plan(self, plan: AttentionPlan) -> None:
        """Gives each self-attention its layout, and everything that follows the sequence its shard.

        It holds for the micro-batches that follow, until their backward has run.
        """

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, text: Mapping[str, TextTokens]) -> Tensor:
        """The model's prediction of eps - x0.

        Args:
            x: (batch, C, F, H, W) noised latent.
            sigma: (batch,) noise levels in (0, 1).
            text: the text tensors of the samples.

        Returns:
            (batch, C, F, H, W) float32, whole on every rank of a sequence-parallel group.
        """

    @abstractmethod
    def linear_flops(self, grid: VideoGrid) -> float:
        """Floating-point operations of one sample's forward outside self-attention, without a LoRA."""

    @property
    @abstractmethod
    def patch(self) -> tuple[int, int, int]:
        """Patch size in latent cells, (t, h, w)."""

    @property
    @abstractmethod
    def attention_shape(self) -> tuple[int, int, int]:
        """(layers, heads, head_dim) of self-attention: what FLOPs are counted from."""


def named_text(text: Mapping[str, TextTokens], name: str) -> TextTokens:
    """The text tensor of that name.

    Raises:
        UserError: the shards hold other names, that is, they were made for another model.
    """
    if name not in text:
        raise UserError(f"the shards hold text {sorted(text)}, expected {name!r}: were they made for this model?")
    return text[name]
