"""The moving average of the trained weights (``optim.ema``), kept up to date."""

from __future__ import annotations

import math

import lightning as L

from train.callbacks.base import StepCallback
from train.step.module import LengthExtensionModule


class Averaging(StepCallback):
    """Moves the module's average after each step that changed weights; stands before all that measures or saves."""

    def on_step_end(self, trainer: L.Trainer, module: LengthExtensionModule) -> None:
        if module.average is not None and math.isfinite(module.gradient_norm):
            module.average.update(module.trained_weights(), trainer.global_step)
