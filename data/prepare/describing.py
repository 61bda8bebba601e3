"""Captions for videos that have none: a vision-language model of transformers looks at a few frames of each.

Its answer is written beside the video. A video counts from the moment its .txt has its name, so that a killed command
goes on with the next one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from data.encoders.base import find_device
from data.encoders.weights import check_loaded
from data.errors import DataError
from data.io.files import write_bytes
from data.prepare import layouts
from data.prepare.folder import search
from data.prepare.listed import Video
from data.prepare.scaling import Size
from data.prepare.sources import read_source
from data.prepare.video import Clip, decoded_seconds, probe, read_clips
from radial.cli.ranks import Rank

PROMPT = (
    "These are frames of one video, in order. Describe the video in one paragraph: who and what is seen, what happens "
    "from beginning to end, the place and the light, and how the camera moves. Write the description alone."
)


@dataclass(frozen=True)
class Asking:
    """Which model is asked, and what.

    Attributes:
        model: folder of the model and its processor.
        prompt: the question, behind the frames.
        frames: that it sees of each video, evenly spread.
        side: the frames' longer side in pixels, at most.
        tokens: of the longest answer.
        device: where it runs; None takes a GPU where there is one.
        dtype: its numbers.
    """

    model: Path
    prompt: str = PROMPT
    frames: int = 8
    side: int = 448
    tokens: int = 256
    device: str | None = None
    dtype: torch.dtype = torch.bfloat16


def write_captions(folder: Path, asking: Asking, rank: Rank) -> int:
    """Describe the videos of a folder that have no caption, or this rank's part of them.

    Returns:
        how many could not be described.

    Raises:
        DataError: as `check_folder`; no video in it, or a model that cannot be loaded or asked, or lacks memory.
    """
    check_folder(folder)
    lacking = _lacking(folder)
    # by its place among all videos, so that ranks that start later share the rest in the same way
    mine = [videos for videos in lacking if videos[0].place % rank.world == rank.index]
    if not mine:
        print(f"{folder}: {'none of this rank' if lacking else 'no video'} lacks a caption")
        return 0
    model = Captioner(asking.model, find_device(asking.device, rank.local), asking.dtype)
    bad = 0
    for videos in tqdm(mine, unit="video", desc="captioning", disable=rank.index != 0):
        text = _answer(model, folder, videos, asking)
        bad += text is None
        if text is not None:
            write_bytes((folder / videos[0].path).with_suffix(".txt"), f"{text}\n".encode())
    print(f"{folder}: {len(mine) - bad} captions written, {bad} videos could not be described")
    return bad


def _answer(model: Captioner, folder: Path, videos: Sequence[Video], asking: Asking) -> str | None:
    """What the model says of the first video that it can be shown; None where there is none, after the reasons."""
    for number, video in enumerate(videos):
        path = folder / video.path
        try:
            text = model.describe(spread_frames(path, asking.frames, asking.side), asking.prompt, asking.tokens)
            if text:
                return text
            reason = "the model's answer is empty"
        except DataError as error:
            reason = str(error)
        except torch.OutOfMemoryError as error:  # as the next video would: their frames are about as large
            raise DataError(
                f"{path}: {asking.frames} frames of at most {asking.side} pixels do not fit into the device's memory "
                f"beside the model ({_short(error)}); what is written stays. Start again on a device with more "
                "(device=), or describe the videos by data.caption with a smaller side= or fewer frames="
            ) from error
        after = videos[number + 1 : number + 2]
        more = f"; {after[0].path} is described in its place" if after else ""
        tqdm.write(f"bad: {video.path}: {reason}{more}", file=sys.stderr)
    return None


def check_folder(folder: Path) -> None:
    """Raise a DataError unless it is a folder whose videos can get captions: those of a list are in the list."""
    listed = not folder.is_dir() or layouts.table_in(folder) is not None or layouts.lists_in(folder) is not None
    if listed or (layouts.parquets_in(folder) and not search(folder).videos):
        raise DataError(
            f"{folder}: expected a folder of videos without a list, as a model's captions are written beside videos"
        )


def _lacking(folder: Path) -> list[list[Video]]:
    # a.mp4 and a.webm have one a.txt: they are taken for one film, and the first that can be decoded is described
    lacking: dict[Path, list[Video]] = {}
    for video in read_source(folder).videos():
        if video.uncaptioned:
            lacking.setdefault(Path(video.path).with_suffix(".txt"), []).append(video)
    return list(lacking.values())


def spread_frames(path: Path, count: int, side: int) -> list[np.ndarray]:
    """Frames (H, W, 3) uint8 RGB of a video, evenly spread from its first on; the longer of H and W is at most `side`.

    Raises:
        DataError: with the reason alone: it cannot be decoded, or its header has no length.
    """
    info = probe(path)
    if not info.seconds:
        raise DataError("its header has no length, and frames cannot be spread; remux it")
    shrunk = min(1.0, side / max(info.height, info.width))
    size = max(1, round(info.height * shrunk)), max(1, round(info.width * shrunk))
    found = _spread(path, count, size, info.seconds)
    if found is None:  # a header may have the length of the sound
        seconds = decoded_seconds(path)
        found = _spread(path, count, size, seconds) if seconds else None
    if found is None:
        raise DataError("it is shorter than its header says")
    return found


def _spread(path: Path, count: int, size: Size, seconds: float) -> list[np.ndarray] | None:
    """So many frames of a video of this length; None where it is shorter."""
    found = read_clips(path, fps=count / seconds, frames=count, sizes=[size], most=1)
    clip = next((entry for entry in found if isinstance(entry, Clip)), None)
    return None if clip is None else list(clip.frames)


def _short(error: Exception) -> str:
    return str(error).partition(".")[0]


class Captioner:
    """A vision-language model that is asked about frames.

    Args:
        folder: of the model and its processor.
        device, dtype: where and in which numbers it runs.

    Raises:
        DataError: no such model there, one that takes no questions, or weights that lack a tensor, have one in another
            shape, or do not fit into the device's memory.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; download the caption model and give its folder")
        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
            # It draws what the weights lack at random and goes on, so what was loaded is looked at.
            how = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
            loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **how)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
            raise DataError(f"{folder}: transformers cannot load it to describe images: {error}") from error
        if getattr(self._processor, "chat_template", None) is None:
            raise DataError(f"{folder}: has no chat template; expected a model that answers questions")
        model, about = loaded
        check_loaded(folder, about)
        try:
            self._model = model.to(device).eval()
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"{folder}: does not fit into the memory of {device} ({_short(error)}); choose a device with more "
                "(device=), or a smaller model"
            ) from error
        self._device, self._dtype = device, dtype

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
