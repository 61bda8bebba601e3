"""Going on with other settings: what cannot change, and what of a checkpoint gives way to the settings.

An optimizer's and a scheduler's saved state hold numbers of the settings that they were made with. Loaded as they are,
these would win over settings that a resume changes. The changes are made in the checkpoint as it is read, before any
strategy takes it apart, so that they act from the first step on under all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config.schema import RunConfig
from train.errors import UserError
from train.storage.checkpoints import Place, checkpoints_of, place_of


def check_changes(before: RunConfig, now: RunConfig, folder: Path) -> None:
    """Refuses changes of a run's settings that would do nothing, or that its checkpoints leave no way to follow.

    Args:
        before, now: the settings that the run had, and those that it is to go on with.
        folder: the run's.

    Raises:
        UserError: naming the key.
    """
    place = _newest(folder)
    if place is None:
        return  # it starts anew
    if now.trainer.steps < place.step:
        raise UserError(
            f"trainer.steps is {now.trainer.steps}, but the run has made {place.step}: give at least as many, or "
            "export an earlier checkpoint (python -m train.export checkpoint=)"
        )
    start = None if now.lora is None else now.lora.init
    if start is not None and (before.lora is None or start != before.lora.init):
        raise UserError(
            f"lora.init is {start}, but the run has trained its LoRA for {place.step} steps and goes on from there: "
            "leave it out, or start a new run"
        )
    if place.taken is None and now.clips_at_once() != before.clips_at_once():
        raise UserError(
            f"all devices together would take {now.clips_at_once():g} clips at once, they took "
            f"{before.clips_at_once():g}: the newest checkpoint is of a version that cannot change this. Go on as "
            "before until the next checkpoint, then change it"
        )


def _newest(folder: Path) -> Place | None:
    """Where the newest checkpoint that says so stands; None where there is none."""
    for path in reversed(checkpoints_of(folder / "checkpoints")):
        try:
            return place_of(path)
        except UserError:
            continue  # damaged: training goes on from one before it
    return None


def follow_settings(
    checkpoint: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    factor: Callable[[int], float],
    accumulate: int,
) -> None:
    """Changes a checkpoint, as `train.storage.checkpoints` reads it, to go on with these settings.

    Args:
        lr, betas, weight_decay: of AdamW.
        factor: what a step's learning rate is as a multiple of ``lr``, by the number of steps before it.
        accumulate: micro-batches in an optimizer step.
    """
    for optimizer, scheduler in zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=True):
        rate = lr * factor(scheduler["last_epoch"])
        for group in optimizer["param_groups"]:
            group |= {"lr": rate, "initial_lr": lr, "betas": betas, "weight_decay": weight_decay}
        scheduler["base_lrs"] = [lr for _ in scheduler["base_lrs"]]
        scheduler["_last_lr"] = [rate for _ in scheduler["_last_lr"]]
    _count_micro_batches(checkpoint, accumulate)


def _count_micro_batches(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Lightning steps whenever its count of micro-batches is a multiple of ``accumulate``: a checkpoint is taken after
    a step, and so the count has to be one too."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    off = checkpoint["global_step"] * accumulate - progress["current"]["processed"]
    for counts in (progress["total"], progress["current"]):
        for name in counts:
            counts[name] += off
