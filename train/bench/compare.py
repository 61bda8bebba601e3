"""``python -m train.bench.compare``: the plan's figures of measured steps, beside the measured ones.

Each file is one that ``python -m train.bench --json`` wrote; its cases are planned anew for the machine that it names,
with what layers kept then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from radial.cli.command import Command
from radial.cli.settings import setting
from train.bench.steps import case_of, config_of
from train.errors import UserError
from train.memory.layer_policies import LayerPolicies
from train.planning.budget import GIB, Budget
from train.planning.duration import Duration
from train.planning.hardware import GPUS, Gpu, Machine


@dataclass(frozen=True)
class Case:
    """One measured case and its prediction.

    Attributes:
        name: what was measured, in words.
        memory, predicted_memory: GiB, the GPU's peak.
        seconds, predicted_seconds: of a step.
        parts, predicted_parts: seconds of a step by kind.
    """

    name: str
    memory: float
    predicted_memory: float
    seconds: float
    predicted_seconds: float
    parts: dict[str, float]
    predicted_parts: dict[str, float]

    @property
    def memory_off(self) -> float:
        """How far the predicted memory is off, as a share of the measured."""
        return self.predicted_memory / self.memory - 1

    @property
    def seconds_off(self) -> float:
        """How far the predicted time is off, as a share of the measured."""
        return self.predicted_seconds / self.seconds - 1


def cases(file: Path) -> list[Case]:
    """The cases of a benchmark's file that ran on GPUs that a plan knows.

    Raises:
        UserError: no file of train.bench, or nothing in it was measured on such a GPU.
    """
    try:
        measured = json.loads(file.read_text(encoding="utf-8"))
        config = config_of(measured["arguments"])
        found = [_case(config, result, measured) for result in measured["results"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not a file of python -m train.bench --json ({error!r})") from error
    known = [case for case in found if case is not None]
    if not known:
        gpus = ", ".join(g.name for g in GPUS.values())
        raise UserError(f"{file}: nothing in it was measured on a GPU and an attention backend that plans know: {gpus}")
    return known


def _case(config: Any, result: dict[str, Any], measured: dict[str, Any]) -> Case | None:
    gpu = next((gpu for gpu in GPUS.values() if result["device"].startswith(gpu.name)), None)
    if gpu is None:
        return None
    ranks = result["sp"]
    config = case_of(config, result["pattern"])
    config = replace(
        config,
        attention=replace(config.attention, dense_steps=0, dense_sigma=None),
        parallel=replace(config.parallel, sequence=ranks),
        optim=replace(config.optim, accumulate=1),
    )
    budget = Budget.of(config, _machine(gpu, ranks, measured), result["layers"])
    assert budget is not None
    if result.get("chosen") is not None:
        budget = replace(budget, given=LayerPolicies(**result["chosen"]))
    duration = Duration(budget)
    if duration.parts is None or duration.step is None:
        return None
    name = f"{result['pattern']}, {result['layers']} layers, {result['tokens']:,} tokens, "
    name += f"{ranks} GPU{'s' if ranks > 1 else ''}, {budget.policies}"
    name += ", compiled" * config.trainer.compile + ", fp8" * config.trainer.fp8
    return Case(
        name,
        result["memory"],
        budget.gpu_memory / GIB,
        result["step"],
        duration.step,
        result["parts"],
        duration.parts,
    )


def _machine(gpu: Gpu, ranks: int, measured: dict[str, Any]) -> Machine:
    return Machine(gpu, ranks, 1, float(measured["cpu_memory"]))


def comparison(found: Sequence[Case]) -> str:
    """The cases as a table in Markdown, with the parts of a step below it."""
    lines = ["| case | GiB | predicted | | s a step | predicted | |", "| --- | --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {c.name} | {c.memory:.1f} | {c.predicted_memory:.1f} | {c.memory_off:+.0%} "
        f"| {c.seconds:.3g} | {c.predicted_seconds:.3g} | {c.seconds_off:+.0%} |"
        for c in found
    ]
    for case in found:
        kinds = [kind for kind in case.predicted_parts if kind in case.parts]
        parts = ", ".join(f"{k} {case.parts[k]:.3g} ({case.predicted_parts[k]:.3g})" for k in kinds)
        lines += ["", f"{case.name}: seconds measured (predicted): {parts}"]
    return "\n".join(lines)


@dataclass
class Options:
    """What is compared."""

    files: list[Path] = setting("what python -m train.bench json=FILE wrote, one or more")


def compare(options: Options) -> None:
    """Prints the comparison."""
    print(comparison([case for file in options.files for case in cases(file)]))


main = Command(
    "python -m train.bench.compare",
    "Predicted against measured memory and seconds a step of each case in files that python -m train.bench wrote.",
    Options,
    compare,
    ["python -m train.bench.compare h200.json h200x2.json"],
    positional="files",
)

if __name__ == "__main__":
    main.run()
