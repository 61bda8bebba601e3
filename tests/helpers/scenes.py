"""Rendered scenes of different content for videos with known cuts, and scenes that move and flash without any."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.videos import write_video

Scene = Callable[[int], np.ndarray]
"""Frame k of a scene, (H, W, 3) uint8."""

HEIGHT, WIDTH = 96, 160


@functools.lru_cache
def world(seed: int, height: int = 4 * HEIGHT, width: int = 8 * WIDTH) -> np.ndarray:
    """A large picture (H, W, 3) of coloured shapes at several sizes over a coloured ground, another for each seed."""
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for cells, share in ((4, 0.5), (16, 0.35), (64, 0.15)):
        coarse = random.integers(0, 256, (cells, 2 * cells, 3), np.uint8)
        grown = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture += share * np.asarray(grown, float)
    tint = random.uniform(0.3, 1.3, 3)
    return np.clip(picture * tint + random.uniform(-40, 40), 0, 255).astype(np.uint8)


def pan(seed: int, speed: float) -> Scene:
    """A camera that moves over a `world` at so many pixels a frame, to the right and a little down."""
    whole = world(seed)

    def frame(k: int) -> np.ndarray:
        top, left = int(k * speed / 8) % (len(whole) - HEIGHT), int(k * speed) % (whole.shape[1] - WIDTH)
        return whole[top : top + HEIGHT, left : left + WIDTH]

    return frame


def still(seed: int) -> Scene:
    """A camera that does not move, over a scene where nothing does."""
    return pan(seed, 0)


def lit(scene: Scene, gain: Callable[[int], float]) -> Scene:
    """A scene whose brightness at frame k is multiplied by `gain(k)`."""
    return lambda k: np.clip(scene(k) * gain(k), 0, 255).astype(np.uint8)


def barred(scene: Scene, rows: int) -> Scene:
    """A scene between black bars of so many rows above and below."""

    def frame(k: int) -> np.ndarray:
        picture = scene(k).copy()
        picture[:rows] = picture[-rows:] = 0
        return picture

    return frame


def held(scene: Scene, times: int) -> Scene:
    """A scene of which each frame is shown several times, as in a slow source."""
    return lambda k: scene(k // times)


def cut_together(path: Path, parts: Sequence[tuple[Scene, int]], fps: int = 16, caption: str | None = None) -> Path:
    """Write the scenes one after the other, each of so many frames, as H.264; frame k of a scene is its own k."""
    frames = [scene(k) for scene, count in parts for k in range(count)]
    return write_video(
        path, len(frames), fps=fps, height=HEIGHT, width=WIDTH, picture=frames.__getitem__, caption=caption
    )
