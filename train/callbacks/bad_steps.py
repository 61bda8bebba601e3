"""Steps whose loss or gradient is not a finite number: skipped, counted and named; too many end the run."""

from __future__ import annotations

import math
from typing import Any

import lightning as L

from train.callbacks.base import StepCallback
from train.errors import UserError
from train.parallel.control_group import ControlGroup
from train.step.module import LengthExtensionModule


class BadSteps(StepCallback):
    """Counts the steps that `LengthExtensionModule` has skipped, and names their samples.

    Args:
        limit: skipped steps, over the whole run, that do not end it.
    """

    def __init__(self, limit: int, control: ControlGroup) -> None:
        super().__init__()
        self.limit, self.control = limit, control
        self.skipped = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.control.open(trainer)

    def on_step_end(self, trainer: L.Trainer, module: LengthExtensionModule) -> None:
        if math.isfinite(module.gradient_norm):  # the same on every rank
            return
        self.skipped += 1
        mine = [(each.key, each.loss.item()) for each in module.seen]
        every = [entry for entries in self.control.gather(mine) for entry in entries]
        said, step = _named(every), trainer.global_step
        if self.control.rank == 0:
            trainer.print(f"\nwarning: step {step}: {said}; skipped ({self.skipped} of at most {self.limit})")
        if self.skipped > self.limit:
            raise UserError(
                f"step {step} was the {_ordinal(self.skipped)} whose loss or gradient is not finite, more than "
                f"trainer.max_skipped={self.limit}; the last: {said}. The weights are those before it. Look at the "
                "sample with python -m data.check, lower optim.lr, or allow more"
            )


def _named(samples: list[tuple[str, float]]) -> str:
    bad = {key: loss for key, loss in samples if not math.isfinite(loss)}
    if bad:
        return ", ".join(f"the loss of sample {key} is {loss}" for key, loss in bad.items())
    return f"the gradient is not finite, of one of the samples {', '.join(dict(samples))}"


def _ordinal(number: int) -> str:
    tail = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{tail}"
