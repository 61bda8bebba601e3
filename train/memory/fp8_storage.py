"""Frozen linear layers whose weights are stored in float8: half the memory of bfloat16, and half of what streams.

Each row of a weight, an output feature, is rounded to e4m3 (`train.memory.fp8`) with a float32 scale of its own, once.
Where the device has float8 products, both products of a step are made of that one copy:

    forward    x W^T    the scale of a row of W belongs to a column of the result: the product takes it
    backward   g W      here it belongs to what is summed over: it goes to the gradient before that is rounded

Elsewhere the weight is expanded to the precision of the computation, used, and forgotten. A weight whose numbers are
all e4m3 already, as in files of float8, keeps them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.memory.fp8 import exchange_linear, multiply, to_fp8, why_not


class StoredLinear(nn.Module):
    """A frozen ``nn.Linear`` whose weight is stored in float8.

    Args:
        linear: sizes multiples of 16.
        device: where it runs, and where its weight is rounded.
        home: where its weight is to lie: the device, or the CPU for `train.memory.weight_stream`.
        products: whether the device has float8 products.

    Takes and gives (..., features): any float dtype in, autocast's dtype or the input's own out.
    """

    def __init__(self, linear: nn.Linear, device: torch.device, home: torch.device, *, products: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.products = linear.in_features, linear.out_features, products
        rounded, scale = _rounded(linear.weight.detach().to(device))
        # as bytes: collectives and checkpoints know no float8
        self.weight = nn.Parameter(rounded.view(torch.uint8).to(home), requires_grad=False)
        self.scale = nn.Parameter(scale.to(home), requires_grad=False)
        bias = None if linear.bias is None else linear.bias.detach().to(home)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            rows = x.flatten(0, -2).to(dtype)
            product = _Float8 if self.products else _Expanded
            out: Tensor = product.apply(rows, self.weight, self.scale, self.bias)
        return out.to(dtype).unflatten(0, x.shape[:-1])


def store_fp8(layers: Sequence[nn.Module], device: torch.device, home: torch.device) -> int:
    """Exchanges the frozen linear modules in a model's layers, those under a LoRA too; returns how many.

    Args:
        layers: after the LoRA's injection, their weights anywhere, matrices in any dtype.
        device: where they run.
        home: where all of their weights lie afterwards.
    """
    products = why_not(device) is None
    count = exchange_linear(layers, lambda linear: StoredLinear(linear, device, home, products=products))
    for layer in layers:
        layer.to(home)
    return count


def expanded(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of stored bytes and scales (out, 1)."""
    return (weight.view(torch.float8_e4m3fn).float() * scale).to(dtype)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    same = weight.to(torch.float8_e4m3fn)
    if torch.equal(same.to(weight.dtype), weight):
        return same.contiguous(), torch.ones(len(weight), 1, device=weight.device)
    return to_fp8(weight)


class _Float8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.dtype = x.dtype
        narrow = None if bias is None else bias.to(torch.bfloat16)
        # as it is: of a result that went through an operation without effect, such as .to of its own dtype, torch
        # 2.11's compiler loses the gradient
        return multiply(x, weight, scale.t().contiguous(), narrow)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        ones = torch.ones(1, weight.shape[1], device=grad.device)
        return multiply(grad * scale.t(), weight.t().contiguous(), ones, None).to(ctx.dtype), None, None, None


class _Expanded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, expanded(weight, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return grad @ expanded(weight, scale, grad.dtype), None, None, None
