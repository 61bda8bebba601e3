"""A manifest from the tars themselves, for a folder that has lost its own: `python -m data.check SHARDS --rebuild`.

Every sample is read, decoded and held to the schema on the way. What the tars do not tell, the empty prompt, is the one
that still lies beside them, or is encoded anew.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from data.encoders import FAMILIES, encoder_class, fingerprint, load_encoder, same_encoder
from data.encoders.base import EncoderSettings, find_device
from data.encoders.pixels import LATENTS
from data.errors import DataError
from data.prepare.records import FOLDER
from data.shards.begun import shards_in
from data.shards.manifest import EMPTY_PROMPT, FILE, Manifest, SampleInfo, ShardInfo
from data.shards.sample import Prompt, Sample
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
    names = _names(folder)
    shards: list[ShardInfo] = []
    problems: list[str] = []
    abouts: Counter[tuple[str, float]] = Counter()
    where: dict[str, str] = {}
    total = sum((folder / name).stat().st_size for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=not progress) as bar:
        for name in names:
            try:
                shard, found = _read(folder / name)
            except DataError as error:
                problems.append(str(error))
            else:
                for key in (sample.key for sample in shard.samples):
                    if key in where:
                        raise DataError(
                            f"{folder}: sample {key} is in {where[key]} and in {name}; move one of them away"
                        )
                    where[key] = name
                shards.append(shard)
                abouts.update(found)
            bar.update((folder / name).stat().st_size)
    if not shards:
        raise DataError(f"{folder}: none of its {len(names)} shards is whole: {problems[0]}")
    if len(abouts) > 1:
        some = ", ".join(f"{count} of {encoder} at {fps:g} fps" for (encoder, fps), count in abouts.items())
        raise DataError(f"{folder}: its samples are of several makes, {some}; move those that do not belong there away")
    ((encoder, fps),) = abouts
    family = "pixels" if encoder.partition("+")[0] == LATENTS else encoder.partition(":")[0]
    if family not in FAMILIES:
        raise DataError(f"{folder}: its samples were made with {encoder}, which is none of {', '.join(FAMILIES)}")
    kind = encoder_class(family)
    prompt = _empty_prompt(folder, family, encoder, weights, device)
    manifest = Manifest(tuple(shards), fps, encoder, kind.latent_is, kind.text_is, {"made_by": MADE_BY})
    finish_folder(folder, manifest, prompt)
    return Rebuilt(Manifest.load(folder), problems)


def _names(folder: Path) -> list[str]:
    """The tars of a folder whose manifest is lost."""
    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder of this machine; a manifest is made where the shards lie")
    if (folder / FILE).exists():
        raise DataError(
            f"{folder / FILE}: is there; --rebuild is for a folder without one, move it away if it is wrong"
        )
    if (folder / FOLDER / "plan.json").exists():
        raise DataError(f"{folder}: is not finished; start data.prepare again with the command that began it")
    names = shards_in(folder)
    if not names:
        raise DataError(f"{folder}: holds no shard-*.tar, nothing to make a manifest of")
    return names


def _read(path: Path) -> tuple[ShardInfo, Counter[tuple[str, float]]]:
    """A shard, and how many of its samples say to be of which encoder and pace.

    Raises:
        DataError: naming the file: it is no tar, ends early, or a sample is not valid.
    """
    samples: list[SampleInfo] = []
    abouts: Counter[tuple[str, float]] = Counter()
    try:
        with path.open("rb") as file:
            for key, start, end, parts in _entries(path):
                file.seek(start)
                content = torch.frombuffer(bytearray(file.read(end - start)), dtype=torch.uint8)
                entry = {part: content[first - start : last - start] for part, (first, last) in parts.items()}
                sample = Sample.from_entry({"__key__": key, **entry})
                channels, frames, height, width = sample.latent.shape
                crc32 = zlib.crc32(content.numpy().data)
                samples.append(SampleInfo(key, (channels, frames, height, width), start, end - start, crc32))
                encoder, fps = sample.meta.get("encoder"), sample.meta.get("fps")
                if not isinstance(encoder, str) or not isinstance(fps, int | float):
                    raise DataError(f"sample {key} does not tell its encoder and fps, as those of data.prepare do")
                abouts[encoder, float(fps)] += 1
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except tarfile.TarError as error:
        raise DataError(f"{path}: is no whole tar ({error}); copy it again") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if not samples:
        raise DataError(f"{path}: holds no sample")
    return ShardInfo(path.name, tuple(samples), path.stat().st_size, digest), abouts


def _entries(path: Path) -> Iterator[tuple[str, int, int, dict[str, tuple[int, int]]]]:
    """Each sample's key, where its entries begin and end, headers included, and where the content of each part does."""
    with tarfile.open(path, "r:") as tar:
        members = list(tar)
    size = path.stat().st_size
    for pair in zip(members[::2], members[1::2], strict=False):
        places = {m.name.partition(".")[2]: (m.offset_data, m.offset_data + m.size) for m in pair}
        keys = {m.name.partition(".")[0] for m in pair}
        if len(keys) != 1 or sorted(places) != sorted(PARTS):
            raise DataError(f"found {pair[0].name} and {pair[1].name}, expected the two files of a sample")
        end = pair[1].offset_data + -(-pair[1].size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if end > size:
            raise DataError(f"ends before its sample {keys.pop()} does; copy it again")
        yield keys.pop(), pair[0].offset, end, places
    if len(members) % 2:
        raise DataError(f"ends with {members[-1].name} alone; copy it again")


def _empty_prompt(folder: Path, family: str, encoder: str, weights: Path | None, device: str | None) -> Prompt:
    """The one beside the shards, or one encoded anew by the weights that made them."""
    if (folder / EMPTY_PROMPT).exists():
        home = Manifest((), 1.0, encoder, "", "", {}, home=str(folder))
        return home.load_empty_prompt()
    try:
        mine = fingerprint(family, weights, "+image-" in encoder)
    except DataError as error:
        raise DataError(f"{folder / EMPTY_PROMPT}: is missing, and has to be encoded anew: {error}") from error
    if not same_encoder(encoder, mine):
        raise DataError(f"{folder}: its samples were made with {encoder}, but weights={weights} are {mine}")
    return load_encoder(family, EncoderSettings(weights, find_device(device), torch.float32, torch.bfloat16)).prompt("")
