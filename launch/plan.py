"""``python -m launch plan``: memory, time and settings of a run, before a GPU is touched."""

from __future__ import annotations

from train.compose import compose_run, finish, split_arguments
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
)

USAGE = f"""python -m launch plan [conf=RUN] [nodes=1] [gpus=N] [gpu={"|".join(GPUS)}] [cpu_memory=GIB] [key=value ...]

Memory by part, seconds a step, hours and GPU-hours of a run, dense beside its own attention; the best setting for these
GPUs, the fewest GPUs that do, and what to change where nothing fits. Needs neither GPU nor weights.

  nodes, gpus    nodes, and GPUs of each (trainer.devices if not given)
  gpu            their kind; h200 if not given
  cpu_memory     GiB of CPU memory of each node; 128 for each GPU if not given

Other keys are those of the run: conf=wan_4x clip.frames=161 parallel.sequence=2 trainer.compile=true"""
_CPU_GIB = 128  # for each GPU of a node
_BATCH_KEYS = ("optim.accumulate", "data.batch_size", "trainer.devices", "parallel.sequence")


def main(arguments: list[str]) -> None:
    """Prints the plan."""
    settings = split_arguments(arguments)
    nodes = _number("nodes", settings.pop("nodes", "1"))
    gpu = gpu_named(settings.pop("gpu", "h200"))
    words = {key: settings.pop(key, None) for key in ("gpus", "cpu_memory")}
    config = finish(compose_run(settings))
    gpus = config.trainer.devices if words["gpus"] is None else _number("gpus", words["gpus"])
    gib = gpus * _CPU_GIB if words["cpu_memory"] is None else _number("cpu_memory", words["cpu_memory"])
    recipe = config.clips_at_once() * config.optim.accumulate  # the global batch of the run file
    machine = Machine(gpu, gpus, nodes, gib * GIB)
    budget = Budget.of(config, machine)
    if budget is None:
        raise UserError(f"the dimensions of {config.model.path} are not known: give model.path=<local folder>")
    if machine.world % budget.sequence:
        sizes = ", ".join(str(n) for n in range(1, machine.world + 1) if machine.world % n == 0)
        raise UserError(f"parallel.sequence is {budget.sequence}, expected a divisor of {machine.world} GPUs: {sizes}")
    if any(key in settings for key in _BATCH_KEYS):
        recipe = Duration(budget).clips_a_step
    print("\n".join(plan_lines(budget, recipe)))


def plan_lines(budget: Budget, clips_a_step: float) -> list[str]:
    """The table, whether the run fits as it is, and the settings that do.

    Args:
        clips_a_step: the global batch that suggested settings keep.
    """
    lines = [plan_table(budget), ""]
    lines.append("fits as it is" if budget.misfit is None else f"does not fit as it is: {budget.misfit}")
    if (planned := Duration(budget).clips_a_step) != clips_a_step:
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


def _number(key: str, word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise UserError(f"{key} is {word!r}, expected a whole number of at least 1")
    return int(word)
