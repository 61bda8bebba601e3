"""Tokens in another order, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reordered(x: Tensor, order: Tensor, inverse: Tensor, dim: int = 1) -> Tensor:
    """``x`` with its entry ``order[p]`` at position ``p`` of a dimension.

    The gradient is a gather too, where that of `torch.index_select` is a sum at each index.

    Args:
        x: any tensor.
        order: (entries of ``dim``,) int64, a permutation.
        inverse: the inverse permutation, int64.
        dim: the dimension.
    """
    out: Tensor = _Reorder.apply(x, order, inverse, dim)
    return out


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, dim: int) -> Tensor:
        ctx.inverse, ctx.dim = inverse, dim  # needs no gradient, and may have been made under inference_mode
        return x.index_select(dim, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient.index_select(ctx.dim, ctx.inverse), None, None, None
