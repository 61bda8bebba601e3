"""Model families, one adapter each, and how a run gets its model."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from train.config import ModelConfig
from train.errors import UserError
from train.models.base import ADAPTERS, ModelAdapter
from train.models.conditions import Conditions
from train.models.experts import TwoExperts
from train.models.rope import TemporalRope
from train.models.weights import settle, stored_dtype

__all__ = [
    "ADAPTERS",
    "Conditions",
    "ModelAdapter",
    "adapter_of",
    "architecture_of",
    "benchmark_adapter",
    "check_pipeline",
    "describe_model",
    "family_of",
    "fetched",
    "load_adapter",
    "model_folder",
    "random_adapter",
    "read_json",
    "sigma_range",
    "temporal_rope",
]

for _file in pkgutil.iter_modules(__path__):  # an adapter is found by lying here
    importlib.import_module(f"{__name__}.{_file.name}")

_BUILTIN, _HUB = "builtin:", "hub:"
_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def model_folder(config: ModelConfig) -> tuple[str, str | None]:
    """(diffusers folder or hub id, subfolder of the transformer); a local folder is checked without loading anything.

    The subfolder of both experts together is that of the first.

    Raises:
        UserError: ``model.path`` is not set, or a local folder that lacks the model.
    """
    if config.expert == "both":
        model_folder(dataclasses.replace(config, expert="low"))
        return model_folder(dataclasses.replace(config, expert="high"))
    how = f"; get the weights with: {config.weights}" if config.weights else ""
    if config.path is None:
        raise UserError(f"model.path is not set, expected a diffusers folder or hub:<organisation>/<model>{how}")
    named = f"{config.subfolder}_2" if config.expert == "low" else config.subfolder
    if config.path.startswith(_HUB):
        return config.path.removeprefix(_HUB), named
    builtin = config.path.startswith(_BUILTIN)
    path = _ASSETS / config.path.removeprefix(_BUILTIN) if builtin else Path(config.path).expanduser()
    if not path.is_dir():
        raise UserError(f"model.path {config.path} is no folder (a hub id is written hub:org/name){how}")
    for subfolder in (named, None) if config.expert is None else (named,):
        inner = path / (subfolder or "")
        if (inner / "config.json").is_file():
            if not any(inner.glob("*.safetensors")):
                raise UserError(f"model.path {inner} has a config.json but no *.safetensors, is the download complete?")
            _check_boundary(config, path)
            return str(path), subfolder
    raise UserError(f"model.path {path} has no {named or ''}/config.json, expected a diffusers model folder")


def _check_boundary(config: ModelConfig, path: Path) -> None:
    """Raise a UserError where the folder's pipeline switches its experts elsewhere."""
    index = path / "model_index.json"
    if config.expert is None or not index.is_file():
        return
    found = read_json(index).get("boundary_ratio")
    if found is not None and found != config.boundary:
        raise UserError(
            f"model.boundary is {config.boundary}, {index} says {found}: choose the model=... that fits the weights"
        )


def describe_model(config: ModelConfig) -> ModelAdapter | None:
    """The adapter without any weights, on torch's meta device; None for a model that is still on the hub.

    Raises:
        UserError: the folder's config.json does not fit ``model.dimensions`` or the family.
    """
    architecture = architecture_of(config)
    if architecture is None:
        return None
    with torch.device("meta"):
        return random_adapter(config, architecture)


def architecture_of(config: ModelConfig) -> dict[str, Any] | None:
    """What the diffusers class of a run's model is made from; None for a model that is still on the hub.

    Raises:
        UserError: no ``model.path``, or a folder whose config.json does not fit the family or ``model.dimensions``.
    """
    if config.architecture is not None:
        return config.architecture
    path, subfolder = model_folder(config)
    file = Path(path) / (subfolder or "") / "config.json"
    return _read_architecture(config, file) if file.is_file() else None


def _read_architecture(config: ModelConfig, file: Path) -> dict[str, Any]:
    """What a transformer's config.json says to its class; it has to be the chosen model's."""
    model_class = family_of(config).model_class
    found = read_json(file)
    if found.get("_class_name") != model_class.__name__:
        raise UserError(
            f"model.path {config.path} holds a {found.get('_class_name')}, expected a {model_class.__name__}: "
            "choose the model=... that fits the weights"
        )
    for name, expected in (config.dimensions or {}).items():
        if found.get(name, expected) != expected:
            raise UserError(
                f"model.path {config.path} has {name}={found[name]}, the chosen model has {expected}: "
                "choose the model=... that fits the weights, or set model.dimensions=null"
            )
    known = inspect.signature(model_class.__init__).parameters
    return {name: value for name, value in found.items() if name in known}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        UserError: it is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is a {type(found).__name__}, expected a JSON object: download it again")
    return found


