"""Decoded colours beside an exact conversion in float64, and the rule for videos that do not tell theirs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from data.colour import BT601, BT709, matrix_of
from data.errors import DataError
from data.prepare.scaling import Scaler
from data.prepare.video import read_clips

HEIGHT, WIDTH = 150, 250
SIZES = [(75, 125), (90, 150), (111, 185), (150, 250), (210, 350)]  # both sides odd or even, chroma enlarged or not
FORMATS = ["yuv420p", "yuvj420p", "nv12", "yuv422p", "yuv444p", "yuv420p10le", "p010le", "yuv422p10le", "yuv444p12le"]
# kr and kb of ITU-T H.273, by AVCOL_SPC
MATRICES = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087),
            9: (0.2627, 0.0593)}  # fmt: skip
LIMITED, FULL = 1, 2  # AVCOL_RANGE


def smooth(height: int, width: int, low: float, high: float, seed: int) -> np.ndarray:
    """A picture of a few waves, from low to high, in whole numbers."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = sum(np.cos(2 * np.pi * (a * x / width + b * y / height + c)) for a, b, c in rng.uniform(-5, 5, (6, 3)))
    return np.round(low + (waves - waves.min()) / np.ptp(waves) * (high - low))


def picture(format_: str) -> tuple[VideoFrame, list[np.ndarray], int]:
    """A frame, its three components as they are stored, and their bits."""
    frame = VideoFrame(WIDTH, HEIGHT, format_)
    bits = frame.format.components[0].bits
    top = 1 << bits
    shares = ((0.2, 0.75), (0.36, 0.62), (0.36, 0.62))
    components = [
        smooth(component.height, component.width, low * top, high * top, seed)
        for seed, (component, (low, high)) in enumerate(zip(frame.format.components, shares, strict=True))
    ]
    planes = components if len(frame.planes) == 3 else [components[0], np.stack(components[1:], -1)]
    fill(frame, [plane * (64 if format_ == "p010le" else 1) for plane in planes], bits)
    return frame, components, bits


def fill(frame: VideoFrame, planes: list[np.ndarray], bits: int) -> None:
    """Write a frame's planes, whole numbers of so many bits."""
    for plane, values in zip(frame.planes, planes, strict=True):
        content = values.astype(np.uint8 if bits == 8 else "<u2").reshape(plane.height, -1).view(np.uint8)
        plane.update(np.pad(content, ((0, 0), (0, plane.line_size - content.shape[1]))))


def resampling(before: int, after: int, shrink: bool, shift: float) -> np.ndarray:
    """The weights (after, before) of one direction: means over areas to shrink, linear where that enlarges (chroma),
    cubic (b = 0, c = 0.6) otherwise; `shift` in old samples; what lies outside repeats the border."""
    ratio = before / after
    places = np.arange(-4, before + 4)
    distance = np.abs(places - ((np.arange(after)[:, None] + 0.5) * ratio - 0.5 + shift))
    if shrink:
        weights = np.clip(0.5 + ratio / 2 - distance, 0, 1) if ratio > 1 else np.clip(1 - distance, 0, 1)
    else:
        near = 1.4 * distance**3 - 2.4 * distance**2 + 1
        far = -0.6 * distance**3 + 3 * distance**2 - 4.8 * distance + 2.4
        weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    out = np.zeros((after, before))
    np.add.at(out.T, np.clip(places, 0, before - 1), weights.T)
    return out / out.sum(1, keepdims=True)


def exact(
    components: list[np.ndarray], bits: int, size: tuple[int, int], matrix: int, full: bool, left: bool = False
) -> np.ndarray:
    """RGB (H, W, 3) float64 from 0 to 255; chroma lies in the middle of its luma, or at its left."""
    shrink = size[0] < components[0].shape[0]
    scaled = []
    for component in components:
        halved = component.shape[1] < components[0].shape[1]
        rows = resampling(component.shape[0], size[0], shrink, 0)
        columns = resampling(component.shape[1], size[1], shrink, 0.25 if left and halved else 0)
        scaled.append(rows @ component @ columns.T)
    unit = 1 << bits - 8
    black, luma, chroma = (0, 256 * unit - 1, 256 * unit - 1) if full else (16 * unit, 219 * unit, 224 * unit)
    y, u, v = (scaled[0] - black) / luma, *((c - 128 * unit) / chroma for c in scaled[1:])
    kr, kb = MATRICES[matrix]
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(np.stack([red, green, blue], -1) * 255, 0, 255)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format_", FORMATS)
def test_decoded_colours_are_within_a_level_of_exact_ones(format_: str, size: tuple[int, int]) -> None:
    frame, components, bits = picture(format_)
    for matrix, range_ in itertools.product(MATRICES, [FULL] if format_ == "yuvj420p" else [LIMITED, FULL]):
        frame.colorspace, frame.color_range = matrix, range_
        error = Scaler([size])(frame, None) - exact(components, bits, size, matrix, range_ == FULL)
        assert np.abs(error).max() <= 1, (matrix, range_)
        assert np.abs(error.mean((0, 1))).max() < 0.2, (matrix, range_)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format_", ["gbrp", "gbrp10le", "gbrp12le", "gray", "gray10le", "gray16le"])
