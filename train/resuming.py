"""What of a checkpoint gives way to the settings that a resumed run has now.

An optimizer's and a scheduler's saved state hold numbers of the settings that they were made with. Loaded as they are,
these would win over settings that a resume changes. The changes are made in the checkpoint as it is read, before any
strategy takes it apart, so that they act from the first step on under all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def follow_settings(
    checkpoint: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    factor: Callable[[int], float],
    accumulate: int,
) -> None:
    """Changes a checkpoint, as `train.checkpoint` reads it, to go on with these settings.

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
