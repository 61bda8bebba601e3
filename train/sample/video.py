"""Writing videos."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data.colour import BT601, BT709, matrix_of
from data.io.files import beside

_LIMITED = 1  # AVCOL_RANGE_MPEG
_MATRICES = {BT709: "bt709", BT601: "smpte170m"}  # as libavfilter calls them
_SCALE = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp:in_range=full:out_range=limited"


class VideoWriter:
    """An H.264 file that grows by frames.

    Its YUV matrix is the one that players assume at its size, and is written into the file with the other tags of
    colour: the primaries and the transfer curve are BT.709's, as those of the videos that models were trained on.
    Chroma lies at the left of its luma, as H.264 has it without a tag.
    """

    def __init__(self, container: Any, fps: float) -> None:
        self.container, self.rate = container, Fraction(fps).limit_denominator(1001)
        self.stream: Any = None
        self.graph: Any = None

    def add(self, frames: np.ndarray) -> None:
        """Appends (n, H, W, 3) uint8; an odd side loses its last line."""
        import av

        if self.stream is None:
            self._start(*(side - side % 2 for side in frames.shape[1:3]))
        for frame in frames[:, : self.stream.height, : self.stream.width]:
            self.graph.push(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            self.container.mux(self.stream.encode(self.graph.vpull()))

    def finish(self) -> None:
        """Writes what the encoder still holds."""
        if self.stream is not None:
            self.container.mux(self.stream.encode())

    def _start(self, height: int, width: int) -> None:
        from av.filter import Graph

        matrix = matrix_of(height, width)
        self.stream = self.container.add_stream("libx264", rate=self.rate, options={"crf": "16"})
        self.stream.height, self.stream.width, self.stream.pix_fmt = height, width, "yuv420p"
        codec = self.stream.codec_context
        codec.colorspace, codec.color_range = matrix, _LIMITED
        codec.color_primaries = codec.color_trc = BT709
        self.graph = Graph()
        self.graph.link_nodes(
            self.graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / self.rate),
            self.graph.add("scale", f"{_SCALE}:out_color_matrix={_MATRICES[matrix]}:out_chroma_loc=left"),
            self.graph.add("format", "pix_fmts=yuv420p"),
            self.graph.add("buffersink"),
        ).configure()


@contextmanager
def video_file(path: Path, fps: float) -> Iterator[VideoWriter]:
    """A video that appears under its name when it is whole."""
    import av  # here, since training imports this file and needs no videos

    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as fresh, av.open(str(fresh), "w", format="mp4") as container:
        writer = VideoWriter(container, fps)
        yield writer
        writer.finish()
