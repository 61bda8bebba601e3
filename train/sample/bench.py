"""``python -m train.sample.bench``: seconds of a denoising step of a whole model, dense and sparse in one run.

Random weights and inputs of the real shapes; all layers, no gradients, no LoRA: what generation spends its time on. A
step is two forward passes, the prompt's and the negative prompt's, but one for a model that takes the guidance as an
input. The bound is the ratio of floating-point operations: no kernel can be faster than that by sparsity alone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from data.io.files import write_utf8
from radial.cli.command import Command
from radial.cli.reader import words_of
from radial.cli.settings import at_least, each, setting
from train.attention.recipe import AttentionRecipe
from train.attention.step import StepAttention
from train.config.compose import compose_run, finish
from train.config.schema import RunConfig
from train.errors import UserError
from train.memory.compiler import compile_layers
from train.models.loading import benchmark_adapter
from train.models.weights import settle
from train.planning import resolve_precision
from train.planning.full_memory import memory_in_words

_MODEL = {"conf": "wan_4x", "model": "wan_14b"}
_FRAMES = (161, 321)


@dataclass(frozen=True)
class Result:
    """One case."""

    frames: int
    tokens: int
    pattern: str
    dense_layers: int
    forward: float  # seconds of a forward pass
    step: float  # seconds of a denoising step
    flops: float  # of a forward pass
    memory: float  # GiB, peak of the GPU


@dataclass
class Options:
    """What is measured."""

    frames: list[int] | None = setting(
        "lengths of the clip; null: 161,321, or that of conf=", None, must=each(at_least(1))
    )
    dense_layers: list[int] = setting("numbers of dense layers, each a case of its own", [0, 2], must=each(at_least(0)))
    layers: int | None = setting("so many layers of the model; all: all", None, must=at_least(1), none="all")
    steps: int = setting(
        "forward passes of each case, after one of some layers of each kind; the median counts", 1, must=at_least(1)
    )
    dense: bool = setting("measure dense attention too", True)
    json: Path | None = setting("also write the figures to this file", None)


def measure(options: Options, settings: dict[str, str]) -> None:
    """Runs the cases and prints a line for each."""
    runs = bench_runs(options.frames, settings)
    with memory_in_words("fewer layers= take less"):
        bench = Bench(runs[0], options.layers)
    results: list[Result] = []
    print(f"{bench.name}, {bench.layers} layers, {bench.dtype}; {bench.passes} forward passes a step")
    print(f"{'frames':>6} {'tokens':>9} {'pattern':<10} {'dense layers':>12} {'s/forward':>10} {'s/step':>9}   GiB")
    words = [*words_of(replace(options, json=None)), *(f"{key}={value}" for key, value in settings.items())]
    about = {"torch": torch.__version__, "device": bench.name, "arguments": words}
    for run in runs:
        cases = [replace(run, attention=replace(run.attention, dense_layers=count)) for count in options.dense_layers]
        if options.dense:
            cases.append(replace(run, attention=replace(run.attention.under("dense"), backend=None)))
        for case in cases:
            with memory_in_words("fewer frames= or layers= take less"):
                results.append(bench.measure(case, options.steps))
            print(_line(results[-1]), flush=True)
            if options.json is not None:  # after each, since a job may reach its time limit
                table = {**about, "results": [asdict(result) for result in results]}
                write_utf8(options.json, json.dumps(table, indent=1))
        if options.dense:
            *others, dense = results[-len(cases) :]
            print("\n".join(_ratio(result, dense) for result in others), flush=True)


def bench_runs(frames: Sequence[int] | None, settings: dict[str, str]) -> list[RunConfig]:
    """The run of each length that is measured."""
    base = {**({} if "conf" in settings else _MODEL), **settings}
    if frames is None and ("conf" in settings or "clip.frames" in settings):
        return [finish(compose_run(base))]
    if "clip.frames" in settings:
        raise UserError("frames and clip.frames are both set, expected one")
    return [finish(compose_run({**base, "clip.frames": str(length)})) for length in frames or _FRAMES]


class Bench:
    """A model of random weights.

    Args:
        config: names the model and its numbers.
        layers: as many of them; None: all.
    """

    def __init__(self, config: RunConfig, layers: int | None) -> None:
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        self.name = torch.cuda.get_device_name() if cuda else "cpu"
        precision = resolve_precision(config.trainer.precision)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        torch.manual_seed(config.seed)
        self.adapter = benchmark_adapter(config.model, layers, self.dtype, self.device)
        settle(self.adapter.transformer, self.dtype, self.device)
        self.adapter.transformer.requires_grad_(False).eval()
        self.layers = self.adapter.attention_shape[0]
        self.passes = 1 if self.adapter.takes_guidance or config.model.guidance == [1.0] else 2
        if config.trainer.compile:
            compile_layers(self.adapter.layers())

    @torch.no_grad()
    def measure(self, config: RunConfig, steps: int) -> Result:
        """The median of ``steps`` forward passes of one clip.

        Raises:
            UserError: what comes out is not finite: no speed is printed then.
        """
        attention = config.attention
        latent = torch.randn(1, self.adapter.latent_channels, *config.latent_size(), device=self.device)
        conditions = self.adapter.random_conditions(latent)
        sigma = torch.tensor([0.6], device=self.device)
        of_step = AttentionRecipe.of(config).step(self.adapter.grid(latent), dense=False)
        self.adapter.set_attention(of_step)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def forward() -> None:
            out = self.adapter.velocity(latent, sigma, conditions)
            if not out.isfinite().all():  # also waits for the device
                raise UserError(
                    f"pattern {attention.pattern} gives numbers that are not finite, so no speed is reported"
                )

        self._warm_up(forward, of_step)
        seconds = statistics.median(timed(forward) for _ in range(steps))
        grid = of_step.pattern_layout.grid
        return Result(
            frames=config.clip.frames,
            tokens=grid.tokens,
            pattern=attention.pattern,
            dense_layers=attention.dense_layers,
            forward=seconds,
            step=seconds * self.passes,
            flops=of_step.attention_flops(*self.adapter.attention_shape) + self.adapter.linear_flops(grid),
            memory=torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0,
        )

    def _warm_up(self, forward: Callable[[], None], attention: StepAttention) -> None:
        """Some layers of each kind, which build layouts, kernels and graphs; a whole dense pass takes minutes."""
        transformer = self.adapter.transformer
        numbers = {layer: number for number, layer in enumerate(self.adapter.layers())}
        lists = {
            n: c for n, c in transformer.named_children() if isinstance(c, nn.ModuleList) and numbers.keys() >= {*c}
        }
        try:
            for name, layers in lists.items():
                kinds = [(type(layer), attention.layout(numbers[layer]) is attention.dense_layout) for layer in layers]
                setattr(transformer, name, nn.ModuleList(layers[i] for i in _of_each_kind(kinds)))
            forward()
        finally:
            for name, layers in lists.items():
                setattr(transformer, name, layers)


def _of_each_kind(kinds: Sequence[Hashable]) -> list[int]:
    """Places of the first two of each kind, since strides of what a list begins with differ, and of the last."""
    return [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < 2 or i == len(kinds) - 1]


def timed(forward: Callable[[], None]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    forward()
    return time.perf_counter() - start


def _line(result: Result) -> str:
    return (
        f"{result.frames:>6} {result.tokens:>9,} {result.pattern:<10} {result.dense_layers:>12} "
        f"{result.forward:>10.2f} {result.step:>9.2f}   {result.memory:.1f}"
    )


def _ratio(result: Result, dense: Result) -> str:
    return (
        f"{result.frames:>6} {result.pattern}, {result.dense_layers} dense layers: "
        f"{dense.forward / result.forward:.2f}x faster than dense "
        f"(bound by operations {dense.flops / result.flops:.2f}x)"
    )


main = Command(
    "python -m train.sample.bench",
    "Measures a denoising step with the pattern, for each number of dense layers, and dense, at each length, on random "
    "weights of model=wan_14b. With conf=hunyuan_4x, or any other run, model and frames are that run's unless they are "
    "given too.",
    Options,
    measure,
    ["python -m train.sample.bench model=wan_14b frames=161,321 dense_layers=0,2"],
    others="those of a run: clip.height=480 attention.decay=0.8 trainer.compile=true trainer.precision=bf16",
)

if __name__ == "__main__":
    main.run()
