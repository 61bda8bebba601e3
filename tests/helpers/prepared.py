"""Folders of videos for `data.prepare`, and what has to come out of them."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from data.shards.sample import Sample
from data.shards.stream import read_samples
from tests.helpers.videos import number_of, numbered, write_sound, write_video

FAST = ["model=pixels", "frames=10", "size=16x32", "workers=1", "cuts=keep"]


def write_clips(folder: Path, i: int, length: int, **more: Any) -> Path:
    """Video i of a folder, which starts with the number 40 i."""
    picture = functools.partial(_picture, 40 * i)
    return write_video(folder / f"v{i}.mp4", length, picture=picture, caption=f"clip of video {i}", **more)


def _picture(first: int, k: int) -> np.ndarray:
    return numbered(first + k)


LENGTHS = {"v0.mp4": 1, "v1.mp4": 2, "v2.mp4": 3, "v3.mp4": 4, "v4.mp4": 1, "v5.mp4": 2}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "data.prepare", *words]


def check_complete(folder: Path, lengths: dict[str, int] = LENGTHS) -> list[Sample]:
    """Every clip once, with its own frames and caption."""
    samples = list(read_samples(folder))
    assert len({sample.key for sample in samples}) == len(samples)
    found = sorted((s.meta["source"], s.meta["clip_start"]) for s in samples)
    assert found == sorted((name, k * 0.625) for name, count in lengths.items() for k in range(count))
    for sample in samples:
        i = int(sample.meta["source"][1])
        first = ((sample.latent[:, 0].permute(1, 2, 0).float() + 1) * 127.5).numpy()
        assert number_of(first) == 40 * i + round(sample.meta["clip_start"] * 16)
        assert sample.caption == f"clip of video {i}"
    assert not (folder / ".prepare").exists() and not list(folder.glob(".*"))
    return samples


def spoil(videos: Path) -> None:
    """Bad files of all kinds beside the good ones."""
    (videos / "empty.mp4").touch()
    write_sound(videos / "sound.mp4")
    for name in ("empty", "sound"):
        (videos / f"{name}.txt").write_text("a caption", encoding="utf-8")
    write_video(videos / "uncaptioned.mp4", 12)
    write_video(videos / "short.mp4", 5, caption="too short")
    cut = write_clips(videos, 6, 60, options={"g": "10"}, container={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])


def write_six(folder: Path) -> Path:
    """Six good videos of 1 to 4 clips of ten frames, those of `LENGTHS`."""
    for i, length in enumerate((12, 20, 35, 41, 10, 29)):
        write_clips(folder, i, length)
    return folder
