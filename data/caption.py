"""Captions for videos that have none: `python -m data.caption VIDEOS model=FOLDER`, see `data.prepare.describing`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from data.errors import explained
from data.prepare.describing import Asking, write_captions
from radial.cli.command import Command
from radial.cli.ranks import Rank
from radial.cli.settings import at_least, setting

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Arguments:
    """The keys of the command line."""

    videos: Path = setting("folder of videos; those without a caption get a .txt beside them")
    model: Path = setting("folder of a vision-language model as transformers loads it, with its processor")
    prompt: str = setting("what the model is asked, behind the frames", Asking.prompt)
    frames: int = setting("frames that it sees of each video, evenly spread", Asking.frames, must=at_least(1))
    side: int = setting(
        "the frames' longer side in pixels; smaller videos are not enlarged", Asking.side, must=at_least(16)
    )
    tokens: int = setting("the longest answer", Asking.tokens, must=at_least(1))
    device: str | None = setting("where the model runs; null: a GPU where there is one", None)
    dtype: str = setting("the model's numbers", "bf16", tuple(_DTYPES))


def caption(given: Arguments) -> int:
    """Write the captions, or this rank's part of them; returns the exit code, 1 where a video got none.

    Raises:
        DataError: as `write_captions`.
    """
    asking = Asking(
        given.model, given.prompt, given.frames, given.side, given.tokens, given.device, _DTYPES[given.dtype]
    )
    return 1 if write_captions(given.videos, asking, Rank.here()) else 0


main = Command(
    "python -m data.caption",
    "Describes the videos of a folder that have no caption, in a .txt beside each. Kill it whenever you like: the same "
    "command goes on where it stopped. Under torchrun or srun each rank takes its share of the videos.",
    Arguments,
    caption,
    [
        "python -m data.caption my_videos model=weights/qwen2.5-vl-7b",
        "torchrun --nproc-per-node 8 -m data.caption my_videos model=weights/qwen2.5-vl-7b frames=16",
    ],
    positional="videos",
    explain=explained,
)

if __name__ == "__main__":
    main.run()
