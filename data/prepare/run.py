"""One run of `data.prepare`: decode, encode, write, go on where a killed run stopped."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.encoders import encoder_class, fingerprint, load_encoder
from data.encoders.base import Encoder, EncoderSettings, find_device
from data.errors import DataError, naming
from data.prepare import underway
from data.prepare.append import revisit
from data.prepare.arguments import check_same, same
from data.prepare.chosen import FILE as CHOSEN
from data.prepare.chosen import ChosenVideos, Rejected
from data.prepare.decoders import Decoders, End, prefetch
from data.prepare.journal import Journal
from data.prepare.merge import exit_code, finish
from data.prepare.qualifying import choose_videos
from data.prepare.recipe import Recipe
from data.prepare.stopping import Stopping
from data.prepare.tasks import Tasks
from data.prepare.underway import FinishedError, NoClipsError
from data.prepare.video import Clip
from data.shards.begun import refuse_shards
from data.shards.manifest import REJECTED
from data.shards.origins import key_of
from data.shards.sample import Prompt, Sample
from radial.cli.ranks import Rank

AHEAD = 2  # decoded clips that wait in this process
RATED = 60.0  # seconds of encoding from which it is told how long the rest takes


def prepare(recipe: Recipe, rank: Rank) -> int:
    """Make the folder, or this rank's part of it, or keep the finished one that is there.

    Returns:
        the exit code: 0, or 1 when more than `bad_share` of the files are bad or no clip came out.

    Raises:
        DataError: arguments that do not fit the weights or the folder, or an unusable source.
    """
    family = encoder_class(recipe.family)
    family.check(recipe.frames, recipe.sizes)
    if recipe.image_to_video:
        family.check_image_to_video()
    if recipe.out.exists() and not recipe.out.is_dir():
        raise DataError(f"{recipe.out}: is a file, expected a folder for shards; choose another out=")
    if recipe.upload is not None and Path(recipe.upload.address).resolve() == recipe.out.resolve():
        raise DataError(
            f"upload is {recipe.upload.address}, which is out= itself; leave upload= away to keep the shards there"
        )
    arguments = {**recipe.arguments(), "encoder": fingerprint(recipe.family, recipe.weights, recipe.image_to_video)}
    device = find_device(recipe.device, rank.local)
    while True:
        try:
            # What is wrong with the list is reported before weights are loaded.
            chosen = shared_choice(recipe, rank, arguments)
            encoder = encoder_of(recipe, rank, device)
            records = Journal(recipe.out, chosen, rank, recipe.shard_bytes, recipe.shard_seconds, recipe.upload)
            break
        except NoClipsError:
            _say(rank, f"{recipe.out}: no clip came out; see {REJECTED}")
            return 1
        except FinishedError:
            manifest = revisit(recipe, arguments, lambda line: _say(rank, line))
            if manifest is not None:
                if recipe.upload is not None:
                    recipe.upload.finish(recipe.out)  # a kill may have come before
                return exit_code(recipe, manifest)
    if records.strays:
        some = ", ".join(records.strays[:3]) + (", …" if len(records.strays) > 3 else "")
        _say(rank, f"{recipe.out}: nothing says where {some} are from: they are left as they are, and not counted")
    with Stopping() as stopping:
        try:
            encode_all(recipe, rank, chosen, encoder, records, stopping)
        finally:
            # Whatever ended it: what was encoded stays.
            with stopping.held():
                try:
                    records.flush()
                finally:
                    records.close()
    return finish(recipe, rank, chosen, encoder)


def encoder_of(recipe: Recipe, rank: Rank, device: torch.device) -> Encoder:
    """The recipe's encoder with its weights on the device, which the first rank announces."""
    _say(rank, f"loading {recipe.family} {f'from {recipe.weights} ' if recipe.weights else ''}onto {device}")
    settings = EncoderSettings(recipe.weights, device, recipe.vae_dtype, recipe.text_dtype, recipe.image_to_video)
    return load_encoder(recipe.family, settings)


def shared_choice(recipe: Recipe, rank: Rank, arguments: dict[str, Any]) -> ChosenVideos:
    """The folder's videos; the rank that comes first chooses them, and the others wait for it."""
    underway.check_open(recipe.out)
    with underway.exclusively(recipe.out) as home:
        underway.check_open(recipe.out)
        if recipe.upload is not None:
            recipe.upload.check_writable()
        found = ChosenVideos.load(home)
        if found is None or not (same(found.arguments, arguments) or underway.is_claimed(recipe.out)):
            refuse_shards(recipe.out)
            if recipe.upload is not None:
                recipe.upload.refuse_files()
            recipe.write_captions()  # while the other ranks wait
            found = choose_videos(arguments, recipe.select(), recipe.wanted(), progress=True)
            with naming(home / CHOSEN):
                found.save(home)
    for line in found.told:
        _say(rank, line)
    missing = f", {found.missing} are not on disk" if found.missing else ""
    bad = f"{len(found.rejected)} files are bad"
    _say(rank, f"{len(found.rows)} videos chosen, {found.passed} do not qualify{missing}, {bad}")
    check_same(recipe.out, found.arguments, arguments)
    return found


