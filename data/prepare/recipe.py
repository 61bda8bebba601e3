"""What one run of `data.prepare` makes, and which part of it a process does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.prepare.clip_rules import Rules
from data.prepare.describing import Asking, write_captions
from data.prepare.qualifying import Wanted
from data.prepare.scaling import Size
from data.prepare.selection import Candidates, select
from data.prepare.sources import Columns
from data.prepare.upload import Upload
from data.prepare.video import DECODING
from data.shards.origins import MADE_BY
from radial.cli.ranks import Rank


@dataclass(frozen=True)
class Recipe:
    """What to make: the arguments of the command line, in the types that the work needs.

    Attributes:
        out: the folder of shards.
        upload: where finished shards move to; None: they stay in `out`.
        family: of the model, a key of `data.encoders.FAMILIES`.
        weights: its diffusers folder, or None.
        fps, frames, sizes, clips: pace and length of a clip, its buckets, the most from one video (None: all).
        selection: the arguments of `data.prepare.selection.select`, and `top`, as they are.
        caption_model: folder of the model that writes captions where they are missing; None: they stay missing.
        upscale, min_fps, dedup: as in `data.prepare.qualifying.Wanted`.
        rules: which clips are taken.
        image_to_video: write the first frame's conditions.
        device, vae_dtype, text_dtype: as in `EncoderSettings`; device None takes a GPU where there is one.
        workers: decoding processes.
        shard_bytes, shard_seconds: of a tar, at most, and after which it is finished.
        bad_share: the share of bad files above which the run counts as failed.
    """

    out: Path
    upload: Upload | None
    family: str
    weights: Path | None
    fps: float
    frames: int
    sizes: list[Size]
    clips: int | None
    selection: dict[str, Any]
    caption_model: Path | None
    upscale: bool
    min_fps: float | None
    dedup: bool
    rules: Rules
    image_to_video: bool
    device: str | None
    vae_dtype: torch.dtype
    text_dtype: torch.dtype
    workers: int
    shard_bytes: int
    shard_seconds: float
    bad_share: float

    def wanted(self) -> Wanted:
        """What a video has to be to be chosen."""
        top = self.selection["top"]
        return Wanted(self.fps, self.frames, self.clips, self.sizes, self.upscale, self.min_fps, top, self.dedup)

    def select(self) -> Candidates:
        """The candidates of the list."""
        asked = dict(self.selection)
        path, caption, start, end = (asked.pop(f"{name}_column") for name in ("path", "caption", "start", "end"))
        columns = Columns(path, caption, start, end, asked.pop("captions"))
        return select(**{name: value for name, value in asked.items() if name != "top"}, columns=columns)

    def write_captions(self) -> None:
        """Write captions beside the videos that have none, where a model for that is given, as a rank alone.

        A source that is not there has none to describe: reading it says so.

        Raises:
            DataError: as `data.prepare.describing.write_captions`.
        """
        source = self.selection["source"]
        if self.caption_model is not None and source.exists():
            write_captions(source, Asking(self.caption_model, device=self.device), Rank())

    def arguments(self) -> dict[str, Any]:
        """What decides the folder's contents, as JSON: a folder is only continued with the same."""
        return {
            "made_by": MADE_BY,
            "decoding": DECODING,
            "model": self.family,
            "fps": self.fps,
            "frames": self.frames,
            "sizes": [list(size) for size in self.sizes],
            "clips": self.clips,
            "upscale": self.upscale,
            "min_fps": self.min_fps,
            "dedup": self.dedup,
            **asdict(self.rules),
            "image_to_video": self.image_to_video,
            "upload": None if self.upload is None else self.upload.address,
            "vae_dtype": str(self.vae_dtype).removeprefix("torch."),
            "text_dtype": str(self.text_dtype).removeprefix("torch."),
            **{name: str(v) if isinstance(v, Path) else v for name, v in self.selection.items()},
        }
