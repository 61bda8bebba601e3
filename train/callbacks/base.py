"""What the callbacks share: they act once after an optimizer step, not after each of its micro-batches."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from train.step.module import LengthExtensionModule


class StepCallback(Callback):
    """A callback of optimizer steps: Lightning's own hook runs after each micro-batch, and a step may have many."""

    def __init__(self) -> None:
        self._seen = -1

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._seen = trainer.global_step  # a resumed run has made that step before

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        self.on_step_end(trainer, cast(LengthExtensionModule, module))

    @abstractmethod
    def on_step_end(self, trainer: L.Trainer, module: LengthExtensionModule) -> None:
        """After each optimizer step; ``trainer.global_step`` counts the finished ones."""


def every(steps: int, trainer: L.Trainer) -> bool:
    """Whether what happens every so many steps, and after the last, is due now; 0 is never."""
    return steps > 0 and (trainer.global_step % steps == 0 or trainer.global_step == trainer.max_steps)
