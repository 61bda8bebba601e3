"""`python -m data.prepare`: the command line."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.encoders import FAMILIES, encoder_class
from data.errors import DataError, explained
from data.prepare.clip_rules import BARS, CUTS, Rules
from data.prepare.scaling import Size
from radial.cli.command import Command
from radial.cli.ranks import Rank
from radial.cli.settings import POSITIVE, at_least, setting, within

if TYPE_CHECKING:
    from data.encoders.base import Encoder

_DTYPES = ("fp32", "bf16", "fp16")
PUBLISHED_TOP = 2000  # videos of each length, the best by their scores: the paper's appendix B


@dataclass
class Arguments:
    """The keys of the command line."""

    source: Path = setting("folder of videos with .txt captions, or a .csv, .tsv, .json, .jsonl or .parquet table")
    out: Path = setting("folder for the shards; an unfinished one is continued")
    upload: str | None = setting(
        "address that each finished shard moves to, and the manifest last, such as s3://bucket/shards; null: they stay "
        "in out", None, path=True,
    )  # fmt: skip
    model: str = setting("model family", "wan", tuple(FAMILIES))
    weights: Path | None = setting("the model's diffusers folder, with vae, text_encoder and tokenizer", None)
    frames: str = setting("frames of a clip: a number, or 1x, 2x, 4x of the model's native clip", "4x")
    size: str | None = setting(
        "buckets as HEIGHTxWIDTH,...; the nearest in aspect is used; null: the model's own", None
    )
    fps: float | None = setting("frames a second; null: the model's own", None, must=POSITIVE)
    clips: int | None = setting("most clips from one video; null: all that fit, end to end", None, must=at_least(1))
    where: str | None = setting("conditions on columns, or on frames, seconds, fps, width, height, aspect", None)
    sort: str | None = setting("best first by this column, or by the sum of several joined by +", None)
    top: int | None = setting(
        f"keep that many videos; null: {PUBLISHED_TOP} with sort=, all without", None, must=at_least(1)
    )
    videos: Path | None = setting("folder that the table's paths are relative to; null: the table's own", None)
    upscale: bool = setting("take videos that are smaller than their bucket, enlarged", True)
    min_fps: float | None = setting(
        "take no video of fewer frames a second; null: all, their frames repeated", None, must=POSITIVE
    )
    dedup: bool = setting("leave out videos that are there already, as the same file or encoded again", False)
    cuts: str = setting("at a cut begin a new clip (split), leave the clip out (drop), or go on (keep)", "split", CUTS)
    cut_threshold: float = setting(
        "how much a picture changes at a cut, in levels of 255; lower finds more", 15.0, must=within(0, 255)
    )
    min_motion: float | None = setting(
        "leave out clips that change less from frame to frame, in levels of 255", None, must=within(0, 255)
    )
    max_black: float | None = setting("leave out clips with a larger share of black frames", None, must=within(0, 1))
    max_repeated: float | None = setting(
        "leave out clips with a larger share of repeated frames", None, must=within(0, 1)
    )
    bars: str = setting("black bars at a video's edges: keep or crop them, or drop the video", "keep", BARS)
    path_column: str | None = setting("the table's column of paths; null: path, video, file, ...", None)
    caption_column: str | None = setting("the table's column of captions; null: caption, text, prompt", None)
    captions: str = setting("videos without: bad (require), an empty one (empty), or that of this column", "require")
    caption_model: Path | None = setting(
        "folder of a vision-language model that first writes the captions that are missing, as data.caption does",
        None, key="caption.model",
    )  # fmt: skip
    start_column: str | None = setting("the table's column of when a piece begins; null: start, start_time, ...", None)
    end_column: str | None = setting("the table's column of when a piece ends; null: end, end_time, ...", None)
    image_to_video: bool = setting("also write the first frame's condition latent and embedding", False)
    device: str | None = setting("where to encode; null: a GPU where there is one", None)
    vae_dtype: str = setting("the VAE's numbers", "fp32", _DTYPES)
    text_dtype: str = setting("the text encoders' numbers", "bf16", _DTYPES)
    workers: int = setting("decoding processes", 4, must=at_least(1))
    shard_gb: float = setting("largest tar, in 10^9 bytes", 3.0, must=POSITIVE)
    shard_minutes: float = setting("finish a tar after so many minutes: a kill costs no more", 15.0, must=POSITIVE)
    preview: Path | None = setting("draw chosen clips into this PNG and print an estimate, instead of encoding", None)
    dry_run: bool = setting("decode everything and print what each filter leaves out, instead of encoding", False)
    bad_share: float = setting("share of bad files above which the exit code is 1", 0.05, must=within(0, 1))


def run(given: Arguments) -> int:
    """Make the shards; returns the exit code."""
    if given.cuts != "keep" and importlib.util.find_spec("scenedetect") is None:
        raise DataError(f"cuts={given.cuts} needs PySceneDetect: pip install scenedetect-headless, or give cuts=keep")
    looks = given.preview is not None or given.dry_run
    if given.caption_model is not None and given.captions != "require":
        raise DataError(
            f"captions is {given.captions}, but caption.model writes what is missing; leave one of them out"
        )
    # torch and diffusers take seconds to import: after what is typed is known to be right
    import torch

    from data.prepare.describing import check_folder
    from data.prepare.preview import preview
    from data.prepare.recipe import Recipe
    from data.prepare.run import prepare
    from data.prepare.upload import Upload

    family = encoder_class(given.model)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    recipe = Recipe(
        out=given.out,
        upload=None if given.upload is None else Upload(given.upload),
        family=given.model,
        weights=given.weights,
        fps=given.fps or family.facts.fps,
        frames=_frames(given.frames, family),
        sizes=[family.size_of(given.weights)] if given.size is None else _sizes(given.size),
        clips=given.clips,
        selection={
            "source": given.source,
            "videos": given.videos,
            "path_column": given.path_column,
            "caption_column": given.caption_column,
            # a look writes no captions, and takes the videos that will get one
            "captions": "empty" if looks and given.caption_model is not None else given.captions,
            "start_column": given.start_column,
            "end_column": given.end_column,
            "where": given.where,
            "sort": given.sort,
            "top": PUBLISHED_TOP if given.top is None and given.sort is not None else given.top,
        },
        caption_model=given.caption_model,
        upscale=given.upscale,
        min_fps=given.min_fps,
        dedup=given.dedup,
        rules=Rules(given.cuts, given.cut_threshold, given.min_motion, given.max_black, given.max_repeated, given.bars),
        image_to_video=given.image_to_video,
        device=given.device,
        vae_dtype=dtypes[given.vae_dtype],
        text_dtype=dtypes[given.text_dtype],
        workers=given.workers,
        shard_bytes=int(given.shard_gb * 1e9),
        shard_seconds=60 * given.shard_minutes,
        bad_share=given.bad_share,
    )
    if given.caption_model is not None and given.source.exists():  # else it is said below what that means
        check_folder(given.source)
    if looks:
        family.check(recipe.frames, recipe.sizes)
        return preview(recipe, given.preview, given.dry_run)
    return prepare(recipe, Rank.here())


def _frames(text: str, family: type[Encoder]) -> int:
    if text in family.facts.lengths:
        return family.facts.lengths[text]
    if not text.isdecimal():
        raise DataError(f"frames is {text!r}, expected a number or one of {', '.join(family.facts.lengths)}")
    return int(text)


def _sizes(text: str) -> list[Size]:
    sizes = []
    for part in text.split(","):
        height, _, width = part.strip().partition("x")
        if not (height.isdecimal() and width.isdecimal()):
            raise DataError(f"size is {part.strip()!r}, expected HEIGHTxWIDTH such as 720x1280")
        sizes.append((int(height), int(width)))
    return sizes


main = Command(
    "python -m data.prepare",
    "Turns videos with captions into shards of VAE latents and text embeddings for training. Kill it whenever you "
    "like: the same command goes on where it stopped, and appends what was added to the list since. Under torchrun or "
    "srun each rank takes its share of the videos. Bad files are listed in rejected.jsonl.",
    Arguments,
    run,
    [
        "python -m data.prepare source=OpenVid-1M.csv videos=OpenVid sort='aesthetic score+motion score' \\",
        "    where='seconds>=20.1, height>=720' out=shards/openvid_4x weights=weights/wan_14b",
        "python -m data.prepare source=my_videos out=shards/mine weights=weights/wan_1.3b size=480x832 frames=161",
        "torchrun --nproc-per-node 8 -m data.prepare source=list.parquet out=shards/h model=hunyuan weights=weights/h",
    ],
    explain=explained,
)

if __name__ == "__main__":
    main.run()
