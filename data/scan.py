"""Listing tars that lie in a folder without a manifest: what `data.index` and `data.check --rebuild` share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from data.encoders import fingerprint, load_encoder, same_encoder
from data.encoders.base import EncoderSettings, find_device
from data.errors import DataError
from data.shards.entries import Group, groups_of
from data.shards.manifest import EMPTY_PROMPT, FILE, Manifest
from data.shards.sample import Prompt
from data.shards.shard_info import SampleInfo, ShardInfo

Describe = Callable[[Group, BinaryIO], SampleInfo | None]


def check_folder(folder: Path) -> None:
    """Raise a DataError unless this is a folder of this machine without a manifest."""
    if not folder.is_dir():
        raise DataError(f"{folder}: is no folder of this machine; a manifest is made where the shards lie")
    if (folder / FILE).exists():
        raise DataError(
            f"{folder / FILE}: is there; a manifest is made for a folder without one, move it away if it is wrong"
        )


def list_shards(
    folder: Path, names: Sequence[str], describe: Describe, progress: bool = False
) -> tuple[list[ShardInfo], list[str]]:
    """The shards of a folder that are whole, and what is wrong with the others.

    Args:
        folder: of the tars.
        names: of the tars in it.
        describe: gets a group of entries and the open tar, and gives the sample's place in it, or None to leave it out;
            a DataError leaves out the whole tar.
        progress: show a progress bar on stderr.

    Raises:
        DataError: no tar is whole, or a key comes twice.
    """
    shards: list[ShardInfo] = []
    problems: list[str] = []
    where: dict[str, str] = {}
    total = sum((folder / name).stat().st_size for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=not progress) as bar:
        for name in names:
            try:
                shard = _list_shard(folder / name, describe)
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
            bar.update((folder / name).stat().st_size)
    return shards, problems


def _list_shard(path: Path, describe: Describe) -> ShardInfo:
    """A shard with its samples, its size and its SHA-256.

    Raises:
        DataError: naming the file: it is no tar, ends early, holds no sample, or what `describe` raises.
    """
    with path.open("rb") as file:
        try:
            samples = [info for group in groups_of(path) if (info := describe(group, file)) is not None]
        except DataError as error:
            raise DataError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not samples:
        raise DataError(f"{path}: holds no sample")
    return ShardInfo(path.name, tuple(samples), path.stat().st_size, digest)


def content_of(file: BinaryIO, start: int, end: int) -> Tensor:
    """The bytes of a file from `start` to before `end`, uint8."""
    file.seek(start)
    return torch.frombuffer(bytearray(file.read(end - start)), dtype=torch.uint8)


def empty_prompt_of(folder: Path, family: str, encoder: str, weights: Path | None, device: str | None) -> Prompt:
    """The empty prompt beside the shards, or one encoded anew by the weights that made them.

    Raises:
        DataError: it is missing, and the weights are not given, cannot be loaded, or are others than `encoder`.
    """
    if (folder / EMPTY_PROMPT).exists():
        return Manifest((), 1.0, encoder, "", "", {}, home=str(folder)).load_empty_prompt()
    try:
        mine = fingerprint(family, weights, "+image-" in encoder)
    except DataError as error:
        raise DataError(f"{folder / EMPTY_PROMPT}: is missing, and has to be encoded anew: {error}") from error
    if not same_encoder(encoder, mine):
        raise DataError(f"{folder}: its samples were made with {encoder}, but weights={weights} are {mine}")
    return load_encoder(family, EncoderSettings(weights, find_device(device), torch.float32, torch.bfloat16)).prompt("")
