"""``python -m launch plan``: memory, time and settings of a run, before a GPU is touched."""

from __future__ import annotations

from pathlib import Path

from train.cli import whole_number
from train.compose import compose_run, finish, split_arguments
from train.config import RunConfig
from train.errors import UserError
from train.planning import (
    GIB,
    GPUS,
    Budget,
    Duration,
    Machine,
    best,
    fewest,
    gpu_named,
    plan_table,
    remedies,
    setting_lines,
    store_plan,
)

USAGE = f"""python -m launch plan [conf=RUN] [nodes=1] [gpus=N] [gpu={"|".join(GPUS)}] [cpu_memory=GIB] [key=value ...]

Memory by part, seconds a step, hours and GPU-hours of a run, dense beside its own attention; the best setting for these
GPUs, the fewest GPUs that do, and what to change where nothing fits. Needs neither GPU nor weights.

  nodes, gpus    nodes, and GPUs of each (trainer.nodes, trainer.devices if not given)
  gpu            their kind; h200 if not given
  cpu_memory     GiB of CPU memory of each node; 128 for each GPU if not given

Other keys are those of the run: conf=wan_4x clip.frames=161 parallel.sequence=2 trainer.compile=true"""
CPU_GIB = 128  # for each GPU of a node
_BATCH_KEYS = ("optim.accumulate", "data.batch_size", "trainer.nodes", "trainer.devices", "parallel.sequence")


def main(arguments: list[str]) -> None:
    """Prints the plan."""
    settings = split_arguments(arguments)
    gpu = gpu_named(settings.pop("gpu", "h200"))
    given = {key: whole_number(key, settings.pop(key)) for key in ("nodes", "gpus", "cpu_memory") if key in settings}
    config = finish(compose_run(settings))
    nodes, gpus = given.get("nodes", config.trainer.nodes), given.get("gpus", config.trainer.devices)
    gib = given.get("cpu_memory", gpus * CPU_GIB)
    recipe = config.clips_at_once() * config.optim.accumulate  # the global batch of the run file
    machine = Machine(gpu, gpus, nodes, gib * GIB)
    budget = Budget.of(config, machine)
    if budget is None:
        raise UserError(f"the dimensions of {config.model.path} are not known: give model.path=<local folder>")
    if any(key in settings for key in _BATCH_KEYS):
        recipe = Duration(budget).clips_a_step
    print("\n".join(plan_lines(budget, recipe)))


def show_plan(folder: Path, config: RunConfig, machine: Machine) -> None:
    """Prints the plan of a run and keeps it in its folder, for the report to set beside what is measured."""
    budget = Budget.of(config, machine)
    if budget is None:
        print(f"no plan: the dimensions of {config.model.path} are not known before its weights are there\n")
        return
    text = "\n".join(plan_lines(budget, config.clips_at_once() * config.optim.accumulate))
    print(f"{text}\n")
    store_plan(folder, budget, text)


def plan_lines(budget: Budget, clips_a_step: float) -> list[str]:
    """The table, whether the run fits as it is, and the settings that do.

    Args:
        clips_a_step: the global batch that suggested settings keep.
    """
    shared = budget.machine.gpus % budget.sequence == 0  # otherwise there is nothing to tabulate
    lines = [plan_table(budget), ""] if shared else []
    lines.append("fits as it is" if budget.misfit is None else f"does not fit as it is: {budget.misfit}")
    if shared and (planned := Duration(budget).clips_a_step) != clips_a_step:
        lines.append(f"{planned:g} clips a step on these GPUs; the settings below keep the run file's {clips_a_step:g}")
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
