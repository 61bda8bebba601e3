"""Where a model's files lie: a diffusers folder, or the hub's cache."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from train.config.schema import ModelConfig
from train.errors import UserError

BUILTIN, HUB = "builtin:", "hub:"
"""How ``model.path`` names a model that comes with this package, and one of the hub."""
_ASSETS = Path(__file__).resolve().parents[1] / "assets"


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
    if config.path.startswith(HUB):
        return config.path.removeprefix(HUB), named
    builtin = config.path.startswith(BUILTIN)
    path = _ASSETS / config.path.removeprefix(BUILTIN) if builtin else Path(config.path).expanduser()
    if not path.is_dir():
        raise UserError(f"model.path {config.path} is no folder (a hub id is written hub:org/name){how}")
    for subfolder in (named, None) if config.expert is None else (named,):
        inner = path / (subfolder or "")
        if (inner / "config.json").is_file():
            if not any(inner.glob("*.safetensors")):
                raise UserError(f"model.path {inner} has a config.json but no *.safetensors, is the download complete?")
            check_boundary(config, path)
            return str(path), subfolder
    raise UserError(f"model.path {path} has no {named or ''}/config.json, expected a diffusers model folder")


def check_boundary(config: ModelConfig, path: Path) -> None:
    """Holds ``model.boundary`` against the folder's pipeline.

    Raises:
        UserError: the pipeline switches its experts at another noise level.
    """
    index = path / "model_index.json"
    if config.expert is None or not index.is_file():
        return
    found = read_json(index).get("boundary_ratio")
    if found is not None and found != config.boundary:
        raise UserError(
            f"model.boundary is {config.boundary}, {index} says {found}: choose the model=... that fits the weights"
        )


def fetched(config: ModelConfig, patterns: list[str] | None = None) -> Path:
    """The folder of a model of the hub, downloaded where it is not in this machine's cache.

    Args:
        patterns: of the files that are needed; None: all.

    Raises:
        UserError: it is not there, cannot be reached, or has a name that the hub does not know.
    """
    assert config.path is not None and config.path.startswith(HUB)
    try:
        return Path(snapshot_download(config.path.removeprefix(HUB), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path {config.path} cannot be fetched: {' '.join(str(error).split())}") from error


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
