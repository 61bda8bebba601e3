"""A folder that is finished, and the same command again: what differs, and appending what was added to the list."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.prepare import underway
from data.prepare.arguments import check_same
from data.prepare.chosen import ChosenVideos, Rejected
from data.prepare.listed import NoVideosError
from data.prepare.qualifying import choose_videos
from data.prepare.recipe import Recipe
from data.prepare.rows import Row, Rows
from data.shards.manifest import REJECTED, Manifest
from data.shards.origins import LIST, numbers_of


def revisit(recipe: Recipe, arguments: Mapping[str, Any], say: Callable[[str], None]) -> Manifest | None:
    """The manifest of a finished folder that holds what is asked for, or None: it is under way again.

    Videos that were added to the list since are put behind those that were chosen, and the folder's manifest is
    taken away until they are there too. Clips of videos that have gone from the list stay.

    Args:
        recipe: what is asked for.
        arguments: of the recipe, with the encoder's fingerprint.
        say: called with each line of what differs.

    Raises:
        DataError: other arguments, changed captions, more videos than `top` allows, or more in a read-only folder.
    """
    out, writable = recipe.out, os.access(recipe.out, os.W_OK)
    with underway.exclusively(out) if writable else contextlib.nullcontext():
        manifest = underway.manifest_of(out)
        if manifest is None:
            return None  # another rank has reopened it
        found = {"decoding": 1, **manifest.arguments, "encoder": manifest.encoder}
        # an earlier decoding is no fault of a folder that stays as it is
        check_same(out, found, {**arguments, "decoding": found["decoding"]})
        there = f"{out}: {len(manifest.samples)} clips in {len(manifest.shards)} shards, already there"
        before = ChosenVideos.load(out, LIST)
        now, why = _list_now(recipe, before)
        if before is None or now is None:
            say(f"{there}; it was not compared with the list of videos, as {why}")
            underway.remove(out)
            return manifest
        added, changed, gone = _differences(before, now, manifest)
        _check_appendable(recipe, before, added, changed, gone)
        if not added:
            note = f"; {len(gone)} of its videos are no longer listed, such as {gone[0]}" if gone else ""
            say(f"{there}{note}")
            underway.remove(out)
            return manifest
        check_same(out, found, arguments)
        if not writable:
            raise DataError(
                f"{there}, but {_some([row.name for row in added])} added to the list and it is read-only; make it "
                "writable to append, or give the list as it was"
            )
        say(
            f"{there}; {_some([row.name for row in added])} added to the list: appending, without a manifest until then"
        )
        known = {row.name for row in before.rows}
        late = [entry for entry in _rejected(out) if entry.path in known]
        chosen = replace(now, rows=Rows(itertools.chain(before.rows, added)))
        underway.reopen(out, chosen, manifest, len(before.rows), late)
        return None


def _list_now(recipe: Recipe, before: ChosenVideos | None) -> tuple[ChosenVideos | None, str]:
    """What is chosen of today's list, or None and why there is none to compare with."""
    source = recipe.selection["source"]
    if before is None:
        return None, f"it has no {LIST}"
    if not source.exists():
        return None, f"{source} is gone"
    try:
        recipe.write_captions()
        return choose_videos(before.arguments, recipe.select(), recipe.wanted(), before=before, progress=True), ""
    except NoVideosError as error:  # which are needed no more
        return None, str(error)


def _differences(before: ChosenVideos, now: ChosenVideos, manifest: Manifest) -> tuple[list[Row], list[str], list[str]]:
    """Added rows, the paths of those whose clips have another caption, and of those that are no longer chosen."""
    old, new = ({row.name: row for row in chosen.rows} for chosen in (before, now))
    added = [row for path, row in new.items() if path not in old]
    # Of a video that no clip came from no caption was encoded, and data.recaption gives it none.
    encoded = {numbers[0] for sample in manifest.samples if (numbers := numbers_of(sample.key)) is not None}
    captions = {row.name: row.caption for number, row in enumerate(before.rows) if number in encoded}
    changed = [path for path, caption in captions.items() if path in new and new[path].caption != caption]
    return added, changed, [path for path in old if path not in new]


def _check_appendable(
    recipe: Recipe, before: ChosenVideos, added: list[Row], changed: list[str], gone: list[str]
) -> None:
    """Raise a DataError where the folder cannot become what is asked for by appending."""
    differs = []
    if changed:
        differs.append(f"{_some(changed, 'has', 'have')} another caption now")
    top = recipe.selection["top"]
    full = top is not None and len(before.rows) + len(added) > top
    if added and (changed or full):
        differs.append(f"{_some([row.name for row in added])} added to the list")
    if full and added and gone:
        differs.append(f"{_some(gone)} displaced by them from the best {top}")
    if differs:
        raise DataError(
            f"{recipe.out}: is finished, but {', '.join(differs)}; what is encoded stays as it is: choose another out= "
            "to make the clips anew, or give the list as it was"
        )


def _some(paths: list[str], one: str = "was", more: str = "were") -> str:
    return f"1 video ({paths[0]}) {one}" if len(paths) == 1 else f"{len(paths)} videos (such as {paths[0]}) {more}"


def _rejected(out: Path) -> list[Rejected]:
    """The bad files that a finished folder lists."""
    try:
        text = (out / REJECTED).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [Rejected(**json.loads(line)) for line in text.split("\n") if line]
