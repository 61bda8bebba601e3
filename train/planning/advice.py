"""Settings that fit: the best for a machine, the fewest GPUs, and what to change where nothing fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from train.config.schema import RunConfig
from train.planning.budget import GIB, Budget
from train.planning.calibration import CPU_SPARE
from train.planning.duration import Duration
from train.planning.hardware import GPUS
from train.planning.kernels import serves

_NODE = 8  # GPUs, of the nodes that are asked for


@dataclass(frozen=True)
class Setting:
    """A way to run on a machine, and what it comes to.

    Attributes:
        keys: ``key=value`` words that differ from the run as it was given.
        budget: of the run with them.
    """

    keys: tuple[str, ...]
    budget: Budget

    @property
    def words(self) -> str:
        """The keys as they are typed."""
        return " ".join(self.keys) or "as it is"

    @property
    def duration(self) -> Duration:
        """The duration of the setting's budget."""
        return Duration(self.budget)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run; 0 where the GPU's speed is not known."""
        hours = self.duration.hours
        return 0.0 if hours is None else hours * self.budget.machine.world


def best(budget: Budget, clips_a_step: float) -> Setting | None:
    """The fastest setting that fits the budget's machine, or None.

    Among settings within 2 % of the fastest, the one with the fewest means: offload, ZeRO, chunks, GPUs a clip. Weights
    stream from CPU memory only where nothing fits otherwise, or the run as it was given has them do so.

    Args:
        budget: the run as it was given.
        clips_a_step: the global batch, which every setting keeps.
    """
    given, found = budget.config, []
    can_stream = given.lora is not None and not budget.machine.is_cpu
    for streams in (True,) if given.parallel.offload_weights else (False, True) if can_stream else (False,):
        found = [s for s in _settings(budget, clips_a_step, streams) if s.budget.misfit is None]
        if found:
            break
    else:
        return None
    limit = 1.02 * min(s.duration.hours or 0.0 for s in found)  # all 0 where the GPU's speed is not known
    return min((s for s in found if (s.duration.hours or 0.0) <= limit), key=_means)


def _means(setting: Setting) -> tuple[bool, int, bool, int]:
    budget = setting.budget
    return budget.offloaded > 0, budget.stage, budget.config.parallel.ffn_chunk is not None, budget.sequence


def fewest(budget: Budget, clips_a_step: float, most: int, above: int = 0) -> Setting | None:
    """The best setting on the smallest number of GPUs, more than ``above`` and up to ``most``, on which any fits.

    CPU memory goes with the GPUs, in the proportion of the budget's machine.
    """
    counts = (count for count in _counts(most) if count > above)
    return next((found for count in counts if (found := best(_on(budget, count), clips_a_step))), None)


