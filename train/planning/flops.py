"""Floating-point operations of a training step, counted as they are needed, and the rate that a GPU could reach.

Attention counts the blocks that survive. Backward: 2.5 times the forward for attention, once the forward for a frozen
layer (the gradient of its input), twice for what is trained. What a memory policy computes again is not counted, so
that two policies compare by the same yardstick: that is the M of MFU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from train.attention.step import StepAttention
from train.models.base import ModelAdapter

# dense bf16 matrix FLOP/s from the makers' data sheets; the first name that the device's name contains counts
PEAK_RATES = {
    "B300": 2.25e15,
    "B200": 2.25e15,
    "H200 NVL": 8.35e14,
    "H200": 9.89e14,
    "H100 NVL": 8.35e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "H800": 9.89e14,
    "A100": 3.12e14,
    "A800": 3.12e14,
    "L40S": 3.62e14,
    "RTX PRO 6000": 5.03e14,
    "RTX 5090": 2.095e14,
    "RTX 4090": 1.652e14,
    "RTX 3090": 7.1e13,
}


def peak_rate(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device, or None where the table does not know it."""
    return next((rate for name, rate in PEAK_RATES.items() if name in device_name), None)


@dataclass(frozen=True)
class SampleFlops:
    """One sample's forward, by part."""

    attention: float
    linear: float  # frozen, or trained where all weights are
    lora: float
    trains_all: bool

    @classmethod
    def of(cls, adapter: ModelAdapter, attention: StepAttention) -> SampleFlops:
        """Counts the model as it is: with its LoRA, if it has one, and the layers that are dense."""
        grid = attention.pattern_layout.grid
        lora = sum(_size(p) for n, p in adapter.transformers[0].named_parameters() if ".lora_" in n)
        return cls(
            attention=attention.attention_flops(*adapter.attention_shape),
            linear=adapter.linear_flops(grid),
            lora=2.0 * lora * grid.tokens,
            trains_all=lora == 0,
        )

    @property
    def step(self) -> float:
        """Forward and backward."""
        return 3.5 * self.attention + (3 if self.trains_all else 2) * self.linear + 3 * self.lora


def _size(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO 3 leaves an empty tensor
