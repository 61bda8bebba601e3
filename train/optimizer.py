"""AdamW and the learning rate of each step.

An optimizer's and a scheduler's saved state hold the numbers of the settings that they were made with. Loaded as they
are, these would win over settings that a resume changes. So the checkpoint is changed as it is read, before any
strategy takes it apart: new settings hold from the first step on under every strategy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from train.config.global_batch import micro_batches
from train.config.schema import RunConfig


@dataclass(frozen=True)
class Optimization:
    """How a run changes its weights.

    Attributes:
        steps: optimizer steps of the run.
        accumulate: micro-batches in a step, all of one expert where there are two.
        lr, betas, weight_decay: of AdamW.
        warmup: steps in which the learning rate rises to ``lr``.
        decay: after them: ``constant``, or ``cosine`` down to zero.
    """

    steps: int
    accumulate: int = 1
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup: int = 0
    decay: str = "constant"

    @classmethod
    def of(cls, config: RunConfig) -> Optimization:
        optim = config.optim
        return cls(
            steps=config.trainer.steps,
            accumulate=micro_batches(config),
            lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]),
            weight_decay=optim.weight_decay,
            warmup=optim.warmup,
            decay=optim.decay,
        )

    def factor(self, step: int) -> float:
        """The learning rate of a step (from 0) as a multiple of ``lr``."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.decay == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def configured(self, parameters: Sequence[Parameter]) -> dict[str, Any]:
        """Lightning's optimizer and scheduler over some parameters."""
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def follow(self, checkpoint: dict[str, Any]) -> None:
        """Changes a checkpoint, as `train.storage.checkpoints` reads it, to go on with these settings."""
        for optimizer, scheduler in zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=True):
            rate = self.lr * self.factor(scheduler["last_epoch"])
            own = {"lr": rate, "initial_lr": self.lr, "betas": self.betas, "weight_decay": self.weight_decay}
            for group in optimizer["param_groups"]:
                group |= own
            scheduler["base_lrs"] = [self.lr for _ in scheduler["base_lrs"]]
            scheduler["_last_lr"] = [rate for _ in scheduler["_last_lr"]]
        self._count_micro_batches(checkpoint)

    def _count_micro_batches(self, checkpoint: dict[str, Any]) -> None:
        """Lightning steps whenever its count of micro-batches is a multiple of ``accumulate``: a checkpoint is taken
        after a step, and so the count has to be one too."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        off = checkpoint["global_step"] * self.accumulate - progress["current"]["processed"]
        for counts in (progress["total"], progress["current"]):
            for name in counts:
                counts[name] += off
