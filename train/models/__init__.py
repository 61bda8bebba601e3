"""Model families, one adapter each, and how a run gets its model."""

from __future__ import annotations

from pathlib import Path

import torch

from train.config import ModelConfig
from train.errors import UserError
from train.models.base import ModelAdapter
from train.models.wan import WanAdapter

__all__ = ["ADAPTERS", "ModelAdapter", "load_adapter", "model_folder"]

ADAPTERS: dict[str, type[ModelAdapter]] = {WanAdapter.family: WanAdapter}

_BUILTIN = "builtin:"
_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def model_folder(config: ModelConfig) -> tuple[str, str | None]:
    """(diffusers folder or hub id, subfolder of the transformer), checked without loading anything.

    Raises:
        UserError: ``model.path`` is not set, or a local folder that lacks the model.
    """
    if config.path is None:
        how = f"; get the weights with: {config.weights}" if config.weights else ""
        raise UserError(f"model.path is not set, expected a diffusers folder or a hub id{how}")
    if config.path.startswith(_BUILTIN):
        return str(_ASSETS / config.path.removeprefix(_BUILTIN)), None
    path = Path(config.path)
    looks_local = path.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") != 1
    if path.is_dir():
        for subfolder in (config.subfolder, None):
            if (path / (subfolder or "") / "config.json").is_file():
                return str(path), subfolder
        raise UserError(
            f"model.path {path} has no {config.subfolder or ''}/config.json, expected a diffusers model folder"
        )
    if looks_local:
        how = f"; get the weights with: {config.weights}" if config.weights else ""
        raise UserError(f"model.path {path} does not exist{how}")
    return config.path, config.subfolder


def load_adapter(config: ModelConfig, dtype: torch.dtype, seed: int) -> ModelAdapter:
    """The adapter of a run's model, on the CPU.

    Args:
        config: where the model is; with ``architecture`` its weights are random, drawn from ``seed``.
        dtype: of the weights; layers that the family keeps in fp32 stay there.
    """
    if config.family not in ADAPTERS:
        raise UserError(f"model.family is {config.family!r}, expected one of {', '.join(ADAPTERS)}")
    family = ADAPTERS[config.family]
    if config.architecture is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return family.from_config(config.architecture)
    return family.load(*model_folder(config), dtype=dtype)