def test_rgb_and_grey_are_within_a_level_of_exact_ones(format_: str, size: tuple[int, int]) -> None:
    """They have the full range and no matrix, whatever the stream says."""
    frame = VideoFrame(WIDTH, HEIGHT, format_)
    bits = frame.format.components[0].bits
    red, green, blue = (smooth(HEIGHT, WIDTH, 0.1 * 2**bits, 0.85 * 2**bits, seed) for seed in range(3))
    if len(frame.planes) == 1:
        green = blue = red
    fill(frame, [green, blue, red][: len(frame.planes)], bits)
    shrink = size[0] < HEIGHT
    rows, columns = resampling(HEIGHT, size[0], shrink, 0), resampling(WIDTH, size[1], shrink, 0)
    wanted = np.stack([rows @ c @ columns.T for c in (red, green, blue)], -1) / (2**bits - 1) * 255
    for range_ in (0, LIMITED, FULL):
        frame.color_range = range_
        assert np.abs(Scaler([size])(frame, None) - wanted.clip(0, 255)).max() <= 1


def encoded(path: Path, frame: VideoFrame, **tags: int) -> Path:
    """A video of eight times the same frame, almost without loss."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
        stream.options = {"crf": "1", "preset": "ultrafast"}
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for i in range(8):
            frame.pts = i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def test_chroma_at_the_left_of_its_luma_is_read_as_such(tmp_path: Path) -> None:
    """As in H.264 that does not say otherwise: within a level of the exact colours of what the decoder gives."""
    frame, _, bits = picture("yuv420p")
    path = encoded(tmp_path / "v.mp4", frame)
    with av.open(str(path)) as file:
        stored = next(file.decode(video=0)).to_ndarray().ravel()
    luma, *chroma = np.split(stored, [HEIGHT * WIDTH, HEIGHT * WIDTH * 5 // 4])
    components = [c.astype(float).reshape(shape) for c, shape in
                  zip((luma, *chroma), ((HEIGHT, WIDTH), *2 * [(HEIGHT // 2, WIDTH // 2)]), strict=True)]  # fmt: skip
    for size in SIZES:
        (clip,) = read_clips(path, fps=16, frames=8, sizes=[size])
        assert np.abs(clip.frames[0] - exact(components, bits, size, 5, False, left=True)).max() <= 1


@pytest.mark.parametrize(("size", "matrix"), [
    ((480, 720), BT601), ((576, 720), BT601), ((480, 848), BT601), ((576, 1024), BT601), ((720, 1280), BT709),
    ((544, 1280), BT709), ((1280, 544), BT709), ((640, 640), BT709), ((1080, 1920), BT709), ((832, 480), BT709),
])  # fmt: skip
def test_untagged_videos_have_the_matrix_that_players_assume(size: tuple[int, int], matrix: int) -> None:
    """HD begins at 1280 columns, or above the 576 lines of PAL."""
    assert matrix_of(*size) == matrix


@pytest.mark.parametrize(("height", "width", "matrix", "tagged", "full"), [
    (64, 64, 1, True, False), (64, 64, 1, True, True), (64, 64, 5, True, False), (64, 64, 5, True, True),
    (720, 64, 1, False, False), (64, 1280, 1, False, False), (576, 64, 5, False, False),
])  # fmt: skip
def test_tags_come_before_the_rule(
    tmp_path: Path, height: int, width: int, matrix: int, tagged: bool, full: bool
) -> None:
    colour = np.array([200, 30, 90])
    image = np.broadcast_to(colour.astype(np.uint8), (height, width, 3)).copy()
    frame = VideoFrame.from_ndarray(image, "rgb24").reformat(
        format="yuv444p", dst_colorspace=matrix, src_color_range=FULL, dst_color_range=LIMITED + full
    )
    path = encoded(tmp_path / "v.mp4", frame, **({"color_range": 1 + full, "colorspace": matrix} if tagged else {}))
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.colorspace == (matrix if tagged else 2)
    (clip,) = read_clips(path, fps=16, frames=8, sizes=[(32, 32)])
    # The wrong matrix or range is 9 or more off.
    assert np.abs(clip.frames[4, 16, 16].astype(int) - colour).max() <= 2


def test_a_matrix_that_cannot_be_undone_is_refused() -> None:
    frame, _, _ = picture("yuv420p")
    frame.colorspace = 8  # YCgCo
    with pytest.raises(
        DataError, match=r"^a frame cannot be scaled: its colour matrix has number 8 of ITU-T H.273, exp"
    ):
        Scaler([(75, 125)])(frame, None)
