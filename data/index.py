"""A manifest for tars that somebody else wrote: `python -m data.index SHARDS`.

The tars stay as they are. The manifest records which entries hold which fields and where they lie, so that training
reads each sample's entries straight from the tars, as it does with its own. That is why no new shards are written: a
copy of terabytes would gain nothing but a few milliseconds a sample, which is what opening a .npy or .pth takes more
than a .safetensors file, whose tensors are views of what was read.

Every sample is read and held to the schema and to what the family's encoders make. Those that do not fit are listed,
one line each, and left out; the exit code is then 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data.encoders import FAMILIES, encoder_class, fingerprint
from data.errors import DataError, explained
from data.scan import check_folder, content_of, empty_prompt_of, list_shards
from data.shards.entries import Group, groups_of
from data.shards.entry_map import EntryMap, check_family
from data.shards.manifest import FILE, Manifest, check_fps
from data.shards.sample import Prompt
from data.shards.shard_info import SampleInfo
from data.shards.writer import finish_folder
from radial.cli.command import Command
from radial.cli.settings import setting

MADE_BY = "data.index"


@dataclass
class Arguments:
    """The keys of the command line."""

    shards: Path = setting("folder of the tars; the manifest is written into it")
    family: str = setting("the model that latents and text were made for", choices=tuple(FAMILIES))
    weights: Path | None = setting(
        "the diffusers folder whose VAE and text encoders made them; not needed for pixels", None
    )
    map: str | None = setting(
        "where each field lies, FIELD:ENTRY,...; ENTRY#NAME of several; null: entries are named after the fields", None
    )
    fps: float | None = setting("frames a second of the clips; null: the family's", None)
    device: str | None = setting("where the empty prompt is encoded; null: a GPU where there is one", None)


@dataclass
class Indexed:
    """What came out: the manifest, and what is wrong with the samples and tars that are not in it."""

    manifest: Manifest
    problems: list[str] = field(default_factory=list)


def index(
    folder: Path,
    family: str,
    weights: Path | None,
    given: EntryMap | None,
    fps: float | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Indexed:
    """Write the manifest of the samples of a folder of tars that fit the family.

    Args:
        folder: of the tars, on this machine.
        family: a key of `data.encoders.FAMILIES`.
        weights: the diffusers folder that made latents and text: what the manifest names as their encoder, and what
            the empty prompt is encoded with, unless an `empty_prompt.safetensors` lies beside the tars.
        given: where each field lies; None guesses it from the entries' names.
        fps: pace of the clips; None: the family's.
        device: where the empty prompt is encoded.
        progress: show a progress bar on stderr.

    Raises:
        DataError: the folder has a manifest or no tar, weights are missing, the map does not fit, no sample fits, or a
            key comes twice.
    """
    check_folder(folder)
    names = sorted(path.name for path in folder.glob("*.tar"))
    if not names:
        packed = sorted(path.name for path in folder.glob("*.tar.*"))
        hint = f"; unpack {packed[0]} and the like, a compressed tar is only read from its start" if packed else ""
        raise DataError(f"{folder}: holds no *.tar, nothing to make a manifest of{hint}")
    kind = encoder_class(family)
    channels = kind.latent_channels(weights)
    fps = kind.facts.fps if fps is None else fps
    check_fps(fps)
    encoder = fingerprint(family, weights)
    prompt = empty_prompt_of(folder, family, encoder, weights, device)
    entries = given or _guess(folder, names, prompt)
    if any(place.startswith("image.") for place in entries.places):
        encoder = fingerprint(family, weights, image_to_video=True)
    left_out: list[str] = []

    def describe(group: Group, file: BinaryIO) -> SampleInfo | None:
        try:
            return _sample(group, file, entries, prompt, channels)
        except DataError as error:
            left_out.append(f"{file.name}: {error}")
            return None

    shards, problems = list_shards(folder, names, describe, progress)
    if not shards:
        first = (left_out or problems)[0]
        raise DataError(f"{folder}: no sample of its {len(names)} tars fits family={family}; the first: {first}")
    about = {"made_by": MADE_BY, "family": family}
    manifest = Manifest(tuple(shards), fps, encoder, kind.latent_is, kind.text_is, about, map=entries)
    finish_folder(folder, manifest, prompt)
    return Indexed(Manifest.load(folder), left_out + problems)


def _guess(folder: Path, names: Sequence[str], prompt: Prompt) -> EntryMap:
    """The map by the names of the entries of the first tar that can be read."""
    for name in names:
        try:
            found = {entry.name: None for group in groups_of(folder / name) for entry in group.entries}
        except DataError:
            continue
        return EntryMap.guess(found, prompt)
    raise DataError(f"{folder}: none of its {len(names)} tars can be read")


def _sample(group: Group, file: BinaryIO, entries: EntryMap, prompt: Prompt, channels: int) -> SampleInfo:
    """A sample's place in its tar: from its first entry that holds a field to the end of the last.

    Raises:
        DataError: an entry is missing, cannot be read, or does not fit schema or family.
    """
    wanted = [entry for entry in group.entries if entry.name in entries.entries]
    if not wanted:
        raise DataError(f"sample {group.key}: {', '.join(sorted(entries.entries))} are missing from its tar")
    start, end = min(entry.first for entry in wanted), max(entry.last for entry in wanted)
    content = content_of(file, start, end)
    parts = tuple((entry.name, entry.first - start, entry.last - entry.first) for entry in wanted)
    sample = entries.sample(group.key, {name: content[first : first + size] for name, first, size in parts})
    check_family(sample, prompt, channels)
    channels, frames, height, width = sample.latent.shape
    crc32 = zlib.crc32(content.numpy().data)
    return SampleInfo(group.key, (channels, frames, height, width), start, end - start, crc32, parts)


def make(given: Arguments) -> int:
    """Make the manifest, print what was left out; returns 1 when something was."""
    entries = None if given.map is None else EntryMap.parse(given.map)
    found = index(given.shards, given.family, given.weights, entries, given.fps, given.device, progress=True)
    manifest = found.manifest
    assert manifest.map is not None
    for problem in found.problems:
        print(f"left out: {problem}")
    for name, place in manifest.map.places.items():
        print(f"  {name:<20} {place}")
    kept = f"{len(manifest.samples)} samples in {len(manifest.shards)} tars"
    print(f"{given.shards / FILE}: a manifest of {kept}, {len(found.problems)} left out")
    return 1 if found.problems else 0


main = Command(
    "python -m data.index",
    "Makes a manifest for tars that somebody else wrote, so that training reads them as they are. Names every sample "
    "that lacks something or does not fit the family, and leaves it out; the exit code is then 1.",
    Arguments,
    make,
    [
        "python -m data.index shards/theirs family=wan weights=weights/wan_14b",
        "python -m data.index shards/theirs family=hunyuan weights=weights/hunyuan \\",
        "    map='latent:vae.pth,text.text:llama.safetensors#tokens,pooled.clip:clip.npy,caption:json#title'",
    ],
    positional="shards",
    explain=explained,
)

if __name__ == "__main__":
    main.run()
