"""What identifies a model's parts on disk, and loading them with errors that say what is wrong."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data.errors import DataError

_VOCABULARY = (".json", ".txt", ".model")  # of a tokenizer
SLICE = 4096  # bytes at the start, middle and end of each tensor that enter a fingerprint


def fingerprint_of(
    folder: Path, parts: Mapping[str, tuple[str, ...]], *, chat_template: bool = False
) -> dict[str, str]:
    """Twelve hexadecimal digits for each kind of part, equal where its files mean the same.

    Each kind of part is hashed over its configs and vocabularies, and over name, dtype, shape and three slices of each
    tensor: a second instead of the minutes that tens of gigabytes take. How weights are split into files does not
    matter.

    Args:
        folder: the diffusers folder.
        parts: kind -> the folder's subfolders, as `Encoder.parts`.
        chat_template: captions go through the tokenizers' own template.

    Raises:
        DataError: a subfolder is missing, or has no weights or damaged ones.
    """
    names = {}
    for kind, subfolders in parts.items():
        digest = hashlib.sha256()
        for subfolder in subfolders:
            _hash_part(folder / subfolder, digest, (*_VOCABULARY, ".jinja") if chat_template else _VOCABULARY)
        names[kind] = digest.hexdigest()[:12]
    return names


def count_numbers(folder: Path, parts: tuple[str, ...], left_out: str | None = None) -> int:
    """How many numbers the weights of some subfolders hold, by the headers of their files.

    Args:
        left_out: regular expression of the names of tensors that do not count.

    Raises:
        DataError: a subfolder has no weights, or damaged ones.
    """
    found = [_tensors(folder / part) for part in parts if not _without_weights(part)]
    counted = (e for each in found for n, (_, e, _) in each.items() if not left_out or not re.fullmatch(left_out, n))
    return sum(math.prod(entry["shape"]) for entry in counted)


def _without_weights(part: str) -> bool:
    return any(kind in part for kind in ("tokenizer", "processor", "extractor"))


def _hash_part(folder: Path, digest: Any, vocabulary: tuple[str, ...]) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder}: missing, expected this part of a diffusers model folder")
    if _without_weights(folder.name):
        for path in sorted(folder.iterdir()):
            if path.suffix in vocabulary:
                digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return
    config = read_config(folder)
    # What versions of libraries write of themselves, and what a loader was asked for, changes no output.
    idle = ("transformers_version", "dtype", "torch_dtype")
    kept = {name: value for name, value in config.items() if name[0] != "_" and name not in idle}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for name, (path, entry, start) in sorted(_tensors(folder).items()):
        first, last = entry["data_offsets"]
        digest.update(f"{name} {entry['dtype']} {entry['shape']}".encode())
        with path.open("rb") as file:
            for offset in (first, (first + last) // 2, max(first, last - SLICE)):
                file.seek(start + offset)
                digest.update(file.read(min(SLICE, last - offset)))


def _tensors(folder: Path) -> dict[str, tuple[Path, dict[str, Any], int]]:
    """Name -> file, entry in its header, and first byte of its tensors, of the weights in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder}: has no *.safetensors, is the download complete?")
    tensors: dict[str, tuple[Path, dict[str, Any], int]] = {}
    for path in files:
        try:
            with safe_open(path, "pt"):  # which sees whether the file is whole, and does not say where a tensor lies
                pass
        except SafetensorError as error:
            raise DataError(f"{path}: is damaged or cut off ({error}); download it again") from error
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        tensors.update({n: (path, entry, 8 + length) for n, entry in header.items() if n != "__metadata__"})
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """A part's config.json.

    Raises:
        DataError: it is missing or not JSON.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing, expected a diffusers model folder in {folder.parent}") from error
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); download it again") from error
    return config


def load_part(loader: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen model of the class `loader` from its subfolder, in eval mode on the device.

    Args:
        loader: a class of diffusers or transformers with `from_pretrained`.

    Raises:
        DataError: the folder is missing, holds another class, lacks a tensor or has one in another shape, or cannot be
            loaded.
    """
    config = read_config(folder)
    # diffusers writes one name, transformers a list; an encoder's weights may be saved by a class with more heads.
    found = config.get("_class_name")
    if found is not None and found != loader.__name__:
        raise DataError(f"{folder}: holds a {found}, expected a {loader.__name__}; choose the model= that fits")
    try:
        name = "torch_dtype" if found is not None else "dtype"
        # transformers draws what is missing at random and goes on, so what was loaded is looked at below.
        how = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True, name: dtype}
        model, about = loader.from_pretrained(folder, **how)
        check_loaded(folder, about)
        return model.eval().requires_grad_(False).to(device)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise DataError(f"{folder}: cannot be loaded as {loader.__name__}: {' '.join(str(error).split())}") from error


def check_loaded(folder: Path, about: Mapping[str, Any]) -> None:
    """Raise a DataError unless every tensor of a model came out of its files.

    Args:
        folder: of the weights.
        about: what `from_pretrained` returns of them, with `output_loading_info` and `ignore_mismatched_sizes`.
    """
    lacking, other = sorted(about["missing_keys"]), sorted(key for key, *_ in about["mismatched_keys"])
    for names, what in ((lacking, "missing"), (other, "of another shape")):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise DataError(f"{folder}: {what} in the weights, by its config.json: {shown}; download the folder again")
