"""``python -m launch plan``: memory, time and settings of a run, before a GPU is touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from radial.cli.command import Command
from radial.cli.settings import at_least, setting
from train.config.compose import compose_run, finish
from train.config.schema import RunConfig
from train.errors import UserError
from train.planning import (
    GIB,
    GPUS,
    Budget,
    Duration,
    Machine,
    best,
    fewest,
    plan_table,
    remedies,
    setting_lines,
)
from train.storage.stored_plan import store_plan

CPU_GIB = 128  # for each GPU of a node


@dataclass
class Options:
    """The machines that a run is planned for."""

    nodes: int | None = setting("nodes; null: trainer.nodes", None, must=at_least(1))
    gpus: int | None = setting("GPUs of each node; null: trainer.devices", None, must=at_least(1))
    gpu: str = setting("their kind", "h200", tuple(GPUS))
    cpu_memory: int | None = setting(
        f"CPU memory of each node; null: {CPU_GIB} for each GPU", None, unit="GiB", must=at_least(1)
    )


def plan(options: Options, settings: dict[str, str]) -> None:
    """Prints the plan."""
    config = finish(compose_run(settings))
    nodes, gpus = options.nodes or config.trainer.nodes, options.gpus or config.trainer.devices
    gpu, gib = GPUS[options.gpu], options.cpu_memory or gpus * CPU_GIB
    machine = Machine(gpu, gpus, nodes, gib * GIB)
    budget = Budget.of(config, machine)
    if budget is None:
        raise UserError(f"the dimensions of {config.model.path} are not known: give model.path=<local folder>")
    print("\n".join(plan_lines(budget)))


def show_plan(folder: Path, config: RunConfig, machine: Machine, *, quiet: bool = False) -> Budget | None:
    """Prints the plan of a run and keeps it in its folder, for the report to set beside what is measured.

    Args:
        quiet: keeps it without printing.

    Returns:
        What was planned; None where the model's dimensions are not known yet.
    """
    budget = Budget.of(config, machine)
    if budget is None:
        if not quiet:
            print(f"no plan: the dimensions of {config.model.path} are not known before its weights are there\n")
        return None
    text = "\n".join(plan_lines(budget))
    if not quiet:
        print(f"{text}\n")
    store_plan(folder, budget, text)
    return budget


def plan_lines(budget: Budget) -> list[str]:
    """The table, whether the run fits as it is, and the settings that do, with as many clips a step."""
    clips_a_step = _clips_a_step(budget)
    # otherwise there is nothing to tabulate
    lines = [plan_table(budget), ""] if budget.unshared is None else []
    lines.append("fits as it is" if budget.misfit is None else f"does not fit as it is: {budget.misfit}")
    here = best(budget, clips_a_step)
    if here is None:
        lines += ["no setting fits these GPUs; what would:"]
        lines += [f"  {remedy}" for remedy in remedies(budget, clips_a_step)] or ["  nothing that a plan knows"]
        return lines
    lines += setting_lines("fastest here", here)
    fewer = fewest(budget, clips_a_step, budget.machine.world)
    if fewer is not None and fewer.budget.machine.world < budget.machine.world:
        lines += setting_lines("fewest GPUs", fewer)
    return lines


def _clips_a_step(budget: Budget) -> float:
    """What the run asks for, which these GPUs may be unable to share."""
    optim = budget.config.optim
    if optim.accumulate is None and optim.global_batch is not None:
        return float(optim.global_batch)
    return Duration(budget).clips_a_step


main = Command(
    "python -m launch plan",
    "Memory by part, seconds a step, hours and GPU-hours of a run, dense beside its own attention; the best setting "
    "for these GPUs, the fewest GPUs that do, and what to change where nothing fits. Needs neither GPU nor weights.",
    Options,
    plan,
    ["python -m launch plan conf=wan_4x nodes=2 gpus=8 gpu=h100"],
    others="those of the run: conf=wan_4x clip.frames=161 parallel.sequence=2 trainer.compile=true",
)
