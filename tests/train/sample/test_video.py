"""What is written as video, animation or picture shows the colours that it was given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from data.prepare.video import read_clips
from data.synth.clips import make_clip, write_preview
from train.errors import UserError
from train.report.pictures import animate, film_strip
from train.sample.pipeline import first_frame
from train.sample.video import video_file

COLOURS = np.array([(30, 200, 30), (200, 30, 90), (20, 40, 220), (240, 220, 20), (128, 128, 128), (0, 0, 0),
                    (255, 255, 255), (90, 160, 200)], np.uint8)  # fmt: skip
SIZES = [(480, 832), (480, 848), (576, 1024), (544, 960), (544, 1280), (720, 1280), (1280, 720), (704, 1280),
         (1088, 1920), (64, 96), (65, 97), (480, 1668), (720, 2564)]  # fmt: skip


def patches(height: int, width: int) -> np.ndarray:
    """A picture of eight fields of colour, two rows of four."""
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 4 // width
    return COLOURS[rows[:, None] * 4 + columns[None]]


def inside(picture: np.ndarray) -> np.ndarray:
    """The colour in the middle of each field, (8, 3)."""
    height, width = picture.shape[:2]
    return np.array(
        [picture[height * (2 * r + 1) // 4, width * (2 * c + 1) // 8] for r in (0, 1) for c in range(4)], int
    )


def write(path: Path, frames: np.ndarray) -> Path:
    with video_file(path, 16) as video:
        video.add(frames)
    return path


@pytest.mark.parametrize("size", SIZES)
def test_a_video_shows_its_colours(tmp_path: Path, size: tuple[int, int]) -> None:
    """To our own reader by the tags; and to players that know no tags, by its size."""
    path = write(tmp_path / "v.mp4", np.stack([patches(*size)] * 2))
    height, width = (side // 2 * 2 for side in size)
    (clip,) = read_clips(path, fps=16, frames=2, sizes=[(height, width)])
    assert np.abs(inside(clip.frames[0]) - COLOURS).max() <= 3
    with av.open(str(path)) as file:
        codec = file.streams.video[0].codec_context
        hd = width >= 1280 or height > 576
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (
            1 if hd else 6,
            1,
            1,
            1,
        )
        assert codec.pix_fmt == "yuv420p"


def test_chroma_lies_where_h264_has_it(tmp_path: Path) -> None:
    """A wave of colour comes back where it was, in steps as small as half a pixel."""
    x = np.arange(256)
    wave = 128 + 60 * np.sin(2 * np.pi * x / 16)
    frame = np.broadcast_to(np.stack([wave, 256 - wave, np.full(256, 128)], -1).round().astype(np.uint8), (64, 256, 3))
    (clip,) = read_clips(write(tmp_path / "v.mp4", np.stack([frame] * 4)), fps=16, frames=4, sizes=[(64, 256)])
    found = clip.frames[2, 32].astype(float)
    shifts = [np.angle(np.fft.rfft(c)[16] / np.fft.rfft(was)[16]) * 16 / (2 * np.pi)
              for c, was in zip(found[:, :2].T, frame[32, :, :2].astype(float).T, strict=True)]  # fmt: skip
    assert np.abs(shifts).max() < 0.05


def clip_of(picture: np.ndarray, frames: int) -> torch.Tensor:
    """A still as (3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(picture).permute(2, 0, 1)[:, None].expand(-1, frames, -1, -1).float() / 127.5 - 1


def shown(path: Path) -> list[np.ndarray]:
    """The pictures of an animation, (H, W, 3) whole numbers."""
    with Image.open(path) as file:
        return [np.asarray(image.convert("RGB")).astype(int) for image in ImageSequence.Iterator(file)]


def test_film_strips_show_their_colours(tmp_path: Path) -> None:
    still = patches(32, 64)
    panels = {"one": clip_of(still, 9), "two": clip_of(still[::-1].copy(), 9)}
    film_strip(panels, "a title", tmp_path / "v.png")
    strip = np.asarray(Image.open(tmp_path / "v.png").convert("RGB"))
    assert np.abs(inside(strip[44 : 44 + 64, 8 : 8 + 128]) - COLOURS).max() <= 3


def test_animations_show_their_colours(tmp_path: Path) -> None:
    """Of every pixel of clips with a few hundred colours a frame, small things and soft edges included."""
    clips = [make_clip(3, i, 4, 32, 64)[0] for i in range(3)]
    animate({str(i): clip for i, clip in enumerate(clips)}, "a title", tmp_path / "v.gif")
    images = shown(tmp_path / "v.gif")
    assert len(images) == 4
    for k, image in enumerate(images):
        for i, clip in enumerate(clips):
            wanted = ((clip[:, k] + 1) * 127.5).round().repeat_interleave(5, 1).repeat_interleave(5, 2)
            top = 44 + 182 * i
            error = np.abs(image[top : top + 160, 8 : 8 + 320] - wanted.permute(1, 2, 0).numpy())
            assert error.max() <= 3, (k, i)


def test_the_synthetic_preview_shows_its_colours(tmp_path: Path) -> None:
    clips = [make_clip(3, i, 4, 32, 64)[0] for i in range(4)]
    write_preview([SimpleNamespace(latent=clip) for clip in clips], tmp_path / "v.gif")  # type: ignore[misc]
    for k, image in enumerate(shown(tmp_path / "v.gif")):
        for i, clip in enumerate(clips):
            wanted = ((clip[:, k] + 1) * 127.5).round().repeat_interleave(4, 1).repeat_interleave(4, 2)
            left = 258 * i + 1
            error = np.abs(image[1 : 1 + 128, left : left + 256] - wanted.permute(1, 2, 0).numpy())
            assert error.max() <= 3, (k, i)


@pytest.mark.parametrize("name", ["v.png", "v.tiff", "v.pgm"])
def test_a_picture_of_16_bits_is_as_bright_as_one_of_8(tmp_path: Path, name: str) -> None:
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint16)[None], (32, 256))
    Image.fromarray(ramp * 257).save(tmp_path / name)
    with Image.open(tmp_path / name) as file:
        assert file.mode.startswith("I")
    assert np.array_equal(np.asarray(first_frame(tmp_path / name, 256, 32)), np.stack([ramp] * 3, -1))


def test_a_picture_of_32_bits_is_refused(tmp_path: Path) -> None:
    for values in (np.ones((8, 8), np.float32), np.full((8, 8), 2**20, np.int32)):
        Image.fromarray(values).save(tmp_path / "v.tiff")
        with pytest.raises(UserError, match=r"v.tiff has pixels of 32 bits, expected 8 or 16; save it as PNG or JPEG"):
            first_frame(tmp_path / "v.tiff", 8, 8)
