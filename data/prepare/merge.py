"""The end of a run: all ranks' records become the manifest, and what came out is printed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict

from data.encoders.base import Encoder
from data.errors import naming
from data.io.files import write_bytes
from data.prepare import underway
from data.prepare.chosen import ChosenVideos, Rejected
from data.prepare.clip_rules import REASONS
from data.prepare.recipe import Recipe
from data.prepare.records import Cut, check_unique, read_records
from data.prepare.underway import FinishedError
from data.shards.manifest import REJECTED, Manifest
from data.shards.origins import LIST
from data.shards.writer import finish_folder, remove_leftovers
from radial.cli.ranks import Rank


def finish(recipe: Recipe, rank: Rank, chosen: ChosenVideos, encoder: Encoder) -> int:
    """Merge all ranks' records into the manifest once every video is done; the last rank to end does."""
    try:
        with underway.exclusively(recipe.out):
            underway.check_begun(recipe.out)
            try:
                return merge(recipe, rank, chosen, encoder)
            except FileNotFoundError:
                underway.check_begun(recipe.out)  # where there are no locks another rank may merge at the same time
                raise
    except FinishedError:
        return 0  # another rank has merged


def merge(recipe: Recipe, rank: Rank, chosen: ChosenVideos, encoder: Encoder) -> int:
    """Make the manifest of all ranks' records; returns the exit code."""
    records = read_records(recipe.out)
    underway.check_begun(recipe.out)  # of a journal that is being removed some records may be gone
    if len(records.done) < len(chosen.rows):
        left = len(chosen.rows) - len(records.done)
        print(f"rank {rank.index} is done, {left} videos are left to the others", flush=True)
        return 0
    shards = records.shards
    check_unique(recipe.out, shards)
    remove_leftovers(recipe.out)
    rejected = chosen.rejected + sorted(records.rejected, key=lambda entry: entry.path)
    with naming(recipe.out / REJECTED):
        write_bytes(recipe.out / REJECTED, "".join(json.dumps(asdict(entry)) + "\n" for entry in rejected).encode())
    files = len(chosen.rows) + len(chosen.rejected)
    if not shards:
        underway.remove(recipe.out)
        print(_nothing(recipe, chosen, rejected, records.left), file=sys.stderr)
        return 1
    manifest = Manifest(
        shards=tuple(shards),
        fps=recipe.fps,
        encoder=chosen.arguments["encoder"],
        latent=encoder.latent_is,
        text=encoder.text_is,
        arguments={name: value for name, value in chosen.arguments.items() if name != "encoder"},
        videos=files,
        rejected=len(rejected),
    )
    with naming(recipe.out / LIST):
        chosen.save(recipe.out, LIST)
    finish_folder(recipe.out, manifest, encoder.prompt(""))
    if recipe.upload is not None:
        recipe.upload.finish(recipe.out)
    underway.remove(recipe.out)
    there = recipe.out if recipe.upload is None else recipe.upload.address
    print(
        f"{there}: {len(manifest.samples)} clips in {len(shards)} shards from "
        f"{len(chosen.rows)} videos, {len(rejected)} bad files"
    )
    for line in [*_left(records.left), *_cuts(records.cut)]:
        print(line)
    return exit_code(recipe, manifest)


def _nothing(recipe: Recipe, chosen: ChosenVideos, rejected: list[Rejected], left: Counter[str]) -> str:
    """Why no clip came out."""
    if rejected:
        bad = f"{len(rejected)} files are bad" if left else f"all {len(rejected)} files are bad"
        why = f"{bad}, such as {rejected[0]}"
    else:
        why = f"of {len(chosen.rows)} videos"
    passed = f"; {chosen.passed} more did not qualify" if chosen.passed else ""
    return f"{recipe.out}: no clip came out, {'; '.join([why, *_left(left)])}{passed}; see {REJECTED}"


def _left(left: Counter[str]) -> list[str]:
    """How much of the videos is left out, a line a reason."""
    return [f"left out: {left[reason]} {words}" for reason, words in REASONS.items() if left[reason]]


def _cuts(cut: list[Cut]) -> list[str]:
    """How many captions each text encoder cut, and the longest; none where none was cut."""
    lines = []
    for encoder in sorted({entry.encoder for entry in cut}):
        longest = {entry.path: entry for entry in cut if entry.encoder == encoder}
        most = max(longest.values(), key=lambda entry: entry.tokens)
        lines.append(
            f"{len(longest)} captions are longer than the {most.used} tokens that {encoder} takes, and are cut there; "
            f"the longest is that of {most.path}, {most.tokens} tokens"
        )
    return lines


def exit_code(recipe: Recipe, manifest: Manifest) -> int:
    """The exit code: 1 where more than `bad_share` of the files are bad."""
    share = (manifest.rejected or 0) / (manifest.videos or 1)
    if share <= recipe.bad_share:
        return 0
    print(
        f"{recipe.out}: {share:.1%} of the files are bad, more than bad_share={recipe.bad_share:g}; see {REJECTED}",
        file=sys.stderr,
    )
    return 1