def fetched(config: ModelConfig, patterns: list[str] | None = None) -> Path:
    """The folder of a model of the hub, downloaded where it is not in this machine's cache.

    Args:
        patterns: of the files that are needed; None: all.

    Raises:
        UserError: it is not there, cannot be reached, or has a name that the hub does not know.
    """
    assert config.path is not None and config.path.startswith(_HUB)
    try:
        return Path(snapshot_download(config.path.removeprefix(_HUB), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {config.path} cannot be fetched: {' '.join(str(error).split())}") from error


def check_pipeline(config: ModelConfig, folder: Path) -> None:
    """Holds the folder of a whole diffusers pipeline against the chosen model.

    Raises:
        UserError: it holds another one.
    """
    file = folder / "transformer" / "config.json"
    if not file.is_file():
        raise UserError(f"model.path {folder} has no transformer/config.json, is the download complete?")
    _read_architecture(config, file)
    _check_boundary(config, folder)
    index = read_json(folder / "model_index.json")
    experts = 1 if (index.get("transformer_2") or [None, None])[1] is None else 2
    if experts != (1 if config.expert is None else 2):
        raise UserError(
            f"model.path {folder} has {experts} transformers, the chosen model has {3 - experts}: "
            "choose the model=... that fits the weights"
        )
    if bool(index.get("expand_timesteps")) != family_of(config).takes_first_frame:
        kind = "gives each token its own timestep" if index.get("expand_timesteps") else "has one timestep a clip"
        raise UserError(
            f"model.path {folder} {kind}, the family {config.family} does not: choose the model=... that fits"
        )


def random_adapter(config: ModelConfig, architecture: Mapping[str, Any]) -> ModelAdapter:
    """The adapter of a run's model with random weights, made from a config of the diffusers class."""
    count = 2 if config.expert == "both" else 1
    parts = [family_of(config).from_config(architecture, text_tokens=config.text_tokens) for _ in range(count)]
    return _configured(parts, config)


def benchmark_adapter(
    config: ModelConfig, blocks: int | None, dtype: torch.dtype, device: torch.device | str
) -> ModelAdapter:
    """A model of the run's dimensions, of so many ``blocks`` or all, with random weights drawn on the device itself.

    Raises:
        UserError: the dimensions are not known.
    """
    shape = config.architecture or config.dimensions
    if not shape:
        raise UserError("the model has no dimensions in its file, which a benchmark needs")
    shape = shape if blocks is None else family_of(config).cut(shape, blocks)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return family_of(config).from_config(shape, text_tokens=config.text_tokens)
    finally:
        torch.set_default_dtype(torch.float32)


def load_adapter(
    config: ModelConfig, dtype: torch.dtype | None, seed: int, device: torch.device | str = "cpu"
) -> ModelAdapter:
    """The adapter of a run's model.

    Args:
        config: where the model is; with ``architecture`` its weights are random, drawn from ``seed``.
        dtype: of the weights; layers that the family keeps in fp32 stay there. None leaves them as they are stored,
            mapped from their files, for `train.models.weights.settle`.
        device: where the weights go.
    """
    adapter = _load_as_stored(config, seed)
    if dtype is not None:
        for transformer in adapter.transformers:
            settle(transformer, dtype, device)
    return adapter


def _configured(parts: Sequence[ModelAdapter], config: ModelConfig) -> ModelAdapter:
    """The adapter of one or two transformers, told what the config says of them beside their weights."""
    adapter = parts[0]
    if len(parts) == 2:
        assert config.boundary is not None
        adapter = TwoExperts(parts[0], parts[1], config.boundary)
    else:
        adapter.sigma_range = sigma_range(config)
    adapter.rope = temporal_rope(config)
    return adapter


def sigma_range(config: ModelConfig) -> tuple[float, float]:
    """The noise levels of ``model.expert``: from the first up to below the second."""
    if config.expert in (None, "both"):
        return 0.0, 1.0
    assert config.boundary is not None
    return (config.boundary, 1.0) if config.expert == "high" else (0.0, config.boundary)


def temporal_rope(config: ModelConfig) -> TemporalRope:
    """The temporal positions of ``model.rope``.

    Raises:
        UserError: the model has no such positions, or its native length is not known.
    """
    if config.rope == "default":
        return TemporalRope()
    if config.native_frames is None:
        raise UserError(f"rope={config.rope} needs model.native_frames, it is not set")
    intrinsic = family_of(config).riflex
    if config.rope == "riflex" and isinstance(intrinsic, str):
        raise UserError(f"rope=riflex cannot serve model.family {config.family}: {intrinsic}; use rope=interpolate")
    native = (config.native_frames - 1) // config.vae[0] + 1
    return TemporalRope(config.rope, native, intrinsic if isinstance(intrinsic, int) else 1)


def _load_as_stored(config: ModelConfig, seed: int) -> ModelAdapter:
    if config.architecture is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return random_adapter(config, config.architecture)
    if config.expert == "both":
        return _configured([_load_one(dataclasses.replace(config, expert=name)) for name in ("high", "low")], config)
    return _configured([_load_one(config)], config)


def _load_one(config: ModelConfig) -> ModelAdapter:
    path, subfolder = model_folder(config)
    if config.path is not None and config.path.startswith(_HUB):
        path = str(fetched(config, [f"{subfolder}/*" if subfolder else "*", "model_index.json"]))
        _check_boundary(config, Path(path))
    try:
        stored = stored_dtype(Path(path) / (subfolder or ""))
        adapter = family_of(config).load(path, subfolder, text_tokens=config.text_tokens, dtype=stored)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.path {config.path} cannot be loaded: {reason}") from error
    if adapter.patch != tuple(config.patch):
        raise UserError(f"model.patch is {config.patch}, the model in {config.path} has {list(adapter.patch)}")
    return adapter


def family_of(config: ModelConfig) -> type[ModelAdapter]:
    """The adapter class of ``model.family``.

    Raises:
        UserError: an unknown family.
    """
    if config.family not in ADAPTERS:
        raise UserError(f"model.family is {config.family!r}, expected one of {', '.join(ADAPTERS)}")
    return ADAPTERS[config.family]


def adapter_of(model_class: str) -> type[ModelAdapter] | None:
    """The adapter class of the first family whose diffusers class has this name; None where there is none."""
    return next((found for found in ADAPTERS.values() if found.model_class.__name__ == model_class), None)
