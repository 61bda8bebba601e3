"""Captions for videos that have none: `python -m data.caption VIDEOS model=FOLDER`.

A vision-language model of transformers looks at a few frames of each video, and its answer is written beside it. A
video counts from the moment its .txt has its name, so that a killed command goes on with the next one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.encoders.base import find_device
from data.errors import DataError, explained
from data.io.files import write_bytes
from data.prepare import layouts
from data.prepare.folder import search
from data.prepare.listed import Video
from data.prepare.sources import read_source
from data.prepare.video import Clip, probe, read_clips
from radial.cli.command import Command
from radial.cli.ranks import Rank
from radial.cli.settings import at_least, setting

PROMPT = (
    "These are frames of one video, in order. Describe the video in one paragraph: who and what is seen, what happens "
    "from beginning to end, the place and the light, and how the camera moves. Write the description alone."
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Arguments:
    """The keys of the command line."""

    videos: Path = setting("folder of videos; those without a caption get a .txt beside them")
    model: Path = setting("folder of a vision-language model as transformers loads it, with its processor")
    prompt: str = setting("what the model is asked, behind the frames", PROMPT)
    frames: int = setting("frames that it sees of each video, evenly spread", 8, must=at_least(1))
    side: int = setting("the frames' longer side in pixels; smaller videos are not enlarged", 448, must=at_least(16))
    tokens: int = setting("the longest answer", 256, must=at_least(1))
    device: str | None = setting("where the model runs; null: a GPU where there is one", None)
    dtype: str = setting("the model's numbers", "bf16", tuple(_DTYPES))


def caption(given: Arguments) -> int:
    """Write the captions, or this rank's part of them; returns the exit code, 1 where a video got none.

    Raises:
        DataError: no folder of videos, or a model that cannot be loaded or asked.
    """
    rank = Rank.here()
    lacking = _lacking(given.videos)
    # by its place among all videos, so that ranks that start later share the rest in the same way
    mine = [video for video in lacking if video.place % rank.world == rank.index]
    if not mine:
        print(f"{given.videos}: {'none of this rank' if lacking else 'no video'} lacks a caption")
        return 0
    model = Captioner(given.model, find_device(given.device, rank.local), _DTYPES[given.dtype])
    bad = 0
    for video in tqdm(mine, unit="video", desc="captioning", disable=rank.index != 0):
        path = given.videos / video.path
        try:
            text = model.describe(spread_frames(path, given.frames, given.side), given.prompt, given.tokens)
            if not text:
                raise DataError("the model's answer is empty")
            write_bytes(path.with_suffix(".txt"), f"{text}\n".encode())
        except DataError as error:
            bad += 1
            tqdm.write(f"bad: {video.path}: {error}", file=sys.stderr)
    print(f"{given.videos}: {len(mine) - bad} captions written, {bad} videos could not be described")
    return 1 if bad else 0


def _lacking(folder: Path) -> list[Video]:
    listed = not folder.is_dir() or layouts.table_in(folder) is not None or layouts.lists_in(folder) is not None
    if listed or (layouts.parquets_in(folder) and not search(folder).videos):
        raise DataError(f"{folder}: expected a folder of videos without a list, as captions are written beside them")
    # a.mp4 and a.webm have one a.txt: they are taken for one film, and the first of them is described
    lacking: dict[Path, Video] = {}
    for video in read_source(folder).videos():
        if video.uncaptioned:
            lacking.setdefault(Path(video.path).with_suffix(".txt"), video)
    return list(lacking.values())


def spread_frames(path: Path, count: int, side: int) -> list[np.ndarray]:
    """Frames (H, W, 3) uint8 RGB of a video, evenly spread from its first on; the longer of H and W is at most `side`.

    Raises:
        DataError: with the reason alone: it cannot be decoded, or is shorter than its header says.
    """
    info = probe(path)
    if not info.seconds:
        raise DataError("its header has no length, and frames cannot be spread; remux it")
    shrunk = min(1.0, side / max(info.height, info.width))
    size = max(1, round(info.height * shrunk)), max(1, round(info.width * shrunk))
    found = read_clips(path, fps=count / info.seconds, frames=count, sizes=[size], most=1)
    clip = next((entry for entry in found if isinstance(entry, Clip)), None)
    if clip is None:
        raise DataError("it is shorter than its header says")
    return list(clip.frames)


class Captioner:
    """A vision-language model that is asked about frames.

    Args:
        folder: of the model and its processor.
        device, dtype: where and in which numbers it runs.

    Raises:
        DataError: no such model there, or one that takes no questions.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not folder.is_dir():
            raise DataError(f"model is {folder}, which is no folder; download the model and give its folder")
        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise DataError(f"model is {folder}, which transformers cannot load to describe images: {error}") from error
        if getattr(self._processor, "chat_template", None) is None:
            raise DataError(f"model is {folder}, which has no chat template; expected one that answers questions")
        self._model, self._device, self._dtype = model.to(device).eval(), device, dtype

    @torch.no_grad()
    def describe(self, frames: list[np.ndarray], prompt: str, tokens: int) -> str:
        """The model's likeliest answer to a question about frames (H, W, 3) uint8, in at most so many tokens."""
        pictures = [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]
        message = {"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}
        inputs = self._processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self._device, self._dtype)
        answer = self._model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        (text,) = self._processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return " ".join(text.split())


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
