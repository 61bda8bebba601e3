"""Frozen linear layers in float8: products of e4m3 numbers, accumulated in higher precision (torch's scaled matmul).

e4m3 has 3 bits after the leading one and reaches 448, so each operand is divided by scales that bring its largest
number there. Scales belong to what survives the sum: one for each row of the left matrix (a token) and one for each
column of the right one (a feature), so that a token with a large feature spoils no other:

    out[i, j] = row[i] column[j] sum_k left8[i, k] right8[k, j]

The weight is frozen, so it is rounded once: for the forward x W^T along its input features, and for the backward g W
along its output features. The two copies take the memory of the one in bfloat16. Activations and gradients are rounded
when they arrive, both to e4m3: scales of their own leave gradients enough range, and e5m2 has a bit less to round to.
LoRA weights, and everything that is no linear layer, stay as they are.

The hardware's float8 rate is twice that of bfloat16. What a step gains, and its error, are in the README.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.errors import UserError

LARGEST = 448.0  # of e4m3
_STEP = 16  # hardware takes matrices whose sizes are multiples of it


class Fp8Linear(nn.Module):
    """A frozen ``nn.Linear`` whose two products, forward and backward, are float8.

    Args:
        linear: sizes multiples of 16, any dtype; its bias stays in bfloat16.
        device: where its weight is rounded; the result lies where the weight does.

    Takes and gives (..., features): any float dtype in, autocast's dtype or the input's own out.
    """

    weight_forward: Tensor
    weight_backward: Tensor
    scale_forward: Tensor
    scale_backward: Tensor

    def __init__(self, linear: nn.Linear, device: torch.device | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        home = linear.weight.device
        weight = linear.weight.detach().to(device or home)
        for name, matrix in (("forward", weight), ("backward", weight.t())):
            rounded, scale = to_fp8(matrix)
            # as bytes: collectives and checkpoints know no float8
            found = {f"weight_{name}": rounded.view(torch.uint8), f"scale_{name}": scale.t().contiguous()}
            for key, tensor in found.items():
                self.register_parameter(key, nn.Parameter(tensor.to(home), requires_grad=False))
        bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            out: Tensor = _Product.apply(
                x.flatten(0, -2),
                *(self.weight_forward, self.scale_forward, self.weight_backward, self.scale_backward, self.bias),
            )
        return out.to(dtype).unflatten(0, x.shape[:-1])


def to_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (m, n) rounded to e4m3, contiguous, and the scales of its rows, (m, 1) float32."""
    # gradients of a long clip's mean loss times a weight's scale are far below 1e-12: only zeros need the bound
    scale = matrix.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / LARGEST
    exact = matrix / scale  # float32 by its scale, one copy: a feed-forward's middle is large
    return exact.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn).contiguous(), scale


def use_fp8(layers: Sequence[nn.Module], device: torch.device) -> int:
    """Exchanges the frozen linear modules in a model's layers, those under a LoRA too; returns how many.

    Args:
        layers: after the LoRA's injection, their weights where they stay: on the device, or in CPU memory.
        device: where they run.

    Raises:
        UserError: as `check_fp8`.
    """
    check_fp8(device)
    return exchange_linear(layers, lambda linear: Fp8Linear(linear, device))


def exchange_linear(layers: Sequence[nn.Module], make: Callable[[nn.Linear], nn.Module]) -> int:
    """Puts what ``make`` makes of them in the place of all frozen linear layers that `fits`; returns how many."""
    exchanged = 0
    for parent in [module for layer in layers for module in layer.modules()]:
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not child.weight.requires_grad and fits(child):
                setattr(parent, name, make(child))
                exchanged += 1
    return exchanged


def check_fp8(device: torch.device) -> None:
    """Raises a UserError for a device, or a torch, without such products."""
    reason = why_not(device)
    if reason is not None:
        raise UserError(f"trainer.fp8 is true, but {reason}")


def why_not(device: torch.device) -> str | None:
    """Why a device, with this torch, has no such products, in words; None where it has."""
    square = torch.ones(_STEP, _STEP, device=device)
    rounded, scale = to_fp8(square)
    try:
        multiply(square, rounded.view(torch.uint8), scale.t().contiguous(), None)
    except RuntimeError as error:
        name, wanted = "the CPU", "torch 2.13, which has them there, or a GPU"
        if device.type == "cuda":
            name, wanted = torch.cuda.get_device_name(device), "compute capability 8.9 (Ada, Hopper) or later"
        return (
            f"torch {torch.__version__} has no float8 products with a scale for each row on {name} "
            f"({str(error).splitlines()[0]}): expected {wanted}"
        )
    return None


def fits(layer: nn.Linear) -> bool:
    """Whether a layer has sizes that float8 products take."""
    return layer.in_features % _STEP == 0 and layer.out_features % _STEP == 0


def multiply(left: Tensor, right_bytes: Tensor, right_scale: Tensor, bias: Tensor | None) -> Tensor:
    """left (m, k) times the matrix whose transpose is ``right_bytes`` (n, k): (m, n) bfloat16."""
    rounded, scale = to_fp8(left)
    right = right_bytes.view(torch.float8_e4m3fn).t()
    # torch.nn.functional.scaled_mm, its public name, breaks the graph of torch 2.11's compiler
    product: Tensor = torch._scaled_mm(
        rounded, right, scale, right_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, weight_back: Tensor, scale_back: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight_back, scale_back)
        ctx.dtype = x.dtype
        return multiply(x, weight, scale, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return multiply(grad, weight, scale, None).to(ctx.dtype), None, None, None, None, None
