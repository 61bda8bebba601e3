"""What a run reads from outside of its folder: fingerprints in ``inputs.json``, so that a resume notices other files.

    shards    the manifest's list of samples, with each shard's SHA-256, the encoder, and the empty prompt
    weights   of the base model: its config.json; names, sizes and headers of its files, and 4 KiB from the middle of
              each tensor: reading all of them would take minutes
    masks     the file of ``attention.masks``, whole
    lora      the files of ``lora.init``, whole; read only as long as the run has no checkpoint

Names of folders are no part of a fingerprint: what was moved is the same. Synthetic clips and random weights follow
from the run's settings and have none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from data.io.files import write_utf8
from data.io.remote import read_all
from data.shards.manifest import EMPTY_PROMPT, Manifest, locate
from radial import Fitted
from train.config.schema import ModelConfig, RunConfig
from train.errors import UserError
from train.lora.initial import initial_files
from train.lora.reading import find_file
from train.models.folders import model_folder, read_json

FILE = "inputs.json"
_SAMPLE = 4096  # bytes of a tensor
_KEYS = {"shards": "data.shards", "weights": "model.path", "masks": "attention.masks", "lora": "lora.init"}


def hold_inputs(
    config: RunConfig, folder: Path, shards: Manifest | None, *, accept: bool = False, write: bool = True
) -> list[str]:
    """Compares what a run reads with what it has read since its start; what was not noted yet is noted now.

    Args:
        config: the run's, without ``lora.init`` once it has checkpoints.
        folder: the run's.
        shards: to train on; None for synthetic ones.
        accept: other inputs take the place of the old ones.
        write: whether this process notes anything; of several only the first does.

    Returns:
        A line for each input that was replaced and accepted.

    Raises:
        UserError: inputs were replaced, and not accepted.
    """
    file = folder / FILE
    known = read_json(file) if file.is_file() else {}
    found = fingerprints(config, shards)
    other = [
        f"{_KEYS[name]} was {known[name]}, now {said}" for name, said in found.items() if known.get(name, said) != said
    ]
    if other and not accept:
        raise UserError(
            f"{'; '.join(other)}: it was replaced since the run was started. Put the old one back, or add "
            "override=true to go on with the new one"
        )
    if write and known | found != known:
        write_utf8(file, json.dumps(known | found, indent=1) + "\n")
    return other


def fingerprints(config: RunConfig, shards: Manifest | None) -> dict[str, str]:
    """What a run reads, by the names of the module text; without what follows from its settings."""
    now = {
        "shards": _of_shards(shards) if config.data.shards is not None and shards is not None else None,
        "weights": _of_model(config.model),
        "masks": _of_masks(config),
        "lora": None if config.lora is None else _of_lora(config.lora.init, config.model),
    }
    return {name: said for name, said in now.items() if said is not None}


def check_masks(config: RunConfig, folder: Path) -> None:
    """Raises where ``attention.masks`` is another file than the one that a run has trained under.

    Raises:
        UserError: it was replaced.
    """
    file, now = folder / FILE, _of_masks(config)
    was = read_json(file).get("masks", now) if file.is_file() else now
    if was != now:
        raise UserError(f"attention.masks {config.attention.masks} is {now}, the run trained under {was}: put it back")


def _of_masks(config: RunConfig) -> str | None:
    pattern = config.pattern()
    return pattern.masks.digest if isinstance(pattern, Fitted) else None


def _of_shards(shards: Manifest) -> str:
    listed = [shards.encoder, shards.fps, [shard.to_json() for shard in shards.shards]]
    digest = hashlib.sha256(json.dumps(listed).encode())
    digest.update(read_all(locate(shards.home, EMPTY_PROMPT)))
    return f"{len(shards.samples)} samples in {len(shards.shards)} shards ({digest.hexdigest()[:16]})"


def _of_model(config: ModelConfig) -> str | None:
    """None for random weights, and for those of the hub before they are here."""
    if config.architecture is not None:
        return None
    digest, size, count = hashlib.sha256(), 0, 0
    for expert in ("high", "low") if config.expert == "both" else (config.expert,):
        place = _weights_folder(dataclasses.replace(config, expert=expert))
        if place is None:
            return None
        about = {key: value for key, value in read_json(place / "config.json").items() if not key.startswith("_")}
        digest.update(json.dumps(about, sort_keys=True).encode())
        for file in sorted(place.glob("*.safetensors")):
            count, size = count + 1, size + file.stat().st_size
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            for part in _telling_parts(file):
                digest.update(part)
    return f"{count} files of {size} bytes ({digest.hexdigest()[:16]})"


def _weights_folder(config: ModelConfig) -> Path | None:
    path, subfolder = model_folder(config)
    if config.path is not None and config.path.startswith("hub:"):
        try:
            path = snapshot_download(path, local_files_only=True)
        except LocalEntryNotFoundError:
            return None
    place = Path(path) / (subfolder or "")
    return place if (place / "config.json").is_file() else None


def _telling_parts(file: Path) -> Iterator[bytes]:
    """A safetensors file's header, and some bytes of each of its tensors.

    Raises:
        UserError: it is none.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(min(length, file.stat().st_size))
            yield header
            tensors: dict[str, Any] = json.loads(header)
            for name, about in sorted(tensors.items()):
                if name != "__metadata__":
                    start, end = about["data_offsets"]
                    stream.seek(8 + length + max(start, (start + end - _SAMPLE) // 2))
                    yield stream.read(min(_SAMPLE, end - start))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): download it again") from error


def _of_lora(init: str | None, model: ModelConfig) -> str | None:
    if init is None:
        return None
    contents = [find_file(path)[0].read_bytes() for path, _ in initial_files(init, model)]
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents))
    return f"{len(contents)} files of {sum(map(len, contents))} bytes ({digest.hexdigest()[:16]})"
