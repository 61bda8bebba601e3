"""Animated GIFs, whose colours are as near as 256 of them allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def save_gif(images: Sequence[Image.Image], path: str | Path, milliseconds: int) -> None:
    """RGB pictures of one size as an animation that loops, each for so many milliseconds, with a palette of its own.

    Pillow's own choice of a palette, median cut, puts small fields of colour with their neighbours, tens of levels off.
    """
    method, none = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    first, *rest = (image.quantize(256, method=method, kmeans=3, dither=none) for image in images)
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0)
