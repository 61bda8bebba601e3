"""Checkpoints: one folder of safetensors and JSON for every strategy, written whole or not at all.

    step-000100/
        weights.safetensors     what is trained: the LoRA (or all weights, conf=shapes_base); with optim.ema its average
        optimizer.safetensors   optimizer state, full (unsharded) tensors; with optim.ema the weights to go on with
        state.json              everything else, with {"$tensor": name} where a tensor of optimizer.safetensors goes

Nothing is pickled. A folder is written under a temporary name, synced and renamed, so that a kill at any moment
leaves the last good one in place.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.io.files import beside
from train.errors import UserError
from train.storage.run_folder import command

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


class FolderCheckpointIO(CheckpointIO):
    """Lightning's hook for how a checkpoint dict reaches the disk.

    Attributes:
        problem: why the last checkpoint could not be written, None when it was. Raised on one rank alone, the error
            would leave the others waiting for it.
    """

    def __init__(self) -> None:
        self.problem: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.problem = None
        try:
            write_checkpoint(checkpoint, Path(path))
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            self.problem = f"{path} could not be written: {error}"

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint: dict[str, Any] = load_state(path)
        checkpoint["state_dict"] = load_weights(path)
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Raises:
        OSError, SafetensorError: the disk is full, or what else keeps files from being written.
    """
    remove_leftovers(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = dict(checkpoint)
    weights = {name: t.detach().contiguous().cpu() for name, t in rest.pop("state_dict").items()}
    tensors: dict[str, Tensor] = {}
    tree = _encode(rest, tensors, "")
    with beside(path) as fresh:
        fresh.mkdir()
        save_file(weights, fresh / WEIGHTS)
        save_file(tensors, fresh / OPTIMIZER)
        (fresh / STATE).write_text(json.dumps(tree, indent=1), encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Removes what runs that were killed while they saved have left in a checkpoints folder.

    A checkpoint that was to be replaced by another of its step is put back where that other did not get there.
    """
    for leftover in folder.glob(".step-*"):
        replaced = re.fullmatch(r"\.(step-\d+)\.[0-9a-f]+\.old", leftover.name)
        if replaced and not (folder / replaced[1]).exists():
            leftover.rename(folder / replaced[1])
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The trained weights of a checkpoint folder.

    Raises:
        UserError: the file is missing or damaged.
    """
    return _load_tensors(Path(path) / WEIGHTS)


def weight_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the trained weights of a checkpoint folder, without reading them.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = Path(path) / WEIGHTS
    try:
        with safe_open(file, "pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is no readable part of a checkpoint ({error})") from error


def load_state(path: str | Path) -> dict[str, Any]:
    """Everything but the weights of a checkpoint folder.

    Raises:
        UserError: a file is missing or damaged.
    """
    file = Path(path) / STATE
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no readable part of a checkpoint ({error})") from error
    tensors = _load_tensors(Path(path) / OPTIMIZER)
    try:
        state = _decode(tree, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is no readable part of a checkpoint (damaged, or not of this project: {error!r})"
        ) from error
    if not isinstance(state, dict) or not {"position", "global_step"} <= state.keys():
        raise UserError(f"{file} is no readable part of a checkpoint (it has no position)")
    return state


@dataclass(frozen=True)
class Place:
    """Where the training of a checkpoint stands.

    Attributes:
        step: optimizer steps that are done.
        position: micro-batches that were trained on.
        taken: of each shape of latents how many samples they had; None in a checkpoint of a version that counted
            micro-batches alone.
    """

    step: int = 0
    position: int = 0
    taken: dict[tuple[int, ...], int] | None = None


def place_of(path: str | Path) -> Place:
    """Where the training of a checkpoint folder stands, without reading its tensors.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = Path(path) / STATE
    try:
        state = dict(json.loads(file.read_text(encoding="utf-8"))["$dict"])
        taken = None if "taken" not in state else {tuple(shape): int(count) for shape, count in state["taken"]}
        return Place(int(state["global_step"]), int(state["position"]), taken)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no readable part of a checkpoint ({error!r})") from error


def last_checkpoint(run: str | Path) -> Path:
    """The newest checkpoint of a run folder.

    Raises:
        UserError: the folder does not exist or has no checkpoint.
    """
    found = checkpoints_of(Path(run) / "checkpoints")
    if not found:
        raise UserError(f"{run} has no checkpoints/step-* folder, expected a run folder such as runs/shapes_4x/<time>")
    return found[-1]


def last_good_checkpoint(run: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be read, None where there is none yet; and why each newer one cannot.

    Raises:
        UserError: there are checkpoints, and none can be read.
    """
    problems: list[str] = []
    for path in reversed(checkpoints_of(Path(run) / "checkpoints")):
        try:
            load_state(path)
            load_weights(path)
        except UserError as error:
            problems.append(str(error))
        else:
            return path, problems
    if problems:
        raise UserError("; ".join(problems))
    return None, []


def how_to_go_on(run: Path) -> str:
    """Which command takes a run up again, and where that begins."""
    found = checkpoints_of(run / "checkpoints")
    where = f"goes on from {found[-1].name}" if found else "begins anew, as there is no checkpoint yet"
    return f"{command('train resume=', run)} {where}"


def checkpoints_of(folder: Path) -> list[Path]:
    """The step-* folders in a checkpoints folder, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _load_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is no readable part of a checkpoint ({error})") from error


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
