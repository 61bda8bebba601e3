"""AdamW and the learning rate of each step.

An optimizer's and a scheduler's saved state hold the numbers of the settings that they were made with. Loaded as they
are, these would win over settings that a resume changes. So the checkpoint is changed as it is read, before any
strategy takes it apart: new settings hold from the first step on under every strategy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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
        lora_plus: learning rate of the LoRA's B (and a DoRA's norms) over that of its A (arXiv 2402.12354, LoRA+).
        warmup: steps in which the learning rate rises to ``lr``.
        decay: after them: ``constant``, or ``cosine`` down to zero.
    """

    steps: int
    accumulate: int = 1
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    lora_plus: float = 1.0
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
            lora_plus=optim.lora_plus,
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

    @property
    def rates(self) -> list[float]:
        """The learning rate of each group of parameters after the warm-up: of all, or of A and of the rest."""
        return [self.lr] if self.lora_plus == 1 else [self.lr, self.lr * self.lora_plus]

    def grouped(self, names: Iterable[str]) -> list[list[str]]:
        """The names of trained parameters in the optimizer's groups."""
        return _by_rate(names, len(self.rates))

    def configured(self, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        """Lightning's optimizer and scheduler over some parameters by their names."""
        groups = [
            {"params": [parameters[name] for name in group], "lr": rate}
            for group, rate in zip(self.grouped(parameters), self.rates, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, betas=self.betas, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def follow(self, checkpoint: dict[str, Any], names: Sequence[str]) -> None:
        """Changes a checkpoint, as `train.storage.checkpoints` reads it, to go on with these settings.

        Args:
            names: of the trained parameters, in the model's order.
        """
        for optimizer, scheduler in zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=True):
            factor = self.factor(scheduler["last_epoch"])
            saved = optimizer["param_groups"]
            before = chain.from_iterable(_by_rate(names, len(saved)))
            number = dict(zip(before, chain.from_iterable(group["params"] for group in saved), strict=True))
            own = {"betas": self.betas, "weight_decay": self.weight_decay}
            optimizer["param_groups"] = [
                {**saved[0], **own, "lr": rate * factor, "initial_lr": rate, "params": [number[name] for name in group]}
                for group, rate in zip(self.grouped(names), self.rates, strict=True)
            ]
            scheduler["base_lrs"] = self.rates
            scheduler["_last_lr"] = [rate * factor for rate in self.rates]
            scheduler["lr_lambdas"] = [None for _ in self.rates]  # none of them has a state
        self._count_micro_batches(checkpoint)

    def _count_micro_batches(self, checkpoint: dict[str, Any]) -> None:
        """Lightning steps whenever its count of micro-batches is a multiple of ``accumulate``: a checkpoint is taken
        after a step, and so the count has to be one too."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        off = checkpoint["global_step"] * self.accumulate - progress["current"]["processed"]
        for counts in (progress["total"], progress["current"]):
            for name in counts:
                counts[name] += off


def _by_rate(names: Iterable[str], groups: int) -> list[list[str]]:
    """All names in one group, or in two: a LoRA's A, and the rest."""
    if groups == 1:
        return [list(names)]
    halves: tuple[list[str], list[str]] = ([], [])
    for name in names:
        halves[".lora_A." not in name].append(name)
    return list(halves)
