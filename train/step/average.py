"""The moving average of what is trained: smoother than the weights of any one step.

    average <- d average + (1 - d) weights        d = min(decay, (1 + step) / (10 + step))

The decay grows with the steps, much as in diffusers' training scripts: with 0.999 from the first step on, a run of
2,500 steps would keep 8 % of a LoRA that does nothing. Lightning's ``EMAWeightAveraging`` copies the whole module, the
frozen weights too, and knows no model that is spread over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightAverage:
    """Whole fp32 tensors on every rank, by the names of `train.step.module.LengthExtensionModule.trained_weights`.

    Args:
        decay: the share of the average that stays in a step, of many steps.

    Attributes:
        weights: the average; empty before `start`, unless a checkpoint had one.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the weights of now where a checkpoint has not brought an average, to where they are."""
        self.weights = {
            name: self.weights.get(name, weight).to(weight.device, torch.float32, copy=True)
            for name, weight in weights.items()
        }

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Moves the average towards the weights after a step, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in weights.items():
            self.weights[name].lerp_(weight.float(), 1 - decay)
