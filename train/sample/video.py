"""Writing videos."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


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
