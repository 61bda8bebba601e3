"""The memory of encoding ``validation.prompts``, once and before a run's first step (`train.callbacks.clips`).

Rank 0 loads VAE and text encoders onto its GPU beside the weights, and frees them before anything is kept for a
backward: the peak of a run is this or that of a step, not their sum. The encoders' files are mapped, so that they take
no CPU memory of their own where their numbers are stored as they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from data.encoders import encoder_class
from train.config.schema import RunConfig
from train.models.families import family_of
from train.models.loading import encoder_of

_BYTES = {torch.bfloat16: 2, torch.float32: 4}


def encoder_dtypes(config: RunConfig, precision: str, *, cpu: bool) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the VAE and of the text encoders of a run's model.

    Args:
        precision: of the model, ``bf16`` or ``fp32``.
        cpu: whether they run on a CPU.
    """
    model = torch.bfloat16 if precision == "bf16" else torch.float32
    return family_of(config.model).vae_dtype(model), torch.float32 if cpu else torch.bfloat16


@dataclass(frozen=True)
class EncoderMemory:
    """Bytes of the weights that encode a run's prompts; all 0 where it has none to encode.

    Attributes:
        text: of the text encoders, and of the image encoder where prompts have an image.
        vae: of the VAE.
    """

    text: float = 0.0
    vae: float = 0.0

    @property
    def all(self) -> float:
        """Bytes of all that is loaded together."""
        return self.text + self.vae

    @classmethod
    def of(cls, config: RunConfig, precision: str, *, cpu: bool) -> EncoderMemory:
        """That of a run's validation; the arguments are those of `encoder_dtypes`.

        Raises:
            UserError: it makes clips of prompts, and its model has no encoder.
            DataError: a part of the model's folder has no weights.
        """
        given = config.validation
        if not given.samples_every:
            return cls()
        family, folder = encoder_of(config.model)
        images = bool(given.images) and not family_of(config.model).takes_first_frame
        numbers = _numbers(family, None if config.model.path is None else folder, images)
        vae, text = (_BYTES[dtype] for dtype in encoder_dtypes(config, precision, cpu=cpu))
        return cls(text * float(numbers.get("text", 0) + numbers.get("image", 0)), vae * float(numbers.get("vae", 0)))


@lru_cache(maxsize=8)
def _numbers(family: str, folder: Path | None, images: bool) -> dict[str, int]:
    return encoder_class(family).count(folder, image=images)
