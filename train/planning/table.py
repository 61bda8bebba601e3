"""A plan as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from train.config.global_batch import clips_in_words
from train.planning import calibration
from train.planning.advice import Setting
from train.planning.budget import GIB, Budget
from train.planning.duration import Duration
from train.planning.kernels import training_backend, without_kernel
from train.step.clip_recipe import clip_recipe


def plan_table(budget: Budget) -> str:
    """What a run needs and takes, with its own attention and with dense attention beside it."""
    config, machine, sizes = budget.config, budget.machine, budget.sizes
    dense = budget.dense()
    both = [budget] if config.attention.pattern == "dense" else [budget, dense]
    columns = [b.config.attention.pattern for b in both]
    durations = [Duration(b) for b in both]

    rows = [
        _row("", columns),
        _row("sparsity", [f"{1 - b.sizes.density:.1%}" for b in both]),
        _row("FLOPs of a clip's step", [f"{d.flops:.2e}" for d in durations]),
        "",
        _row("memory of a GPU, GiB" if not machine.is_cpu else "memory of a rank, GiB", [""] * len(both)),
        *_memory(both, lambda b: b.gpu_parts),
        _row("  all, at the step's peak", [f"{b.gpu_memory / GIB:.1f}" for b in both]),
        *_encoding(both),
        _row("  there is", [f"{b.usable / GIB:.1f}" for b in both]),
        _row("CPU memory of a node, GiB", [""] * len(both)),
        *_memory(both, lambda b: b.cpu_parts),
        _row("  all", [f"{b.cpu_memory / GIB:.1f}" for b in both]),
        _row("  there is", [f"{b.cpu_usable / GIB:.1f}" for b in both]),
    ]
    if durations[0].parts is not None:
        rows += ["", _row(f"a step of {durations[0].clips_a_step:g} clips, s", [""] * len(both))]
        for name in durations[0].parts:
            if any((d.parts or {}).get(name, 0) > 0 for d in durations):
                rows.append(_row(f"  {name}", [figure((d.parts or {})[name]) for d in durations]))
        rows += [
            _row("  all", [figure(d.step or 0) for d in durations]),
            _row("  MFU", [f"{d.mfu:.1%}" for d in durations]),
            _row(f"hours of {config.trainer.steps:,} steps", [figure(d.hours or 0) for d in durations]),
            _row("GPU-hours", [figure((d.hours or 0) * machine.world) for d in durations]),
        ]
    notes = []
    if durations[0].dense_share:
        sigma = clip_recipe(config).attention.dense_sigma
        notes.append(
            f"{durations[0].dense_share:.1%} of the steps, at noise levels from {sigma:.4f}, "
            f"run dense{': times are the mean' if durations[0].parts is not None else ''}"
        )
    if config.attention.dense_layers and config.attention.pattern != "dense":
        notes.append(f"the first {config.attention.dense_layers} of {sizes.layers} layers are dense in every step")
    if machine.gpu.flops is None:
        notes.append(f"no times: nothing is known of the speed of {machine.gpu.name}")
    elif durations[0].parts is None:
        notes.append(f"no times: nobody measured {training_backend(budget)} as a run's attention on a GPU")
    elif not machine.gpu.name.startswith(calibration.MEASURED_ON):
        notes.append(f"times are scaled from an H200 by peak FLOP/s and bandwidth: no {machine.gpu.name} was measured")
    if config.validation.samples_every:
        encoders = budget.encoders
        notes.append(
            f"prompts are encoded before the first step, on the first GPU: text encoders of {encoders.text / GIB:.1f} "
            f"GiB and a VAE of {encoders.vae / GIB:.1f} beside the weights; what the VAE computes with is not counted"
        )
    slow = without_kernel(budget)
    if slow is not None:
        notes.append(f"warning: {slow}")
    clip, tokens = config.clip, f"{sizes.tokens:,} tokens"
    if budget.sequence > 1:
        tokens += f", {budget.layer.tokens:,} on each GPU"
    head = [
        f"{config.conf} on {_machine(budget)}",
        f"{clip.frames} frames of {clip.height} x {clip.width}: {tokens}",
        f"clips: {clips_in_words(budget.placed)}",
        f"{_how(budget)}",
        "",
    ]
    return "\n".join([*head, *rows, *([""] if notes else []), *notes])


def setting_lines(title: str, setting: Setting) -> list[str]:
    """A setting in two lines: what it comes to, and the keys that choose it."""
    budget, duration = setting.budget, setting.duration
    machine = budget.machine
    figures = f"{figure(budget.gpu_memory / GIB)} GiB a GPU, {figure(budget.cpu_memory / GIB)} GiB a node"
    if duration.step is not None and duration.hours is not None:
        figures += f", {figure(duration.step)} s a step, {figure(duration.hours)} h"
        figures += f", {figure(setting.gpu_hours)} GPU-hours"
    gpus = f"{machine.world} GPU{'s' if machine.world > 1 else ''}"
    return [f"{title} ({gpus}): {figures}; layers keep {budget.policies}", f"  {setting.words}"]


def figure(number: float) -> str:
    """A number with as many places as it deserves."""
    places = 0 if number >= 100 else 1 if number >= 10 else 2 if number >= 1 else 4
    return f"{number:,.{places}f}"


def _memory(both: Sequence[Budget], parts: Callable[[Budget], dict[str, float]]) -> list[str]:
    return [
        _row(f"  {name}", [f"{parts(b)[name] / GIB:.1f}" for b in both])
        for name in parts(both[0])
        if any(parts(b)[name] > 0 for b in both)
    ]


def _encoding(both: Sequence[Budget]) -> list[str]:
    if not both[0].gpu_encoding:
        return []
    return [_row("  first, while prompts are encoded", [f"{b.gpu_encoding / GIB:.1f}" for b in both])]


def _row(name: str, values: Sequence[str]) -> str:
    return f"{name:<34}" + "".join(f"{value:>12}" for value in values)


def _machine(budget: Budget) -> str:
    machine = budget.machine
    if machine.is_cpu:
        return f"the CPU, {machine.gpus} process{'es' if machine.gpus > 1 else ''}"
    nodes = f"{machine.nodes} nodes of " if machine.nodes > 1 else ""
    return f"{nodes}{machine.gpus} x {machine.gpu.name}, {machine.cpu_memory / GIB:.0f} GiB of CPU memory a node"


def _how(budget: Budget) -> str:
    parallel, policies = budget.config.parallel, budget.policies
    words = [parallel.strategy, f"{budget.sequence} GPU{'s' if budget.sequence > 1 else ''} a clip"]
    words.append(f"layers keep {policies}" + (" (chosen)" if parallel.activations == "auto" else ""))
    if budget.offloaded:
        words.append(f"{budget.offloaded / GIB:.1f} GiB of it in CPU memory")
    if budget.streamed:
        words.append("layers' weights come from CPU memory")
    words.append(f"attention on {training_backend(budget)}")
    words.append("compiled" if budget.config.trainer.compile else "not compiled")
    return ", ".join(words)
