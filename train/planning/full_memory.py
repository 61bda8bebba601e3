"""Memory that is too small: by the plan before a run, and in truth when it happens; what would help, cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from train.config.global_batch import clips_a_step
from train.config.schema import RunConfig
from train.errors import UserError
from train.planning.advice import best, remedies
from train.planning.budget import Budget
from train.planning.hardware import GPUS
from train.planning.table import plan_table

_FULL = "out of memory"


def check_memory(config: RunConfig) -> None:
    """Refuses a run that by the plan does not fit this machine's memory.

    Raises:
        UserError: it cannot; with the plan's table and what to change. ``trainer.check_memory=false`` tries anyway.
    """
    if not config.trainer.check_memory:
        return
    budget = Budget.here(config)
    if budget is None or budget.misfit is None:
        return
    clips = clips_a_step(config)
    here = best(budget, clips)
    fixes = [f"here: {' '.join(here.keys)}"] if here is not None else []
    raise UserError(
        "\n".join(
            [
                f"this run does not fit: {budget.misfit}",
                *["", plan_table(budget), ""],
                "what would work:",
                *[f"  {fix}" for fix in [*fixes, *([] if here is not None else remedies(budget, clips))]],
                "  trainer.check_memory=false tries all the same",
            ]
        )
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was full: for a tensor, or for what CUDA and NCCL take by themselves, which is no error of its own
    kind."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and _FULL in str(error))


def out_of_memory(config: RunConfig, error: BaseException, rank: int) -> str:
    """The message of a full memory: on which rank, how much was asked for, and the plan's three cheapest remedies."""
    return f"rank {rank}: {asked_for(error)}. Cheapest first: {'; '.join(cheapest(config))}"


@contextmanager
def memory_in_words(remedy: str) -> Iterator[None]:
    """Puts a full memory into words: how much was asked for, and what to do.

    Raises:
        UserError: memory was full.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{asked_for(error)}. {remedy}") from error


def asked_for(error: BaseException) -> str:
    """A full memory in one line, with how much was asked for."""
    text = str(error)
    line = next((line for line in text.splitlines() if _FULL in line), text)
    return f"out of memory: {line.split('. GPU')[0].rstrip('.')}"


def cheapest(config: RunConfig) -> list[str]:
    """At most three changes, in the plan's words, after which the run takes at least a tenth less of a GPU's memory."""
    budget = Budget.here(config)
    if budget is None:
        return ["parallel.activations=auto", "a shorter clip (clip.frames)", "more GPUs a clip (parallel.sequence)"]
    machine = budget.machine
    # it fitted by the plan and did not in truth: look for what fits well below both
    room = 0.9 * min(machine.gpu.memory, budget.gpu_memory)
    tighter = replace(budget, machine=replace(machine, gpu=replace(machine.gpu, memory=room)))
    clips = clips_a_step(config)
    here = best(tighter, clips)
    found = [f"on these GPUs: {' '.join(here.keys)}"] if here is not None else []
    for remedy in remedies(tighter, clips):
        # not the GPU that is here
        known = any(f"gpu={name}:" in remedy for name, gpu in GPUS.items() if gpu.memory <= machine.gpu.memory)
        found += [] if known else [remedy]
    return found[:3]
