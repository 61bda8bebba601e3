"""Samples in tars that somebody else wrote: which entry of a tar holds which field of a `Sample`.

    latent:latent.npy, text.text:text.safetensors#prompt_embeds, pooled.clip:clip.pth, caption:json#title

A field stands before the colon: latent, text.<name>, text.<name>.mask, pooled.<name>, image.<name> or caption. After it
stands the entry's name, and after a # the tensor's name in a file of several, or the key in a JSON object. Entries may
be .npy, .safetensors, .pth or .pt (loaded with `weights_only`, so that no code of the file runs), and for the caption
.json or .txt.

What the tensors lack is filled in, so that nothing has to be rewritten: a leading dimension of 1 is dropped, a float16
latent becomes float32, and text without a mask is all text up to its last token that is not zero.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from data.errors import DataError
from data.shards.sample import NAME, Prompt, Sample, tensors_of

_FIELD = re.compile(rf"latent|caption|text\.{NAME.pattern}(\.mask)?|(pooled|image)\.{NAME.pattern}")
_RANKS = {"latent": 4, "text": 2, "pooled": 1}
TENSORS, WORDS = ("npy", "safetensors", "pth", "pt"), ("json", "txt")


@dataclass(frozen=True)
class EntryMap:
    """Where each field lies: `places`, by field, an entry's name with what follows the #, if anything does."""

    places: dict[str, str]

    def __post_init__(self) -> None:
        for field, place in self.places.items():
            if not _FIELD.fullmatch(field):
                raise DataError(
                    f"map: {field!r} is no field, expected latent, text.<name>, text.<name>.mask, pooled.<name>, "
                    "image.<name> or caption"
                )
            kinds = WORDS if field == "caption" else TENSORS
            if _entry_of(place).rpartition(".")[2] not in kinds:
                endings = ", ".join(f".{kind}" for kind in kinds)
                raise DataError(f"map: {field} is {place!r}, expected the name of an entry that ends in {endings}")
            if field.endswith(".mask") and field.removesuffix(".mask") not in self.places:
                raise DataError(f"map: {field} is given without {field.removesuffix('.mask')}")
        if "latent" not in self.places:
            raise DataError("map: gives no place for latent, expected latent:ENTRY, such as latent:latent.npy")

    @classmethod
    def parse(cls, text: str) -> EntryMap:
        """A map as it is typed.

        Raises:
            DataError: a place without its field or the other way round, a field twice, or no place for the latent.
        """
        places: dict[str, str] = {}
        for part in text.split(","):
            field, colon, place = (word.strip() for word in part.partition(":"))
            if not (field and colon and place):
                raise DataError(f"map: {part.strip()!r} is no place, expected FIELD:ENTRY, such as latent:latent.npy")
            if field in places:
                raise DataError(f"map: {field} is given twice")
            places[field] = place
        return cls(places)

    @classmethod
    def guess(cls, names: Iterable[str], prompt: Prompt) -> EntryMap:
        """The map of entries that are named after their fields, such as latent.pth, text.npy and json.

        Args:
            names: of the entries of a sample.
            prompt: of the family: an entry `text` or `pooled` is that of its only text encoder.

        Raises:
            DataError: no entry is named latent.
        """
        only = {kind: next(iter(found)) for kind in ("text", "pooled") if len(found := getattr(prompt, kind)) == 1}
        places: dict[str, str] = {}
        for name in names:
            stem, _, ending = name.rpartition(".")
            if name in WORDS:
                places.setdefault("caption", name)
            kind, _, rest = stem.partition(".")
            if kind in only and rest in ("", "mask"):
                stem = f"{kind}.{only[kind]}" + (".mask" if rest else "")
            if ending in TENSORS and _FIELD.fullmatch(stem) and stem != "caption":
                places.setdefault(stem, name)
        if "latent" not in places:
            raise DataError(
                f"map is not set, and none of the entries {', '.join(sorted(names))} is named latent; say where each "
                "field lies, such as map=latent:vae.npy,text.text:t5.npy,caption:json#title"
            )
        return cls(places)

    @property
    def entries(self) -> set[str]:
        """The names of the entries that hold fields."""
        return {_entry_of(place) for place in self.places.values()}

    def sample(self, key: str, parts: Mapping[str, Tensor]) -> Sample:
        """The sample in entries of a tar.

        Args:
            key: of the sample.
            parts: the bytes of each entry by its name, uint8.

        Raises:
            DataError: naming the sample: entries are missing, cannot be read, or do not fit the schema.
        """
        where = f"sample {key}"
        lacking = sorted(self.entries - set(parts))
        if lacking:
            verb = "is" if len(lacking) == 1 else "are"
            raise DataError(f"{where}: {', '.join(lacking)} {verb} missing from its tar")
        opened = {name: _open(where, name, parts[name]) for name in sorted(self.entries)}
        tensors = {
            field: _ranked(field, _inside(where, field, opened[_entry_of(place)], place))
            for field, place in self.places.items()
            if field != "caption"
        }
        latent = tensors.pop("latent")
        latent = latent.float() if latent.dtype == torch.float16 else latent
        image = {field[6:]: tensors.pop(field) for field in list(tensors) if field.startswith("image.")}
        for field in [field for field in tensors if field.startswith("text.") and not field.endswith(".mask")]:
            mask = tensors.get(f"{field}.mask")
            tensors[f"{field}.mask"] = _text_in(tensors[field]) if mask is None else mask != 0
        prompt = Prompt.group(tensors, where)
        sample = Sample(key, latent, prompt.text, prompt.pooled, image, self._meta(where, opened))
        sample.validate()
        return sample

    def _meta(self, where: str, opened: Mapping[str, Any]) -> dict[str, Any]:
        """The meta data: a JSON object is taken whole; the caption is '' where no place is given for it."""
        place = self.places.get("caption")
        if place is None:
            return {"caption": ""}
        found = opened[_entry_of(place)]
        if isinstance(found, str):
            return {"caption": found.strip()}
        inner = place.partition("#")[2] or "caption"
        if not isinstance(found, dict) or not isinstance(found.get(inner), str):
            raise DataError(f"{where}: {_entry_of(place)} has no text named {inner}, expected the caption there")
        return {**found, "caption": found[inner]}


