"""Writing videos, and measuring how far apart two are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


class VideoWriter:
    """An H.264 file that grows by frames."""

    def __init__(self, container: Any, fps: float) -> None:
        self.container, self.rate = container, Fraction(fps).limit_denominator(1001)
        self.stream: Any = None

    def add(self, frames: np.ndarray) -> None:
        """Appends (n, H, W, 3) uint8."""
        import av

        if self.stream is None:
            self.stream = self.container.add_stream("libx264", rate=self.rate, options={"crf": "16"})
            self.stream.height, self.stream.width = (side - side % 2 for side in frames.shape[1:3])
            self.stream.pix_fmt = "yuv420p"
        for frame in frames[:, : self.stream.height, : self.stream.width]:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self.container.mux(self.stream.encode(picture))

    def finish(self) -> None:
        """Writes what the encoder still holds."""
        if self.stream is not None:
            self.container.mux(self.stream.encode())


@contextmanager
def video_file(path: Path, fps: float) -> Iterator[VideoWriter]:
    """A video that appears under its name when it is whole."""
    import av  # here, since training imports this file and needs no videos

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp-{os.getpid()}.mp4")
    try:
        with av.open(str(temporary), "w") as container:
            writer = VideoWriter(container, fps)
            yield writer
            writer.finish()
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Likeness:
    """How alike two clips are, frame by frame.

    PSNR (dB) is of the mean squared error over the whole clip, pixels from 0 to 1; SSIM (Wang et al. 2004, 11 x 11
    Gaussian window) is the frames' mean.
    """

    squared: float = 0.0
    similar: float = 0.0
    frames: int = 0

    def add(self, one: np.ndarray, other: np.ndarray) -> None:
        """Takes frames of both, (n, H, W, 3) uint8."""
        a, b = _pixels(one), _pixels(other)
        for x, y in zip(a.split(1), b.split(1), strict=True):
            self.squared += (x - y).square().mean().item()
            self.similar += structural_similarity_index_measure(x, y, data_range=1.0).item()  # type: ignore[union-attr]
            self.frames += 1

    @property
    def psnr(self) -> float:
        """Infinite for equal clips."""
        mean = self.squared / self.frames
        return float("inf") if mean == 0 else -10 * float(np.log10(mean))

    @property
    def ssim(self) -> float:
        return self.similar / self.frames


def _pixels(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255


def beside(clips: Iterable[np.ndarray]) -> np.ndarray:
    """Frames of several clips, (n, H, W, 3), side by side with a white line between."""
    first, *rest = clips
    line = np.full((*first.shape[:2], 4, 3), 255, np.uint8)
    return np.concatenate([first, *(part for clip in rest for part in (line, clip))], axis=2)
