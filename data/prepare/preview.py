"""What a command would make, before anything is encoded: a contact sheet, an estimate, and what each filter leaves out.

Videos are decoded as for encoding, some of them for `preview=`, all of them for `dry_run=true`; the folder of shards is
neither made nor read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from data.encoders import load_encoder
from data.encoders.base import EncoderSettings, find_device
from data.errors import DataError
from data.prepare.chosen import ChosenVideos, Rejected
from data.prepare.clip_rules import REASONS, Rules
from data.prepare.qualifying import choose_videos
from data.prepare.recipe import Recipe
from data.prepare.run import make_sample
from data.prepare.surveying import BAD, Job, Survey, survey_all, with_pictures
from data.prepare.video import Clip, read_clips
from data.sheet import row_of, sheet_of

VIDEOS, CLIPS = 16, 8
"""Of a contact sheet: videos spread over the chosen ones, and how much of each is looked at, in clips."""

BAD_SHOWN = 3
"""Bad files that are named."""

TRIAL = 60.0
"""Seconds of encoding after which the trial, from which hours of encoding are estimated, ends."""

_STEPS = {"min_motion": (0.1, 0.3, 1.0), "max_black": (0.0, 0.1, 0.5), "max_repeated": (0.1, 0.25, 0.5)}
"""Bounds of which a dry run counts what they leave out."""


def preview(recipe: Recipe, sheet: Path | None, everything: bool) -> int:
    """Print an estimate, draw `sheet`, and print what filters leave out where `everything` is decoded.

    Returns:
        the exit code, 0.

    Raises:
        DataError: an unusable source, no video that is left, or a sheet that cannot be written.
    """
    if sheet is not None and not (sheet.suffix == ".png" and sheet.parent.is_dir()):
        raise DataError(f"preview is {sheet}, expected the name of a .png in a folder that is there")
    chosen = choose_videos(recipe.arguments(), recipe.select(), recipe.wanted(), progress=True)
    for line in chosen.told:
        print(line)
    rows = range(len(chosen.rows)) if everything else _spread(len(chosen.rows), VIDEOS)
    jobs = _jobs(recipe, chosen, rows, None if everything else CLIPS, sheet is not None)
    looks = tqdm(survey_all(jobs, recipe.workers), total=len(rows), unit="video", desc="looking")
    surveys = with_pictures(looks, rows, VIDEOS)
    clips, exact = _clips(chosen, surveys, everything)
    print("\n".join(_counts(recipe, chosen, surveys, clips, "" if exact else "about ")))
    if everything:
        print("\n".join(_filters(recipe, chosen, surveys)))
    shown = [(row, found) for row, found in surveys.items() if found.pictures]
    if sheet is not None and not shown:
        print(f"{sheet}: not drawn, as no video that was looked at has a clip")
    elif sheet is not None:
        sheet_of([row_of(found.pictures, _label(chosen, row, found)) for row, found in shown]).save(sheet)
        print(f"{sheet}: first, middle and last frame of {len(shown)} clips")
    # Last, as it takes weights, a device and a minute: whatever becomes of it, the rest is there.
    sys.stdout.flush()
    if any(found.taken for found in surveys.values()):
        print(_encoding(recipe, chosen, surveys, clips))
    return 0


def _spread(count: int, most: int) -> list[int]:
    """At most so many of `count` numbers, evenly spread."""
    return sorted({round(k * (count - 1) / max(1, most - 1)) for k in range(most)}) if count else []


def _jobs(recipe: Recipe, chosen: ChosenVideos, rows: Sequence[int], most: int | None, drawn: bool) -> Iterator[Job]:
    options = {"fps": recipe.fps, "frames": recipe.frames, "sizes": recipe.sizes, "rules": recipe.rules}
    for row in rows:
        piece = {"most": recipe.clips, "start": chosen.rows[row].start, "end": chosen.rows[row].end}
        yield Job(row, chosen.path(row), {**options, **piece}, most, drawn)


def _clips(chosen: ChosenVideos, surveys: dict[int, Survey], everything: bool) -> tuple[int, bool]:
    """How many clips would come of it, and whether they were counted, not estimated."""
    seen = sum(len(found.taken) for found in surveys.values())
    passed = sum(len(found.left) for found in surveys.values())
    ended = all(len(found.taken) + len(found.left) < CLIPS for found in surveys.values())
    if everything or (ended and len(surveys) == len(chosen.rows)):
        return seen, True
    promised = sum(row.clips for row in chosen.rows)
    return round(promised * seen / max(1, seen + passed)), False


def _counts(recipe: Recipe, chosen: ChosenVideos, surveys: dict[int, Survey], clips: int, about: str) -> list[str]:
    """What was seen, and how much would come of it."""
    seen = sum(len(found.taken) for found in surveys.values())
    passed = sum(len(found.left) for found in surveys.values())
    bad = sum(found.reason is not None for found in surveys.values())
    hours = clips * recipe.frames / recipe.fps / 3600
    return [
        f"{len(chosen.rows)} videos chosen, {chosen.passed} do not qualify, {len(chosen.rejected)} files are bad; "
        f"{len(surveys)} looked at: {seen} clips, {passed} pieces left out, {bad} bad files",
        *_bad(chosen, surveys),
        f"estimate: {about}{clips} clips of {recipe.frames} frames, {hours:.2f} hours of video",
    ]


def _bad(chosen: ChosenVideos, surveys: dict[int, Survey]) -> list[str]:
    """The first bad files of the list, then of those that were looked at, each with the reason."""
    found = [(row, looked.reason) for row, looked in surveys.items() if looked.reason is not None]
    bad = [*chosen.rejected, *(Rejected(chosen.rows[row].name, reason) for row, reason in found)]
    more = [f"bad: {len(bad) - BAD_SHOWN} more"] if len(bad) > BAD_SHOWN else []
    return [f"bad: {entry}" for entry in bad[:BAD_SHOWN]] + more


def _encoding(recipe: Recipe, chosen: ChosenVideos, surveys: dict[int, Survey], clips: int) -> str:
    """How large so many clips would be and how long their encoding would take, or why that is not known."""
    none = "no estimate of gigabytes and of hours of encoding"
    try:
        sizes, times = _trial(recipe, chosen, _to_try(surveys))
    except torch.OutOfMemoryError as error:
        return (
            f"{none}: clips of {recipe.frames} frames do not fit into the device's memory "
            f"({str(error).partition('.')[0]}); give a device= with more, vae_dtype=bf16, a smaller size= or fewer "
            "frames="
        )
    except (OSError, ValueError, RuntimeError, MemoryError) as error:  # a DataError is a ValueError
        return f"{none}: {' '.join(str(error).split())}"
    size, first = sum(sizes) / len(sizes), times[0]
    seconds = sum(times[1:]) / len(times[1:]) if times[1:] else first
    seen = sum(len(found.taken) for found in surveys.values())
    decoding = sum(found.seconds for found in surveys.values()) / seen / recipe.workers
    encoding = clips * max(seconds, decoding) / 3600
    tried = f"{len(times)} clips took {sum(times):.1f} s, {first:.1f} of them the first, which does not count"
    return (
        f"estimate: {clips * size / 1e9:.3g} GB of shards, {encoding:.2g} hours of encoding on one device (in a trial "
        f"{tried if times[1:] else f'1 clip took {first:.1f} s'}; decoding takes {decoding:.1f} s a clip in "
        f"{recipe.workers} processes)"
    )


def _to_try(surveys: dict[int, Survey]) -> list[tuple[int, float]]:
    """Clips for the trial, by row and start: the first of each of some videos, then their second ones, and so on."""
    taken = {row: [start for start, _ in found.taken] for row, found in surveys.items() if found.taken}
    rows = [list(taken)[k] for k in _spread(len(taken), VIDEOS)]
    return [(row, taken[row][k]) for k in range(CLIPS) for row in rows if k < len(taken[row])]


def _trial(recipe: Recipe, chosen: ChosenVideos, clips: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Bytes of samples, and seconds that their encoding took: of as many clips as `TRIAL` allows, at least one.

    Each is decoded when its turn comes, and gone before the next one is.

    Args:
        clips: rows of chosen videos, and where in them the clips start, in seconds.

    Raises:
        DataError: no encoder, or a clip that cannot be decoded or encoded.
        torch.OutOfMemoryError: the device has too little memory for a clip.
    """
    settings = EncoderSettings(
        recipe.weights, find_device(recipe.device), recipe.vae_dtype, recipe.text_dtype, recipe.image_to_video
    )
    encoder = load_encoder(recipe.family, settings)
    trial = replace(chosen, arguments={**chosen.arguments, "encoder": "trial"})
    sizes: list[int] = []
    times: list[float] = []
    for row, start in tqdm(clips, unit="clip", desc="a trial"):
        clip = _clip_at(recipe, chosen.path(row), start)
        began = time.monotonic()
        prompt = encoder.prompt(chosen.rows[row].caption)
        entry = make_sample(encoder, recipe, trial, row, clip, prompt).to_entry()
        times.append(time.monotonic() - began)
        sizes.append(sum(len(part) for part in entry.values() if isinstance(part, bytes)))
        del clip
        if sum(times) >= TRIAL:
            break
    return sizes, times


