"""Model families, one adapter each, and how a run gets its model."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from train.config import ModelConfig
from train.errors import UserError
from train.models.base import ADAPTERS, Conditions, ModelAdapter
from train.models.weights import settle, stored_dtype

__all__ = ["ADAPTERS", "Conditions", "ModelAdapter", "attention_shape", "family_of", "load_adapter", "model_folder"]

for _file in pkgutil.iter_modules(__path__):  # an adapter is found by lying here
    importlib.import_module(f"{__name__}.{_file.name}")

_BUILTIN, _HUB = "builtin:", "hub:"
_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def model_folder(config: ModelConfig) -> tuple[str, str | None]:
    """(diffusers folder or hub id, subfolder of the transformer); a local folder is checked without loading anything.

    Raises:
        UserError: ``model.path`` is not set, or a local folder that lacks the model.
    """
    if config.path is None:
        how = f"; get the weights with: {config.weights}" if config.weights else ""
        raise UserError(f"model.path is not set, expected a diffusers folder or a hub id{how}")
    if config.path.startswith(_HUB):
        return config.path.removeprefix(_HUB), config.subfolder
    builtin = config.path.startswith(_BUILTIN)
    path = _ASSETS / config.path.removeprefix(_BUILTIN) if builtin else Path(config.path).expanduser()
    if not path.is_dir():
        how = f"; get the weights with: {config.weights}" if config.weights else ""
        raise UserError(f"model.path {config.path} is no folder (a hub id is written hub:org/name){how}")
    for subfolder in (config.subfolder, None):
        inner = path / (subfolder or "")
        if (inner / "config.json").is_file():
            if not any(inner.glob("*.safetensors")):
                raise UserError(f"model.path {inner} has a config.json but no *.safetensors, is the download complete?")
            return str(path), subfolder
    raise UserError(f"model.path {path} has no {config.subfolder or ''}/config.json, expected a diffusers model folder")


def attention_shape(config: ModelConfig) -> tuple[int, int, int] | None:
    """(layers, heads, head_dim) without loading any weights; None for a model that is still on the hub."""
    architecture = config.architecture
    if architecture is None:
        path, subfolder = model_folder(config)
        file = Path(path) / (subfolder or "") / "config.json"
        if not file.is_file():
            return None
        architecture = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("_")}
    with torch.device("meta"):
        return family_of(config).from_config(architecture, text_tokens=config.text_tokens).attention_shape


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
        settle(adapter.transformer, dtype, device)
    return adapter


def _load_as_stored(config: ModelConfig, seed: int) -> ModelAdapter:
    family = family_of(config)
    if config.architecture is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return family.from_config(config.architecture, text_tokens=config.text_tokens)
    path, subfolder = model_folder(config)
    try:
        if config.path is not None and config.path.startswith(_HUB):
            path = snapshot_download(path, allow_patterns=[f"{subfolder}/*" if subfolder else "*"])
        stored = stored_dtype(Path(path) / (subfolder or ""))
        adapter = family.load(path, subfolder, text_tokens=config.text_tokens, dtype=stored)
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
