"""Pixels as latents and the tiny text encoder: shards for the models that train without a VAE (`model=shapes`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.encoders.base import Encoder, EncoderSettings, stored, to_video
from data.encoders.decoding import to_frames
from data.encoders.model_facts import facts_of
from data.errors import DataError
from data.shards.sample import Prompt
from data.text import TinyTextEncoder

LATENTS = "pixels-v1"
"""How the latents came about: what their fingerprint begins with."""


class PixelEncoder(Encoder):
    """Latents are the pixels themselves, (3, F, H, W) in [-1, 1]."""

    family = "pixels"
    facts = facts_of("shapes")
    parts = {}  # noqa: RUF012
    numbers = {}  # noqa: RUF012
    latent_is = "RGB pixels in [-1, 1]"
    text_is = "text: one random vector a word plus its position (data.text)"

    def __init__(self, settings: EncoderSettings) -> None:
        self._text = TinyTextEncoder()

    @classmethod
    def latent_channels(cls, folder: Path | None) -> int:
        return 3

    @classmethod
    def fingerprint(cls, folder: Path | None, image_to_video: bool = False) -> str:
        if folder is not None:
            raise DataError(f"weights is {folder}, but model=pixels has none; leave it out")
        return f"{LATENTS}+{TinyTextEncoder().fingerprint}"

    @classmethod
    def why_not_cut(cls, frames: int, shorter: int) -> str | None:
        return None

    def encode(self, frames: np.ndarray) -> Tensor:
        return stored(to_video(frames, torch.device("cpu"), torch.float32)[0])

    def decode(self, latent: Tensor) -> np.ndarray:
        return to_frames(latent[None])

    def prompt(self, text: str) -> Prompt:
        return self._text.prompt(text)
