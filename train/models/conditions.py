"""What a model sees beside the noised latent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data.shards.batch import Batch
from data.shards.sample import TextTokens
from train.errors import UserError


def check_guidance(weight: float, takes_guidance: bool) -> None:
    """Looks at ``objective.guidance``.

    Raises:
        UserError: a weight that the model would not see.
    """
    if weight != 1 and not takes_guidance:
        raise UserError(
            f"objective.guidance is {weight:g}, but the model takes no weight of guidance as an input, as HunyuanVideo "
            "does: leave it out (clips are guided by model.guidance, and in training by nothing)"
        )


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the model sees beside the noised latent, by the names that shards have (`data.shards.sample`).

    Attributes:
        text: tokens (batch, L, D) and masks (batch, L), True on text.
        pooled: (batch, D) vectors, one a caption.
        image: image conditions, (batch, ...).
        guidance: the guidance weight that a guidance-distilled model takes as an input; 1 in training.
    """

    text: Mapping[str, TextTokens]
    pooled: Mapping[str, Tensor] = field(default_factory=dict)
    image: Mapping[str, Tensor] = field(default_factory=dict)
    guidance: float = 1.0

    @classmethod
    def of(cls, batch: Batch, guidance: float = 1.0) -> Conditions:
        """The conditions of a batch."""
        return cls(batch.text, batch.pooled, batch.image, guidance)

    def first_frames(self, frames: int) -> Conditions:
        """The same for a clip cut to its first latent frames: image conditions as long as the clip are cut too."""
        image = {name: x[:, :, :frames] if x.dim() == 5 else x for name, x in self.image.items()}
        return replace(self, image=image)

    def named(self, kind: str, name: str) -> Any:
        """``kind`` (text, pooled, image) of that name.

        Raises:
            UserError: the shards hold other names, that is, they were made for another model.
        """
        found = getattr(self, kind)
        if name not in found:
            remedy = "were they made for this model?"
            if kind == "image" and not found:
                remedy = "make them with python -m data.prepare --image-to-video"
            raise UserError(f"the shards hold {kind} {sorted(found)}, expected {name!r}: {remedy}")
        return found[name]

    def packed_text(self, name: str, length: int) -> tuple[Tensor, Tensor]:
        """Text tokens with the valid ones first, zero-padded to ``length``, and how many are valid.

        Returns:
            (batch, length, D) and (batch,) int64.

        Raises:
            UserError: the shards lack that text, or it is longer.
        """
        text: TextTokens = self.named("text", name)
        missing = length - text.tokens.shape[1]
        if missing < 0:
            raise UserError(f"the shards' text has {text.tokens.shape[1]} tokens, model.text_tokens is {length}")
        order = text.mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        tokens = text.tokens.gather(1, order[..., None].expand_as(text.tokens))
        return F.pad(tokens, (0, 0, 0, missing)), text.mask.sum(1)
