"""The one schema of a shard entry.

A sample lies in a tar as two files, `<key>.safetensors` and `<key>.json`. The first holds the tensors, named

    latent              (C, F, H, W) bfloat16 or float32: the clip, as the encoder made it
    text.<name>         (L, D) floating: the tokens of one text encoder
    text.<name>.mask    (L,) bool: True where a token is text, False where it is padding
    pooled.<name>       (D,) floating: one vector a caption
    image.<name>        any floating shape: an image condition

and the second the meta data: `caption` (str, required) and whatever else the maker knows, such as source, clip_start,
fps, width and height. Nothing is pickled, so shards of strangers can be read safely.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from data.errors import DataError

# WebDataset splits a file name at its first dot, skips names that start with "__", and ustar holds 100 characters.
KEY = re.compile(r"(?!__)[A-Za-z0-9_\-]{1,80}")
NAME = re.compile(r"[A-Za-z0-9_\-]+")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool}
LATENT_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class TextTokens:
    """Text embeddings: `tokens` (L, D) floating and `mask` (L,) bool, True on text; both with B in front in a batch."""

    tokens: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Prompt:
    """One encoded prompt: `text` by encoder name, and `pooled` vectors (D,) by name."""

    text: dict[str, TextTokens]
    pooled: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """The prompt as named tensors: text.<name>, text.<name>.mask, pooled.<name>."""
        named: dict[str, Tensor] = {}
        for name, text in self.text.items():
            named[f"text.{name}"] = text.tokens
            named[f"text.{name}.mask"] = text.mask
        named.update({f"pooled.{name}": vector for name, vector in self.pooled.items()})
        return named

    def digest(self) -> str:
        """SHA-256 of the tensors, in hexadecimal digits."""
        return _digest(self.tensors())

    def validate(self, where: str) -> None:
        """Check names, ranks, dtypes and values.

        Args:
            where: what the prompt belongs to, the start of every message.

        Raises:
            DataError: naming `where` and the field.
        """
        for name, text in self.text.items():
            field = f"text.{name}"
            _check_floating(where, field, name, text.tokens, rank=2)
            length = text.tokens.shape[0]
            if text.mask.dtype != torch.bool or text.mask.shape != (length,):
                found = f"{text.mask.dtype} {tuple(text.mask.shape)}"
                raise DataError(f"{where}: {field}.mask is {found}, expected torch.bool ({length},) as its tokens say")
        for name, vector in self.pooled.items():
            _check_floating(where, f"pooled.{name}", name, vector, rank=1)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], where: str) -> Prompt:
        """The inverse of `tensors`, validated; a DataError names any tensor that is not part of a prompt."""
        prompt = cls.group(tensors, where)
        prompt.validate(where)
        return prompt

    @classmethod
    def group(cls, tensors: Mapping[str, Tensor], where: str) -> Prompt:
        """As `from_tensors`, without looking at the tensors themselves."""
        text: dict[str, TextTokens] = {}
        pooled: dict[str, Tensor] = {}
        for full, tensor in tensors.items():
            kind, _, name = full.partition(".")
            if kind == "text" and name.endswith(".mask") and f"text.{name.removesuffix('.mask')}" in tensors:
                continue
            if kind == "text":
                mask = tensors.get(f"{full}.mask")
                if mask is None:
                    raise DataError(f"{where}: tensor {full} has no {full}.mask beside it; make this shard anew")
                text[name] = TextTokens(tensor, mask)
            elif kind == "pooled":
                pooled[name] = tensor
            else:
                expected = "latent, text.<name>, text.<name>.mask, pooled.<name> or image.<name>"
                raise DataError(f"{where}: unknown tensor {full}, expected {expected}")
        return cls(text, pooled)


@dataclass(frozen=True, eq=False)
class Sample:
    """One training clip: what a shard entry holds, see the module's docstring for names, shapes and dtypes."""

    key: str
    latent: Tensor
    text: dict[str, TextTokens]
    pooled: dict[str, Tensor]
    image: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def caption(self) -> str:
        """The clip's caption, `meta["caption"]`."""
        return str(self.meta["caption"])

    def digest(self) -> str:
        """SHA-256 of the tensors, in hexadecimal digits: samples of different folders may have the same key."""
        return _digest({"latent": self.latent, **Prompt(self.text, self.pooled).tensors(), **self.image})

    def first_frames(self, frames: int) -> Sample:
        """The sample with the first so many latent frames, in its latent and in image conditions of the same frames
        and sides, (c, F, H, W), such as Wan's `image.condition`; meta stays that of the whole clip."""
        sides = self.latent.shape[1:]

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:, :frames].contiguous() if tensor.dim() == 4 and tensor.shape[1:] == sides else tensor

        image = {name: cut(tensor) for name, tensor in self.image.items()}
        return replace(self, latent=cut(self.latent), image=image)

    def validate(self) -> None:
        """Check every field against the schema.

        Raises:
            DataError: naming the sample's key, the field, what was found and what was expected.
        """
        if not KEY.fullmatch(self.key):
            expected = "1 to 80 letters, digits, '-' and '_', not starting with '__'"
            raise DataError(f"sample {self.key!r}: bad key, expected {expected}")
        where = f"sample {self.key}"
        if self.latent.dtype not in LATENT_DTYPES:
            raise DataError(f"{where}: latent is {self.latent.dtype}, expected bfloat16 or float32; convert it first")
        _check_floating(where, "latent", "latent", self.latent, rank=4)
        Prompt(self.text, self.pooled).validate(where)
        for name, tensor in self.image.items():
            _check_floating(where, f"image.{name}", name, tensor, rank=None)
        if not isinstance(self.meta.get("caption"), str):
            raise DataError(f"{where}: meta.caption is {self.meta.get('caption')!r}, expected a string ('' for none)")

    def to_entry(self) -> dict[str, Any]:
        """Validate, and give the WebDataset sample: `__key__` (str), `safetensors` and `json` (bytes).

        Equal samples give equal bytes.

        Raises:
            DataError: when the sample is not valid or its meta is not JSON.
        """
        self.validate()
        tensors = {"latent": self.latent, **Prompt(self.text, self.pooled).tensors()}
        tensors.update({f"image.{name}": tensor for name, tensor in self.image.items()})
        try:
            meta = json.dumps(self.meta, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:  # half a character (a lone surrogate) among them
            raise DataError(f"sample {self.key}: meta is not JSON ({error}); keep to strings and numbers") from error
        # Two names for one storage, such as a caption's tokens under two encoders, are refused by safetensors.
        packed = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        return {"__key__": self.key, "safetensors": safetensors.torch.save(packed), "json": meta}

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Sample:
        """Decode and validate a WebDataset sample as `to_entry` makes it; its parts may also be uint8 tensors.

        The sample's tensors are views of a part that is a tensor, wherever that lies.

        Raises:
            DataError: naming the key and what is missing, unreadable or not as the schema says.
        """
        key = str(entry["__key__"])
        where = f"sample {key}"
        for part in ("safetensors", "json"):
            if part not in entry:
                raise DataError(f"{where}: {key}.{part} is missing from its shard; make this shard anew")
        try:
            tensors = tensors_of(entry["safetensors"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: {key}.safetensors cannot be read ({error}); make this shard anew") from error
        try:
            meta = json.loads(_bytes(entry["json"]))
        except ValueError as error:
            raise DataError(f"{where}: {key}.json is not JSON ({error}); make this shard anew") from error
        if not isinstance(meta, dict):
            raise DataError(f"{where}: {key}.json holds a {type(meta).__name__}, expected an object")
        latent = tensors.pop("latent", None)
        if latent is None:
            found = ", ".join(sorted(tensors)) or "nothing"
            raise DataError(f"{where}: tensor latent is missing, found {found}; make this shard anew")
        image = {name[6:]: tensors.pop(name) for name in list(tensors) if name.startswith("image.")}
        prompt = Prompt.group(tensors, where)
        sample = cls(key, latent, prompt.text, prompt.pooled, image, meta)
        sample.validate()
        return sample


def _bytes(part: bytes | Tensor) -> bytes:
    return part.numpy().tobytes() if isinstance(part, Tensor) else part


def tensors_of(part: bytes | Tensor) -> dict[str, Tensor]:
    """The tensors of a safetensors file; as views, where the file is a uint8 tensor itself.

    The library copies each tensor out of the file, which is what a loader of 41 MB samples would spend its time on.

    Raises:
        SafetensorError, ValueError, KeyError, TypeError: it is no such file.
    """
    if not isinstance(part, Tensor):
        return safetensors.torch.load(part)
    length = int.from_bytes(part[:8].numpy().tobytes(), "little")
    if length > len(part) - 8:
        raise ValueError(f"its header of {length} bytes is longer than the file")
    header = json.loads(part[8 : 8 + length].numpy().tobytes())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        start, end = (8 + length + int(offset) for offset in about["data_offsets"])
        dtype, shape = _DTYPES[about["dtype"]], [int(side) for side in about["shape"]]
        count = math.prod(shape)
        if (
            not 8 + length <= start <= end <= len(part)
            or count * dtype.itemsize != end - start
            or min(shape, default=0) < 0
        ):
            raise ValueError(f"tensor {name} does not fit into the file")
        content = part[start:end]
        if content.storage_offset() % dtype.itemsize:
            content = content.clone()
        tensors[name] = content.view(dtype).view(shape)
    return tensors


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()


def _check_floating(where: str, field: str, name: str, tensor: Tensor, rank: int | None) -> None:
    """Raise a DataError unless `name` can be stored and `tensor` is floating, of that rank, not empty and finite."""
    if not NAME.fullmatch(name):
        raise DataError(f"{where}: {field} has a bad name, expected letters, digits, '-' and '_'")
    if not tensor.is_floating_point():
        raise DataError(f"{where}: {field} is {tensor.dtype}, expected a floating-point tensor")
    if rank is not None and tensor.dim() != rank:
        raise DataError(f"{where}: {field} has shape {tuple(tensor.shape)}, expected {rank} dimensions")
    if tensor.numel() == 0:
        raise DataError(f"{where}: {field} is empty, its shape is {tuple(tensor.shape)}")
    # Both carry a NaN on; twenty times faster than looking at each number.
    if not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
        raise DataError(f"{where}: {field} holds NaN or infinity; encode this clip anew, in float32 if need be")
