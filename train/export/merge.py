"""A base model with LoRAs in its weights, written tensor by tensor.

Sums are made in fp32, and no more than one shard of the result is ever in memory, whatever the model's size: each
tensor is read alone, and its file's pages are given back before the next.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from train.errors import UserError
from train.lora.masks import masks_beside
from train.lora.reading import Lora
from train.models.pretrained import pipeline_around, stand_in
from train.models.weights import DTYPES, FLOAT8

_STEM = "diffusion_pytorch_model"
_SHARD_BYTES = 5 * 10**9


def merge(
    base: Path,
    out: Path,
    loras: Sequence[tuple[Lora, float]],
    dtype: torch.dtype | None,
    *,
    header: Mapping[str, str] = MappingProxyType({}),
    shard_bytes: int = _SHARD_BYTES,
) -> str:
    """Writes a diffusers folder: the transformer, or the whole pipeline where the base model lies in one.

    The pipeline's other parts are linked where the file system can, else copied; masks that lie there belong to the
    weights of the base model, and stay. A second transformer of the same pipeline goes into the folder of the first.

    Args:
        base: folder of the base model's transformer.
        out: a new folder, or that of the pipeline's other transformer.
        loras: with their strengths; they add up.
        dtype: of the weights; layers that diffusers keeps in fp32 stay as they are. None: as the base model has them.
        header: goes into every file's metadata: how the LoRA was trained.
        shard_bytes: the most that a file holds.

    Returns:
        What was written, in words.

    Raises:
        UserError: a LoRA does not fit, the disk is too small, or a result is not finite.
    """
    sources = _sources(base)
    changes = _changes(loras, sources, base)
    exact = set(getattr(stand_in(base), "_keep_in_fp32_modules", None) or ())
    targets = {
        name: source.dtype if dtype is None or not exact.isdisjoint(name.split(".")) else dtype
        for name, source in sources.items()
    }
    shards = _shards(sources, targets, shard_bytes)
    total = sum(sources[name].elements * targets[name].itemsize for name in sources)
    _check_space(out, total)
    pipeline = pipeline_around(base)
    folder = out / base.name if pipeline else out
    if pipeline and out.exists():
        shutil.rmtree(folder)  # links to the base model's files
        pipeline = None
    folder.mkdir(parents=True)
    shutil.copy(base / "config.json", folder)
    index: dict[str, str] = {}
    with tqdm(total=total, desc="Merging", unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for number, names in enumerate(shards, 1):
            place = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            tensors = {}
            for name in names:
                tensors[name] = _merged(name, sources[name], changes.get(name, []), targets[name])
                bar.update(tensors[name].nbytes)
            save_file(tensors, folder / f"{_STEM}{place}.safetensors", {"format": "pt", **header})
            index |= dict.fromkeys(names, f"{_STEM}{place}.safetensors")
    if len(shards) > 1:
        about = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / f"{_STEM}.safetensors.index.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    if pipeline:
        _link_rest(pipeline, base.name, out)
    written = {name: source.shape for name, source in _sources(folder).items()}
    if written != {name: source.shape for name, source in sources.items()}:
        raise UserError(f"{folder} does not hold the tensors of {base} after writing: is the disk healthy?")
    return f"{out.name}  {len(written)} tensors in {len(shards)} files, {len(changes)} of them changed"


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the base model lies."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def _sources(folder: Path) -> dict[str, _Source]:
    """The tensors of a diffusers folder, in the order of its files."""
    found: dict[str, _Source] = {}
    index = folder / f"{_STEM}.safetensors.index.json"
    if index.is_file():
        files = [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    else:
        files = sorted(set(folder.glob("*.safetensors")) - {masks_beside(folder)})
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    part = tensors.get_slice(name)
                    if part.get_dtype() == FLOAT8:
                        raise UserError(
                            f"{file} holds {name} in float8: a LoRA merges into the original weights, in 16 or 32 "
                            "bits; export it by itself, or give the original model's folder"
                        )
                    found[name] = _Source(file, tuple(part.get_shape()), DTYPES[part.get_dtype()])
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{file} is not readable ({error}): download the model again") from error
    return found


def _changes(
    loras: Sequence[tuple[Lora, float]], sources: dict[str, _Source], base: Path
) -> dict[str, list[tuple[float, tuple[Tensor, ...]]]]:
    """What each tensor changes by: a strength, and A and B, those and m of a DoRA, or the whole difference."""
    changes: dict[str, list[tuple[float, tuple[Tensor, ...]]]] = {}
    for lora, strength in loras:
        low_rank: dict[str, tuple[Tensor, ...]] = {
            f"{name}.weight": (*pair, lora.magnitudes[name]) if name in lora.magnitudes else pair
            for name, pair in lora.pairs.items()
        }
        whole = {name: (change,) for name, change in lora.differences.items()}
        for name, parts in {**low_rank, **whole}.items():
            shape = tuple(parts[0].shape) if len(parts) == 1 else (len(parts[1]), parts[0].shape[1])
            if name not in sources or sources[name].shape != shape:
                found = sources[name].shape if name in sources else "no such tensor"
                raise UserError(f"a LoRA changes {name} {shape}, {base} has {found}: is it for another model?")
        for name, parts in (*low_rank.items(), *whole.items()):
            changes.setdefault(name, []).append((strength, parts))
    return changes


def _shards(sources: dict[str, _Source], targets: dict[str, torch.dtype], most: int) -> list[list[str]]:
    """Names by file, each file at most ``most`` bytes or a single tensor."""
    shards: list[list[str]] = []
    room = 0
    for name, source in sources.items():
        size = source.elements * targets[name].itemsize
        if not shards or size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards


def _merged(name: str, source: _Source, changes: list[tuple[float, tuple[Tensor, ...]]], dtype: torch.dtype) -> Tensor:
    with safe_open(source.file, "pt") as tensors:  # opened for each tensor: closing gives the pages back
        tensor: Tensor = tensors.get_tensor(name)
        if not changes:
            return tensor.to(dtype, copy=True).contiguous()
        base = total = tensor.float()
    for strength, parts in changes:
        first, *rest = (part.float() for part in parts)
        if len(rest) == 2:
            tuned = base.addmm(rest[0], first)
            total = total.add(tuned * (rest[1] / tuned.norm(dim=1))[:, None] - base, alpha=strength)
        else:
            total = total.addmm(rest[0], first, alpha=strength) if rest else total.add(first, alpha=strength)
    result = total.to(dtype).contiguous()
    if not result.isfinite().all():
        raise UserError(f"{name} is not finite after the merge: is a LoRA damaged, or its strength too high?")
    return result


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise UserError(f"{out.parent} has {free / 2**30:,.1f} GiB free, the merged model takes {needed / 2**30:,.1f}")


def _link_rest(pipeline: Path, transformer: str, out: Path) -> None:
    """All of a pipeline's folder but its transformer, and the masks that this was trained under."""

    def link(source: str, target: str) -> None:
        real = Path(source).resolve()  # the hub's cache holds links
        try:
            os.link(real, target)
        except OSError:
            shutil.copy2(real, target)

    own = pipeline / transformer, masks_beside(pipeline)

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [n for n in names if n.startswith(".") or Path(folder, n) in own]

    shutil.copytree(pipeline, out, ignore=ignored, copy_function=link, dirs_exist_ok=True)
