"""Which backend computes a run's attention in training, by the backends' own word, and how fast it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from radial import Dense, VideoGrid, build_head_layouts, build_layout
from radial.backends import BACKENDS, AttentionCall, choose_backend
from train.errors import UserError
from train.planning import calibration

if TYPE_CHECKING:
    from train.planning.budget import Budget

_PLAIN = "torch"  # the one backend that serves everything and is no kernel
_KERNELS_BLOCK = 128  # tokens; every kernel takes it
_SMALL = VideoGrid(2, 8, 16)


def training_call(budget: Budget, *, beside: bool = False) -> AttentionCall:
    """The call that a layer of the run makes in training.

    Args:
        beside: of a layer or step that is dense beside the run's pattern (`train.attention.step`).
    """
    config, machine, sizes = budget.config, budget.machine, budget.sizes
    recipe, grid = budget.attention, config.grid()
    if beside or isinstance(recipe.pattern, Dense):  # of a small grid: a long clip's full lists take gigabytes
        layout = build_layout(Dense(), _SMALL, _KERNELS_BLOCK if beside else recipe.block)
    else:
        layout = build_layout(recipe.pattern, grid, recipe.block)
    heads = None
    if layout.by_head:
        heads = build_head_layouts(recipe.pattern, grid, recipe.block, layers=sizes.layers, heads=sizes.heads)
        heads = heads.part(0, budget.sequence)
    return AttentionCall(
        device=torch.device("cpu" if machine.is_cpu else "cuda"),
        dtype=torch.bfloat16 if machine.precision(config.trainer.precision) == "bf16" else torch.float32,
        head_dim=sizes.head_dim,
        needs_grad=True,
        masks_text=grid.text_tokens > 0,
        layout=heads or layout,
        planned_for=None if machine.is_cpu or machine.gpu.here else machine.gpu.capability,
    )


def training_backend(budget: Budget, *, beside: bool = False) -> str:
    """The name of the backend that serves `training_call`.

    Raises:
        UserError: the one that ``attention.backend`` names does not.
    """
    call, name = training_call(budget, beside=beside), budget.config.attention.backend
    if name is None or beside:
        return choose_backend(call).name
    reason = BACKENDS[name].why_not(call)
    if reason is not None:
        where = "the CPU" if budget.machine.is_cpu else f"an {budget.machine.gpu.name}"
        raise UserError(
            f"attention.backend is {name}, which cannot train this run on {where}: {reason}; set "
            "attention.backend=null for the fastest that can"
        )
    return name


def serves(budget: Budget) -> bool:
    """Whether the run's attention can train there."""
    try:
        training_backend(budget)
    except UserError:
        return False
    return True


def trains_plainly(budget: Budget) -> bool:
    """Whether the run's attention trains on a GPU without a kernel of it."""
    return not budget.machine.is_cpu and training_backend(budget) == _PLAIN


def measured_rates(budget: Budget, *, dense: bool) -> Sequence[tuple[int, float, float]] | None:
    """The rows of `calibration` for layers that are dense, or have the run's pattern; None where nobody measured the
    backend."""
    every = budget.config.attention.pattern == "dense"
    name = training_backend(budget, beside=dense and not every)
    dense = dense or every
    return (calibration.DENSE.get(name) if dense else None) or calibration.SPARSE.get(name)


def without_kernel(budget: Budget) -> str | None:
    """Why the run's attention trains without a kernel of its GPU, and what to set, in a line; None where it has one."""
    if not trains_plainly(budget):
        return None
    said = "attention trains on plain torch, many times slower than on a kernel, and no plan knows how slow"
    attention, call = budget.config.attention, training_call(budget)
    if attention.backend == _PLAIN:
        return f"{said}: attention.backend={_PLAIN} asks for it"
    if attention.block != _KERNELS_BLOCK:
        wider = replace(budget.config, attention=replace(attention, block=_KERNELS_BLOCK))
        kernel = training_backend(replace(budget, config=wider))
        if kernel != _PLAIN:
            reason = BACKENDS[kernel].why_not(call)
            return f"{said}: {kernel} does not serve ({reason}); attention.block={_KERNELS_BLOCK} trains on {kernel}"
    reasons = [f"{name}: {backend.why_not(call)}" for name, backend in BACKENDS.items() if name != _PLAIN]
    return f"{said}: {'; '.join(reasons)}"
