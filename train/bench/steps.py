"""``python -m train.bench``: one LoRA step on random weights and data of the real shapes, measured and taken apart.

The command: which cases its words stand for, and a line for each (`train.bench.case` measures one).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data.io.files import write_utf8
from radial.cli.reader import read_some, words_of
from radial.cli.settings import POSITIVE, at_least, each, setting
from train.bench.case import Result, layers_of, run_case
from train.config.check import validate
from train.config.compose import compose_run, finish
from train.config.schema import RunConfig
from train.errors import UserError
from train.memory.layer_policies import LayerPolicies
from train.planning import cpu_memory

_MODEL = {"conf": "wan_4x", "model": "wan_14b", "clip.frames": "321"}


@dataclass
class Options:
    """What is measured."""

    frames: int | None = setting("length of the clip; null: 321, or that of conf=", None, must=at_least(1))
    layers: int | None = setting("so many layers of the model; all: all", 2, must=at_least(1), none="all")
    pattern: list[str] = setting("attention patterns, each a case of its own", ["released", "dense"])
    sp: list[int] = setting("numbers of GPUs that share the clip, each a case of its own", [1], must=each(at_least(1)))
    steps: int = setting("steps of each case; the median counts", 3, must=at_least(1))
    memory_limit: float | None = setting(
        "memory that torch may allocate on a GPU, to measure what a smaller card does; null: all", None, unit="GiB",
        must=POSITIVE,
    )  # fmt: skip
    json: Path | None = setting("also write the figures to this file", None)


def measure(options: Options, settings: dict[str, str]) -> None:
    """Runs the cases and prints a line for each."""
    config = bench_config(options, settings)
    if config.lora is None:
        raise UserError(f"conf={config.conf} trains all weights (lora=null), a benchmark measures a LoRA step")
    if config.parallel.strategy != "ddp":
        raise UserError(f"parallel={config.parallel.strategy}: leave it out, steps are measured without DeepSpeed")
    for key, found, expected in (
        ("data.batch_size", config.data.batch_size, 1),
        ("objective.dense_teacher", config.objective.dense_teacher, 0),
    ):
        if found != expected:
            raise UserError(
                f"{key} is {found:g}, expected {expected}: steps of one clip are measured, without a teacher"
            )
    if config.model.dimensions is None and config.model.architecture is None:
        model = settings.get("model", config.conf)
        raise UserError(f"model={model} has no dimensions in its file, which a benchmark needs")
    cases = [(case_of(config, name), sp) for sp in options.sp for name in options.pattern]
    for case, _ in cases:
        validate(case)
    results = []
    words = [*words_of(replace(options, json=None)), *(f"{key}={value}" for key, value in settings.items())]
    print(f"{'pattern':<10} {'sp':>2} {'layers':>6} {'s/step':>8} {'s/layer':>8}   parts (s)")
    for case, sp in cases:
        results.append(run_case(case, sp, options.layers, options.steps, options.memory_limit))
        print(_line(results[-1]), flush=True)
        if options.json is not None:  # after each case: a later one may exceed a limit of memory or time
            about = {"torch": torch.__version__, "arguments": words, "cpu_memory": cpu_memory()}
            about["results"] = [asdict(result) for result in results]
            write_utf8(options.json, json.dumps(about, indent=1))
    for dense in (result for result in results if result.pattern == "dense"):
        for other in (result for result in results if result.pattern != "dense" and result.sp == dense.sp):
            print(speed_up(dense, other, config.attention.dense_layers, layers_of(config)))


def config_of(words: Sequence[str]) -> RunConfig:
    """The run that a benchmark's words stand for."""
    return bench_config(*read_some(Options, words))


def bench_config(options: Options, settings: dict[str, str]) -> RunConfig:
    """The run whose steps are measured, of one clip, at noise levels where the pattern runs: it has no dense ones."""
    model = {} if "conf" in settings else _MODEL
    frames = {} if options.frames is None else {"clip.frames": str(options.frames)}
    fixed = {"parallel.activations": "full", "attention.dense_steps": "0", "data.batch_size": "1"}
    return finish(compose_run({**fixed, **model, **settings, **frames}))


def case_of(config: RunConfig, pattern: str) -> RunConfig:
    """The run with a pattern in every layer; those with dense attention keep their input alone."""
    case = replace(config, attention=config.attention.under(pattern))
    if pattern != "dense":
        return case
    parallel = replace(case.parallel, activations="full", offload_activations=False, offload_gib=None)
    return replace(case, parallel=parallel)


def speed_up(dense: Result, other: Result, dense_layers: int, layers: int) -> str:
    """How much faster a layer is than a dense one, and a model of ``layers`` with so many dense, in words."""
    mixed = dense_layers * dense.layer + (layers - dense_layers) * other.layer
    recipe = f", with {dense_layers} of {layers} dense {layers * dense.layer / mixed:.2f}x" if dense_layers else ""
    return (
        f"faster than dense with sp={dense.sp} ({dense.layers} dense layers measured): "
        f"{other.pattern} {dense.layer / other.layer:.2f}x in every layer{recipe}"
    )


def _line(result: Result) -> str:
    parts = "  ".join(f"{kind} {seconds:.3f}" for kind, seconds in result.parts.items())
    rest = f"{result.memory:.1f} GiB  {result.tflops:.1f} TFLOP/s" + (f"  MFU {result.mfu:.1%}" if result.mfu else "")
    return (
        f"{result.pattern:<10} {result.sp:>2} {result.layers:>6} {result.step:>8.3f} {result.layer:>8.3f}   "
        f"{parts}  |  {rest}  first step {result.first_step:.1f} s"
        + (f", {result.compile:.1f} s of it compiling" if result.compile else "")
        + (_kept(result.chosen) if result.chosen else "")
    )


def _kept(chosen: LayerPolicies) -> str:
    moved = f", {chosen.offload / 2**30:.1f} GiB in CPU memory" if chosen.offload else ""
    return f"  layers keep {chosen}{moved}"