def _entry_of(place: str) -> str:
    return place.partition("#")[0]


def _open(where: str, name: str, part: Tensor) -> Any:
    """What an entry holds: a tensor, tensors by name, a JSON value or text."""
    ending = name.rpartition(".")[2]
    try:
        if ending == "safetensors":
            return tensors_of(part)
        content = part.numpy().tobytes()
        if ending == "npy":
            return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
        if ending in ("pth", "pt"):
            return _load_pth(where, name, content)
        return json.loads(content) if ending == "json" else content.decode("utf-8-sig")
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, EOFError, OSError, SafetensorError) as error:
        raise DataError(f"{where}: {name} cannot be read ({' '.join(str(error).split())[:200]})") from error


def _load_pth(where: str, name: str, content: bytes) -> Any:
    """What torch saved; classes and functions in it are refused unseen, since loading them could run code."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own, of the file's bytes, are of any kind
        hint = "it is damaged, or holds more than tensors, which is not loaded as it could run code"
        raise DataError(f"{where}: {name} cannot be read: {hint}; save its tensors alone") from error


def _inside(where: str, field: str, found: Any, place: str) -> Tensor:
    """The tensor of a field in what its entry holds."""
    entry, _, inner = place.partition("#")
    if isinstance(found, dict):
        if not inner and len(found) == 1:
            (found,) = found.values()
        elif not inner:
            some = ", ".join(sorted(map(str, found))[:8])
            raise DataError(f"{where}: {entry} holds several tensors, {some}: say which with map={field}:{entry}#NAME")
        elif inner not in found:
            raise DataError(f"{where}: {entry} has no {inner}, found {', '.join(sorted(map(str, found))[:8])}")
        else:
            found = found[inner]
    elif inner:
        raise DataError(f"{where}: {entry} holds one {type(found).__name__} without names, leave out #{inner}")
    if not isinstance(found, Tensor):
        raise DataError(f"{where}: {place} holds a {type(found).__name__}, expected a tensor")
    return found.detach()  # a parameter, or what was saved with its gradient, is data here


def _ranked(field: str, tensor: Tensor) -> Tensor:
    """A field's tensor without the leading dimension of 1 that a batch of one leaves."""
    rank = 1 if field.endswith(".mask") else _RANKS.get(field.partition(".")[0])
    return tensor[0] if rank is not None and tensor.dim() == rank + 1 and len(tensor) == 1 else tensor


def _text_in(tokens: Tensor) -> Tensor:
    """The mask (L,) of tokens (L, D) that are padded by zeros."""
    if tokens.dim() != 2:  # which the schema refuses
        return torch.ones(len(tokens), dtype=torch.bool)
    used = tokens.ne(0).any(dim=1)
    return used.flip(0).cummax(0).values.flip(0) if used.any() else used


def check_family(sample: Sample, prompt: Prompt, channels: int) -> None:
    """Hold a sample against what the encoders of its family make.

    Args:
        sample: valid by itself.
        prompt: any prompt of these encoders.
        channels: C of their latents.

    Raises:
        DataError: naming the sample and the field: a text is missing or too many, or has other channels.
    """
    where = f"sample {sample.key}"
    if sample.latent.shape[0] != channels:
        raise DataError(
            f"{where}: latent has {sample.latent.shape[0]} channels, shape {list(sample.latent.shape)}, expected "
            f"{channels}, [C, F, H, W]"
        )
    for kind in ("text", "pooled"):
        found, expected = getattr(sample, kind), getattr(prompt, kind)
        if set(found) != set(expected):
            names = f"has {kind} {_listed(found)}, the family has {_listed(expected)}"
            raise DataError(f"{where}: {names}; name them in map=")
        for name in expected:
            mine, its = (each[name].tokens if kind == "text" else each[name] for each in (found, expected))
            if mine.shape[-1] != its.shape[-1]:
                raise DataError(
                    f"{where}: {kind}.{name} has {mine.shape[-1]} channels, shape {list(mine.shape)}, expected "
                    f"{its.shape[-1]}"
                )


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "none"
