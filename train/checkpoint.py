"""Checkpoints: one folder of safetensors and JSON for every strategy, written whole or not at all.

    step-000100/
        weights.safetensors     what is trained: the LoRA (or all weights, conf=shapes_base)
        optimizer.safetensors   optimizer state, full (unsharded) tensors
        state.json              everything else, with {"$tensor": name} where a tensor of optimizer.safetensors goes

Nothing is pickled. A folder is written under a temporary name, synced and renamed, so that a kill at any moment
leaves the last good one in place.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.errors import UserError

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


class FolderCheckpointIO(CheckpointIO):
    """Lightning's hook for how a checkpoint dict reaches the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a run that was killed here
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        rest = dict(checkpoint)
        weights = {name: t.detach().contiguous().cpu() for name, t in rest.pop("state_dict").items()}
        tensors: dict[str, Tensor] = {}
        tree = _encode(rest, tensors, "")
        try:
            save_file(weights, temporary / WEIGHTS)
            save_file(tensors, temporary / OPTIMIZER)
            (temporary / STATE).write_text(json.dumps(tree, indent=1))
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            old = path.with_name(f".{path.name}.old-{os.getpid()}")
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            _sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint: dict[str, Any] = load_state(path)
        checkpoint["state_dict"] = load_weights(path)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint folder.

    Raises:
        UserError: the file is missing or damaged.
    """
    return _load_tensors(Path(path) / WEIGHTS)


def load_state(path: str | Path) -> dict[str, Any]:
    """Everything but the weights of a checkpoint folder.

    Raises:
        UserError: a file is missing or damaged.
    """
    file = Path(path) / STATE
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is not a readable checkpoint ({error}); delete this step-* folder to go on from the one before"
        ) from error
    state = _decode(tree, _load_tensors(Path(path) / OPTIMIZER))
    assert isinstance(state, dict)
    return state


def last_checkpoint(run: str | Path) -> Path:
    """The newest checkpoint of a run folder.

    Raises:
        UserError: the folder does not exist or has no checkpoint.
    """
    found = checkpoints_of(Path(run) / "checkpoints")
    if not found:
        raise UserError(f"{run} has no checkpoints/step-* folder, expected a run folder such as runs/shapes_4x/<time>")
    return found[-1]


def checkpoints_of(folder: Path) -> list[Path]:
    """The step-* folders in a checkpoints folder, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} is not readable ({error}); delete this step-* folder to go on from the one before"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encode(item: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """JSON tree of dicts, lists and scalars; tensors move to ``tensors``. Dicts keep the type of their keys."""
    if isinstance(item, Tensor):
        tensors[name] = item.detach().contiguous().cpu()
        return {"$tensor": name}
    if isinstance(item, dict):
        return {"$dict": [[k, _encode(v, tensors, f"{name}.{k}".lstrip("."))] for k, v in item.items()]}
    if isinstance(item, (list, tuple)):
        return [_encode(v, tensors, f"{name}.{i}") for i, v in enumerate(item)]
    if item is None or isinstance(item, (bool, int, float, str)):
        return item
    raise TypeError(f"checkpoint entry {name} is a {type(item).__name__}: only tensors and JSON types are saved")


def _decode(item: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(item, dict):
        if "$tensor" in item:
            return tensors[item["$tensor"]]
        return {k: _decode(v, tensors) for k, v in item["$dict"]}
    if isinstance(item, list):
        return [_decode(v, tensors) for v in item]
    return item
