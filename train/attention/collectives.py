"""Collectives of a sequence-parallel group whose backward is their exact adjoint.

    forward                         backward
    all-to-all (equal parts)        all-to-all: it is its own inverse, and the transpose of itself
    all-gather along a dimension    reduce-scatter with sum along it

A slice needs nothing of its own: autograd's zero-padding is its adjoint. With these, the derivative of the sum of all
ranks' losses is exact for every rank's copy of a parameter. They are functional collectives, which torch.compile traces
without a graph break.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as functional


def all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """Part i of ``x`` goes to rank i; what rank j sent becomes part j.

    Args:
        x: (group size, ...): one part a rank.
    """
    return _AllToAll.apply(x, group)


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The ranks' tensors, all of one shape, after each other along ``dim``."""
    return _AllGather.apply(x, dim, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return functional.wait_tensor(functional.all_to_all_single(x.contiguous(), None, None, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_to_all(gradient, ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return functional.wait_tensor(functional.all_gather_tensor(x.contiguous(), dim, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        scattered = functional.reduce_scatter_tensor(gradient.contiguous(), "sum", ctx.dim, ctx.group)
        return functional.wait_tensor(scattered), None, None
