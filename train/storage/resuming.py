"""Going on with other settings: what cannot change."""

from __future__ import annotations

from pathlib import Path

from train.config.keys import value_of
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
    for key in ("lora.alpha", "lora.rslora") if before.lora is not None and now.lora is not None else ():
        was, given = value_of(before, key), value_of(now, key)
        if was != given:
            raise UserError(
                f"{key} is {given}, but the run has trained its LoRA with {was}, and it would act at another strength: "
                "leave it out, or start a new run"
            )
    if place.taken is None and now.clips_at_once() != before.clips_at_once():
        raise UserError(
            f"all devices together would take {now.clips_at_once():g} clips at once, they took "
            f"{before.clips_at_once():g}: the newest checkpoint is of a version that cannot change this. Go on as "
            "before until the next checkpoint, then change it"
        )


def _newest(folder: Path) -> Place | None:
    """The place of the newest checkpoint that can be read; None where there is none."""
    for path in reversed(checkpoints_of(folder / "checkpoints")):
        try:
            return place_of(path)
        except UserError:
            continue  # damaged: training goes on from one before it
    return None