def encode_all(
    recipe: Recipe, rank: Rank, chosen: ChosenVideos, encoder: Encoder, records: Journal, stopping: Stopping
) -> None:
    """Decode, encode and write this rank's videos that are not done."""
    mine = range(rank.index, len(chosen.rows), rank.world)
    tasks = Tasks(chosen, (row for row in mine if row not in records.done), records.present)
    bar = tqdm(total=sum(map(tasks.expected, tasks.rows)), unit="clip", disable=rank.index != 0, smoothing=0.05)
    bar.set_description(f"encoding (rank 0 of {rank.world})" if rank.world > 1 else "encoding")
    bad = len(chosen.rejected) + records.rejected
    decoders = Decoders(
        tasks,
        recipe.workers,
        fps=recipe.fps,
        frames=recipe.frames,
        sizes=recipe.sizes,
        most=recipe.clips,
        rules=recipe.rules,
    )
    events = prefetch(iter(decoders), AHEAD)
    began, rated = time.monotonic(), False
    try:
        failed: str | None = None
        captioned: int | None = None
        kept = 0
        for event in events:
            bar.set_postfix(bad=bad, refresh=False)
            if isinstance(event, End):
                kept += len(records.present.get(event.row, ()))
                promised = chosen.rows[event.row].clips
                reason = event.reason or failed
                if not (kept or reason or event.left) and promised:
                    reason = f"ends before {recipe.frames} frames"
                elif not (kept or reason or event.left):
                    bar.write(f"too short after all: {chosen.rows[event.row].name}", file=sys.stderr)
                rejected = Rejected(chosen.rows[event.row].name, reason, kept) if reason else None
                with stopping.held():
                    records.finish_row(event.row, rejected, event.left)
                bar.total = (bar.total or 0) + event.clips - tasks.expected(event.row)
                if rejected:
                    bad += 1
                    bar.write(f"bad: {rejected.path}: {reason}", file=sys.stderr)
                failed, kept = None, 0
                continue
            row, clip = event
            try:
                if row != captioned:
                    caption = chosen.rows[row].caption
                    prompt, captioned = encoder.prompt(caption), row
                    records.cut(chosen.rows[row].name, encoder.tokens(caption))
                sample = make_sample(encoder, recipe, chosen, row, clip, prompt)
                with stopping.held():
                    records.write(sample)
                kept += 1
            except torch.OutOfMemoryError as error:
                raise DataError(_too_large(chosen, row, clip, error)) from error
            except DataError as error:
                failed = str(error)
            bar.update()
            seconds = time.monotonic() - began
            if not rated and seconds >= RATED and rank.index == 0:
                rated, left = True, max(0, (bar.total or 0) - bar.n)
                hours = left * seconds / bar.n / 3600
                bar.write(f"{bar.n} clips in {seconds:.0f} s: {left} more take about {hours:.2g} hours")
        bar.set_postfix(bad=bad)
    finally:
        bar.close()
        decoders.close()
        events.close()


def make_sample(encoder: Encoder, recipe: Recipe, chosen: ChosenVideos, row: int, clip: Clip, prompt: Prompt) -> Sample:
    """Encode a clip; `prompt` is its caption's embedding, which all clips of a video share.

    Raises:
        DataError: what came out is no valid sample, a latent with NaN for example.
    """
    video = chosen.rows[row]
    image = encoder.image(clip.frames) if recipe.image_to_video else {}
    frames, height, width = clip.frames.shape[:3]
    meta = {
        "caption": video.caption,
        "source": video.path,
        "clip_start": round(clip.start, 6),
        "fps": recipe.fps,
        "frames": frames,
        "height": height,
        "width": width,
        "encoder": chosen.arguments["encoder"],
    }
    sample = Sample(key_of(row, clip.index), encoder.encode(clip.frames), prompt.text, prompt.pooled, image, meta)
    sample.validate()
    return sample


def _too_large(chosen: ChosenVideos, row: int, clip: Clip, error: Exception) -> str:
    frames, height, width = clip.frames.shape[:3]
    return (
        f"{chosen.path(row)}: the clip at {clip.start:.2f} s, {frames} frames of {height}x{width}, does not fit into "
        f"the device's memory ({str(error).partition('.')[0]}); what is encoded stays. Start again on a device with "
        "more (device=), or choose vae_dtype=bf16, a smaller size= or fewer frames=, and another out="
    )


def _say(rank: Rank, text: str) -> None:
    if rank.index == 0:
        print(text, flush=True)
