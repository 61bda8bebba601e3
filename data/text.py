"""The text encoder of the default run: tiny, deterministic, nothing to download."""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import Tensor

from data.errors import DataError
from data.shards.sample import Prompt, TextTokens

WORD = re.compile(r"[a-z0-9']+")


class TinyTextEncoder:
    """Each word becomes a fixed random vector plus its position's sinusoids.

    Words are what lower-casing and dropping punctuation leave. Words past `length` are cut off. The same text gives the
    same bits on every machine.

    Args:
        length: tokens L of every text, zero-padded.
        dim: channels D of a token, even.

    Raises:
        DataError: when length is below 1, or dim is odd or below 2.
    """

    def __init__(self, length: int = 32, dim: int = 64) -> None:
        if length < 1 or dim < 2 or dim % 2:
            raise DataError(f"TinyTextEncoder: length {length}, dim {dim}; expected length >= 1 and an even dim >= 2")
        self.length = length
        self.dim = dim
        self.positions = _sinusoids(length, dim)
        self._words: dict[str, Tensor] = {}

    @property
    def fingerprint(self) -> str:
        """Identifies the encoder: equal fingerprints, equal embeddings."""
        return f"tiny-text-v1-{self.length}x{self.dim}"

    def __call__(self, text: str) -> TextTokens:
        """Encode a caption: tokens (L, D) float32, mask (L,) bool. The empty text is all zeros and all padding."""
        words = WORD.findall(text.lower())[: self.length]
        tokens = torch.zeros(self.length, self.dim)
        mask = torch.zeros(self.length, dtype=torch.bool)
        for i, word in enumerate(words):
            tokens[i] = self.word(word) + self.positions[i]
            mask[i] = True
        return TextTokens(tokens, mask)

    def prompt(self, text: str) -> Prompt:
        """Encode a caption as a `Prompt` with the one text named `text` and nothing pooled."""
        return Prompt(text={"text": self(text)}, pooled={})

    def word(self, word: str) -> Tensor:
        """The word's vector (D,), of mean 0 and variance 1."""
        if word not in self._words:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
            # Uniform, not normal: torch's normal samples differ in the last bits between processors.
            uniform = torch.rand(self.dim, generator=torch.Generator().manual_seed(seed))
            self._words[word] = (uniform * 2 - 1) * math.sqrt(3.0)
        return self._words[word]


def _sinusoids(length: int, dim: int) -> Tensor:
    """Positions (L, D): sines then cosines, wavelengths from 2π to 10000·2π."""
    half = dim // 2
    angles = [[position / 10000 ** (i / half) for i in range(half)] for position in range(length)]
    return torch.tensor([[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles])