def _on(budget: Budget, count: int) -> Budget:
    """The run on so many GPUs at most: of the nodes that there are, or of more and larger ones where these are few."""
    machine = budget.machine
    gpus = min(count, machine.gpus if count <= machine.world else max(_NODE, machine.gpus))
    share = machine.cpu_memory * gpus / machine.gpus
    return replace(budget, machine=replace(machine, gpus=gpus, nodes=count // gpus, cpu_memory=share))


def remedies(budget: Budget, clips_a_step: float) -> list[str]:
    """What to change, in words, when nothing fits the machine: the cheapest first."""
    machine = budget.machine
    said = []
    counts = [] if machine.is_cpu else [count for count in _counts(machine.world) if count < machine.world]
    fewer = next((found for count in reversed(counts) if (found := best(_on(budget, count), clips_a_step))), None)
    if fewer is not None:  # which share the clips of a step where all of them cannot
        said.append(f"{fewer.budget.machine.world} of these GPUs: {fewer.words}")
    more = None if machine.is_cpu else fewest(budget, clips_a_step, 64, machine.world)
    if more is not None:
        where = more.budget.machine
        nodes = f" on {where.nodes} nodes" if where.nodes > 1 else ""
        said.append(f"{where.world} GPUs of this kind{nodes}: {more.words}")
    for name, gpu in sorted(GPUS.items(), key=lambda item: item[1].memory):
        if gpu.memory > 1.1 * machine.gpu.memory and not machine.is_cpu:
            larger = replace(budget, machine=replace(machine, gpu=gpu))
            other = best(larger, clips_a_step) if serves(larger) else None
            if other is not None:
                said.append(f"a larger GPU, gpu={name}: {other.words}")
                break
    stored = _stored(budget, clips_a_step)
    if stored is not None:
        keys = _keys(budget.config, stored.budget.config)
        said.append(f"frozen weights in 8 bits: {' '.join(('model.storage=fp8', *keys))}")
    longest = _longest(budget, clips_a_step)
    if longest is not None:
        frames = longest.budget.config.clip.frames
        said.append(f"a shorter clip, the longest that fits: {' '.join((f'clip.frames={frames}', *longest.keys))}")
    if not machine.is_cpu:
        wider = replace(budget, machine=replace(machine, cpu_memory=8 * machine.cpu_memory))
        other = best(wider, clips_a_step)
        if other is not None:
            whole = math.ceil(other.budget.cpu_memory / (1 - CPU_SPARE) / GIB)  # with what stays free
            said.append(f"more CPU memory, {whole} GiB a node: {other.words}")
    return said


def _stored(budget: Budget, clips_a_step: float) -> Setting | None:
    """The best setting with the layers' weights in float8; None where none fits, or they cannot be stored so."""
    config = budget.config
    if config.lora is None or config.lora.dora or config.model.storage is not None or budget.machine.is_cpu:
        return None
    trainer = replace(config.trainer, fp8=False)
    rounded = replace(config, model=replace(config.model, storage="fp8"), trainer=trainer)
    found = Budget.of(rounded, budget.machine)
    return None if found is None else best(found, clips_a_step)


def _counts(most: int) -> Iterator[int]:
    count = 1
    while count <= most:
        yield count
        count *= 2


def _settings(budget: Budget, clips_a_step: float, streams: bool) -> Iterator[Setting]:
    """All that keep the global batch, whose layers' weights stream or stay on the GPU."""
    given, machine = budget.config, budget.machine
    strategies = ["ddp"] if machine.is_cpu or machine.world == 1 else ["ddp", "zero2", "zero3"]
    whole = given.trainer.fp8 or given.model.storage is not None or streams or (given.lora and given.lora.dora)
    if given.model.expert == "both":
        strategies = ["ddp"]  # a step trains one expert, ZeRO steps on all weights
    elif whole and "zero3" in strategies:
        strategies.remove("zero3")  # which takes weights apart
    for sequence in range(1, machine.gpus + 1):
        if machine.gpus % sequence or budget.sizes.heads % sequence:
            continue
        accumulate = clips_a_step * sequence / budget.layer.clips / machine.world
        if accumulate < 1 or accumulate % 1:
            continue  # another global batch
        for strategy in strategies:
            quarter = -(-budget.sizes.video_tokens // (4 * sequence))
            means = itertools.product((given.parallel.ffn_chunk, quarter), (given.trainer.compile, not machine.is_cpu))
            for chunk, compiled in dict.fromkeys(means):
                parallel = replace(
                    given.parallel,
                    sequence=sequence,
                    strategy=strategy,
                    activations="auto",
                    offload_activations=False,
                    offload_gib=None,
                    offload_optimizer=False,
                    offload_parameters=False,
                    offload_weights=streams,
                    ffn_chunk=chunk,
                )
                trainer = replace(given.trainer, nodes=machine.nodes, devices=machine.gpus, compile=compiled)
                config = replace(given, parallel=parallel, trainer=trainer)
                follows = (given.optim.global_batch or config.clips_at_once()) == clips_a_step
                if given.optim.accumulate is not None or not follows:
                    config = replace(config, optim=replace(given.optim, accumulate=int(accumulate)))
                yield Setting(_keys(given, config), replace(budget, config=config))


def _keys(given: RunConfig, config: RunConfig) -> tuple[str, ...]:
    """The words that turn one config into the other."""
    words = []
    for section in ("trainer", "optim", "parallel"):
        before, after = getattr(given, section), getattr(config, section)
        for key, value in vars(after).items():
            if value != getattr(before, key):
                words.append(f"{section}.{key}={'null' if value is None else str(value).lower()}")
    return tuple(words)


def _longest(budget: Budget, clips_a_step: float) -> Setting | None:
    """The best setting with the most frames with which some fits the machine; None if even the shortest clip does not
    fit. Its keys are beside ``clip.frames``."""
    time = budget.config.model.time

    def fitting(steps: int) -> Setting | None:
        clip = replace(budget.config.clip, frames=steps * time.step + time.rest)
        shorter = Budget.of(replace(budget.config, clip=clip), budget.machine)
        return None if shorter is None else best(shorter, clips_a_step)

    found = None
    low, high = -1, (budget.config.clip.frames - time.rest) // time.step
    while high - low > 1:
        middle = (low + high) // 2
        setting = fitting(middle)
        low, high, found = (low, middle, found) if setting is None else (middle, high, setting)
    return found
