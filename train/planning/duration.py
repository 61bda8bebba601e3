"""The time of a run, before a GPU is touched: FLOPs at measured rates, bytes at the rates of memory and links."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from train.config.global_batch import clips_a_step, micro_batches
from train.models.loading import sigma_range
from train.planning import calibration
from train.planning.budget import Budget
from train.planning.hardware import BETWEEN_NODES, GPUS
from train.planning.kernels import measured_rates
from train.step.clip_recipe import clip_recipe

_MEASURED = GPUS["h200"]


@dataclass(frozen=True)
class Duration:
    """How long the steps of a `Budget` take; all seconds are means over the noise levels of the run."""

    budget: Budget

    @property
    def clips_at_once(self) -> float:
        """Clips in a micro-batch of all ranks."""
        return self.budget.placed.clips_at_once()

    @property
    def clips_a_step(self) -> float:
        """The global batch."""
        return clips_a_step(self.budget.placed)

    @property
    def dense_share(self) -> float:
        """Share of the steps at noise levels that run dense."""
        config = self.budget.config
        recipe = clip_recipe(config)
        if config.attention.pattern == "dense":
            return 0.0
        return recipe.schedule.dense_share(recipe.attention.dense_sigma, sigma_range(config.model))

    @property
    def attention_flops(self) -> float:
        """One forward of one clip in all layers."""
        layers = range(self.budget.sizes.layers)
        return sum(share * sum(self._layer_flops(n, dense) for n in layers) for dense, share in self._sides)

    @property
    def flops(self) -> float:
        """Forward and backward of one clip; what a policy computes again is not counted (`train.planning.flops`)."""
        sizes = self.budget.sizes
        return 3.5 * self.attention_flops + (2 if self.budget.config.lora else 3) * sizes.linear + 3 * sizes.lora

    @cached_property
    def parts(self) -> dict[str, float] | None:
        """Seconds of an optimizer step by part; None where the GPU's speed is not known, or its attention backend's."""
        if not self._known:
            return None
        parts: dict[str, float] = {}
        times = micro_batches(self.budget.placed)
        for dense, share in self._sides:
            for name, seconds in self._micro_step(dense).items():
                parts[name] = parts.get(name, 0.0) + share * times * seconds
        parts["communication"] += self._reduction()
        parts["other"] += self._update()
        return parts

    @property
    def step(self) -> float | None:
        """Seconds of an optimizer step."""
        return None if self.parts is None else sum(self.parts.values())

    @property
    def mfu(self) -> float | None:
        """Share of the GPUs' peak that `flops` are."""
        machine = self.budget.machine
        if self.step is None or machine.gpu.flops is None:
            return None
        return self.flops * self.clips_a_step / self.step / machine.world / machine.gpu.flops

    @property
    def slowest_micro_step(self) -> float | None:
        """Seconds of a micro-batch's forward and backward at the noise levels where they take longest."""
        if not self._known:
            return None
        return max(sum(self._micro_step(dense).values()) for dense, share in self._sides if share)

    @property
    def hours(self) -> float | None:
        """Hours of the whole run."""
        return None if self.step is None else self.step * self.budget.config.trainer.steps / 3600

    @cached_property
    def _rates(self) -> dict[bool, Sequence[tuple[int, float, float]] | None]:
        """Measured rates of attention in dense layers, and in others."""
        return {dense: measured_rates(self.budget, dense=dense) for dense in (True, False)}

    @property
    def _known(self) -> bool:
        return self.budget.machine.gpu.flops is not None and None not in self._rates.values()

    @property
    def _sides(self) -> tuple[tuple[bool, float], tuple[bool, float]]:
        return (True, self.dense_share), (False, 1 - self.dense_share)

    def _layer_flops(self, layer: int, dense: bool) -> float:
        sizes = self.budget.sizes
        return sizes.dense_attention * (1.0 if dense or self.budget.attention.is_dense_layer(layer) else sizes.density)

    def _micro_step(self, dense: bool) -> dict[str, float]:
        """Forward and backward of one micro-batch on one rank, and what its objective asks of the frozen model."""
        budget = self.budget
        passes = [self.one_pass(dense)]
        if budget.config.objective.distilled_guidance is not None:
            passes.append(self.one_pass(dense, frozen=True))
        if budget.window is not None:
            window = Duration(replace(budget.window, given=budget.policies))
            passes.append(window.one_pass(True, frozen=True))
            if budget.shorter is not None:
                passes.append(window.one_pass(dense))
        parts = {name: sum(one[name] for one in passes) for name in passes[0]}
        copies = parts.pop("streaming") + 2 * budget.offloaded / self._bus
        parts["waiting"] = max(0.0, copies - sum(parts.values()))
        return parts

    def one_pass(self, dense: bool, *, frozen: bool = False) -> dict[str, float]:
        """Seconds by part of a forward and backward of a rank's clips; of the frozen model, of a forward alone.

        Weights that stream (``streaming``) come beside the others.
        """
        budget, sizes = self.budget, self.budget.sizes
        names = ("none",) * sizes.layers if frozen else budget.policies.names
        ways, sends = (1, 4 * sizes.layers) if frozen else (2, sum(8 if name == "none" else 12 for name in names))
        clips = budget.layer.clips / budget.sequence
        attention = 0.0
        for layer, name in enumerate(names):
            forward, backward = self._attention_rates(dense or budget.attention.is_dense_layer(layer))
            times = (2 if name == "full" else 1) / forward + (0 if frozen else 2.5 / backward)
            attention += clips * self._layer_flops(layer, dense) * times
        again = sum(name != "none" for name in names) / len(names)
        linear = sizes.linear if frozen else ((2 if budget.config.lora else 3) + again) * sizes.linear
        lora = 0.0 if frozen else (3 + again) * sizes.lora
        rate = calibration.LINEAR_FP8 if budget.float8 else calibration.LINEAR
        each = budget.layer.costs.passes + budget.float8 * calibration.FP8_PASSES
        passes = each * (1 if frozen else 3 + again) * sizes.layers
        return {
            "attention": attention,
            "linear": clips * (linear + lora) / (rate * self._faster),
            "other": passes * budget.layer.hidden / budget.machine.gpu.bandwidth,
            "communication": self._exchanges(sends) + ways * self._gather(),
            "streaming": ways * sizes.passed_weights / self._bus if budget.streamed else 0.0,
        }

    @property
    def _bus(self) -> float:
        """Bytes a second between CPU and GPU, where activations and streamed weights go beside the GPU's work."""
        return min(calibration.PCIE, self.budget.machine.gpu.link)  # of a card without NVLink the link is the bus

    @property
    def _faster(self) -> float:
        """Times that the GPU's kernels are as fast as those of the one that was measured."""
        gpu = self.budget.machine.gpu
        assert gpu.flops is not None and _MEASURED.flops is not None
        return gpu.flops / _MEASURED.flops

    def _attention_rates(self, dense: bool) -> tuple[float, float]:
        rows = self._rates[dense]
        assert rows is not None, "there are no times where one is not known"
        forward, backward = (between(rows, self.budget.sizes.tokens, column) for column in (1, 2))
        share = calibration.HEAD_MASKS if not dense and self.budget.attention.pattern.by_head else 1.0
        return share * self._faster * forward, share * self._faster * backward

    def _exchanges(self, times: int) -> float:
        """All-to-alls around attention: q, k, v and its output, and their gradients; what runs again sends again."""
        budget, machine = self.budget, self.budget.machine
        if budget.sequence == 1:
            return 0.0
        link = machine.gpu.link if budget.sequence <= machine.gpus else min(machine.gpu.link, BETWEEN_NODES)
        sent = budget.layer.hidden * budget.sizes.attended / budget.sizes.width
        return times * sent * (1 - 1 / budget.sequence) / (calibration.LINK * link)

    @property
    def _world_link(self) -> float:
        machine = self.budget.machine
        link = machine.gpu.link if machine.nodes == 1 else min(machine.gpu.link, BETWEEN_NODES)
        return calibration.LINK * link

    def _gather(self) -> float:
        """ZeRO 3 collects the weights for the forward, and again for the backward."""
        budget, world = self.budget, self.budget.machine.world
        if budget.stage < 3:
            return 0.0
        collected = budget.sizes.weights * (1 - 1 / world) / self._world_link
        from_cpu = budget.sizes.weights / world / calibration.PCIE
        return collected + (from_cpu if budget.config.parallel.offload_parameters else 0.0)

    def _reduction(self) -> float:
        """Gradients, once an optimizer step."""
        world = self.budget.machine.world
        return 2 * 4.0 * self.budget.sizes.trained * (1 - 1 / world) / self._world_link if world > 1 else 0.0

    def _update(self) -> float:
        """Adam: seven passes over what is trained, on the GPU or over the bus."""
        budget = self.budget
        share = budget.sizes.trained / (budget.machine.world if budget.stage else 1)
        rate = calibration.PCIE if budget.config.parallel.offload_optimizer else budget.machine.gpu.bandwidth
        return 28.0 * share / rate


def between(rows: Sequence[tuple[int, float, float]], tokens: int, column: int) -> float:
    """A rate at a length, linear in the logarithm between the measured ones and constant beyond them."""
    if tokens <= rows[0][0]:
        return rows[0][column]
    for low, high in itertools.pairwise(rows):
        if tokens <= high[0]:
            part = math.log(tokens / low[0]) / math.log(high[0] / low[0])
            return low[column] + part * (high[column] - low[column])
    return rows[-1][column]
