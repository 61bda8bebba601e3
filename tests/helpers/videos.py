"""Real video files for the tests, written with PyAV, whose frames tell their own number."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BITS = 8


def numbered(i: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A picture (H, W, 3) that shows i, modulo 256, as eight black and white columns, the highest bit on the left."""
    columns = np.array([255 if i >> bit & 1 else 0 for bit in reversed(range(BITS))], np.uint8)
    row = columns[np.arange(width) * BITS // width]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def number_of(picture: np.ndarray) -> int:
    """The number that a picture (H, W, 3) of `numbered` shows, in any size."""
    height, width = picture.shape[:2]
    centres = [(2 * i + 1) * width // (2 * BITS) for i in range(BITS)]
    return sum(1 << (BITS - 1 - i) for i, x in enumerate(centres) if picture[height // 2, x].mean() > 127)


def write_video(
    path: Path,
    frames: int = 40,
    *,
    fps: int | Fraction = 16,
    height: int = 64,
    width: int = 96,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    picture: Callable[[int], np.ndarray] | None = None,
    times: Sequence[float] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    caption: str | None = None,
    sound: bool = False,
    before: Callable[[Any], None] = lambda stream: None,
) -> Path:
    """Write a video; by default frame i is `numbered(i)`.

    Args:
        times: each frame's time in seconds, for a variable rate; None is one frame after the other.
        options: of the codec.
        container: options of the container.
        caption: written beside it as .txt; None writes none.
        sound: with a stream of sound, a moment's silence.
        before: is given the stream before the first frame is encoded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        fast = {"preset": "ultrafast"} if codec.startswith("libx26") else {"cpu-used": "8", "deadline": "realtime"}
        stream.options = {"crf": "18", **fast, **({"x265-params": "log-level=error"} if codec == "libx265" else {})}
        stream.options = {**stream.options, **(options or {})}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        before(stream)
        silence = _silence(file) if sound else []
        for i in range(frames):
            image = numbered(i, height, width) if picture is None else picture(i)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        file.mux(silence)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def write_sound(path: Path) -> Path:
    """A file with sound and no video."""
    with av.open(str(path), "w") as file:
        file.mux(_silence(file))
    return path


def _silence(file: Any) -> list[Any]:
    """The packets of a new stream of a moment's silence."""
    stream: Any = file.add_stream("aac", rate=44100)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.rate = 44100
    return [*stream.encode(frame), *stream.encode()]


def orient(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Say in an mp4's track header how its pictures are shown, as phones do: (x, y) at (a x + c y, b x + d y)."""
    content = bytearray(path.read_bytes())
    # After the box's name: version and flags, two times, track, reserved, duration, reserved x 2, layer, group, volume.
    start = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    a, b, c, d = (value << 16 for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def frames_of(file: Path) -> np.ndarray:
    """[F, H, W, 3] as uint8."""
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
