"""A manifest from the tars themselves, for a folder that has lost its own: `python -m data.check SHARDS --rebuild`.

Every sample is read, decoded and held to the schema on the way. What the tars do not hold, the empty prompt, is the one
that still lies beside them, or is encoded anew. Tars that were not made here are `data.index`'s.
"""

from __future__ import annotations

import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data.encoders import encoder_class, family_of
from data.errors import DataError
from data.prepare.records import FOLDER
from data.scan import check_folder, content_of, empty_prompt_of, list_shards
from data.shards.begun import shards_in
from data.shards.entries import Group
from data.shards.manifest import Manifest
from data.shards.sample import Sample
from data.shards.shard_info import SampleInfo
from data.shards.writer import PARTS, finish_folder

MADE_BY = "data.check --rebuild"


@dataclass
class Rebuilt:
    """What came out: the manifest, and what is wrong with the tars that are not in it."""

    manifest: Manifest
    problems: list[str] = field(default_factory=list)


def rebuild(folder: Path, weights: Path | None, device: str | None, progress: bool = False) -> Rebuilt:
    """Write the manifest of all tars in a folder that are whole; the others are named and left out.

    Args:
        folder: of shards, on this machine.
        weights, device: for the empty prompt where it is missing, as in `data.check`; None needs none.
        progress: show a progress bar on stderr.

    Raises:
        DataError: the folder has a manifest or a journal, no tar is whole, samples are of several encoders or paces, a
            key comes twice, or the empty prompt is missing and cannot be made.
    """
    check_folder(folder)
    if (folder / FOLDER / "plan.json").exists():
        raise DataError(f"{folder}: is not finished; start data.prepare again with the command that began it")
    names = shards_in(folder)
    if not names:
        raise DataError(f"{folder}: holds no shard-*.tar, nothing to make a manifest of")
    makes: dict[str, tuple[str, float]] = {}

    def describe(group: Group, file: BinaryIO) -> SampleInfo:
        info, makes[group.key] = _sample(group, file)
        return info

    shards, problems = list_shards(folder, names, describe, progress)
    if not shards:
        raise DataError(f"{folder}: none of its {len(names)} shards is whole: {problems[0]}")
    abouts = Counter(makes[sample.key] for shard in shards for sample in shard.samples)
    if len(abouts) > 1:
        some = ", ".join(f"{count} of {encoder} at {fps:g} fps" for (encoder, fps), count in abouts.items())
        raise DataError(f"{folder}: its samples are of several makes, {some}; move those that do not belong there away")
    ((encoder, fps),) = abouts
    try:
        family = family_of(encoder)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error
    kind = encoder_class(family)
    prompt = empty_prompt_of(folder, family, encoder, weights, device)
    manifest = Manifest(tuple(shards), fps, encoder, kind.latent_is, kind.text_is, {"made_by": MADE_BY})
    finish_folder(folder, manifest, prompt)
    return Rebuilt(Manifest.load(folder), problems)


def _sample(group: Group, file: BinaryIO) -> tuple[SampleInfo, tuple[str, float]]:
    """A sample's place in its tar, and the encoder and pace that it was made with.

    Raises:
        DataError: its entries are not those of `ShardWriter`, or it is not valid.
    """
    if sorted(entry.name for entry in group.entries) != sorted(PARTS):
        found = ", ".join(f"{group.key}.{entry.name}" for entry in group.entries)
        raise DataError(f"found {found}, expected the two files of a sample; tars of others are for data.index")
    start = group.entries[0].start
    # A tar's entries end at whole blocks, and the reader takes headers and padding along.
    end = start + -(-(group.entries[-1].last - start) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    content = content_of(file, start, end)
    if len(content) < end - start:
        raise DataError(f"ends before its sample {group.key} does; copy it again")
    parts = {entry.name: content[entry.first - start : entry.last - start] for entry in group.entries}
    sample = Sample.from_entry({"__key__": group.key, **parts})
    encoder, fps = sample.meta.get("encoder"), sample.meta.get("fps")
    if not isinstance(encoder, str) or not isinstance(fps, int | float):
        raise DataError(f"sample {sample.key} does not name its encoder and fps, as those of data.prepare do")
    channels, frames, height, width = sample.latent.shape
    crc32 = zlib.crc32(content.numpy().data)
    info = SampleInfo(sample.key, (channels, frames, height, width), start, end - start, crc32)
    return info, (encoder, float(fps))