def _clip_at(recipe: Recipe, path: Path, start: float) -> Clip:
    """The clip that was found at this time, decoded once more."""
    rules = Rules(bars=recipe.rules.bars)  # it has passed the others
    pace, frames, sizes = recipe.fps, recipe.frames, recipe.sizes
    try:
        found = next(read_clips(path, fps=pace, frames=frames, sizes=sizes, most=1, rules=rules, start=start), None)
    except BAD as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(found, Clip):
        raise DataError(f"{path}: the clip at {start:.2f} s is not there any more; was the file changed?")
    return found


def _filters(recipe: Recipe, chosen: ChosenVideos, surveys: dict[int, Survey]) -> list[str]:
    """What the rules of the command leave out, and what other bounds would."""
    lines = []
    for reason, words in REASONS.items():
        places = [(row, p.start) for row, found in surveys.items() for p in found.left if p.why == reason]
        if places:
            some = ", ".join(f"{chosen.rows[row].path} at {start:.2f} s" for row, start in places[:3])
            lines.append(f"left out: {len(places)} {words}, such as {some}")
    bars = [chosen.rows[row].path for row, found in surveys.items() if found.bars]
    if bars and recipe.rules.bars == "keep":
        lines.append(f"{len(bars)} videos have black bars, such as {bars[0]}; bars=crop or bars=drop")
    measured = [m for found in surveys.values() for _, m in found.taken if m is not None]
    measured += [p.measures for found in surveys.values() for p in found.left if p.measures is not None]
    for key, steps in _STEPS.items():
        name = key.partition("_")[2]
        values = sorted(getattr(measures, name) for measures in measured)
        if values:
            low, middle, high = (values[round(share * (len(values) - 1))] for share in (0.1, 0.5, 0.9))
            asked = getattr(recipe.rules, key)
            bounds = sorted({*steps, *([] if asked is None else [asked])})
            counts = [sum(v < b if key == "min_motion" else v > b for v in values) for b in bounds]
            told = ", ".join(f"{key}={bound:g} {count}" for bound, count in zip(bounds, counts, strict=True))
            lines.append(
                f"{name}: {low:.2f} to {high:.2f} in most of {len(values)} clips, {middle:.2f} in the middle; these "
                f"bounds leave out: {told}"
            )
    return lines


def _label(chosen: ChosenVideos, row: int, found: Survey) -> str:
    return f"{chosen.rows[row].path} at {found.taken[0][0]:.2f} s: {chosen.rows[row].caption}"
