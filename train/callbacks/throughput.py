"""How fast a run is: tokens and FLOPs a second, MFU, memory, waiting for data, time left."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from data.shards.batch import Batch
from train.planning.flops import SampleFlops, peak_rate
from train.step.module import LengthExtensionModule


def compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process, forward and backward graphs."""
    utils = sys.modules.get("torch._dynamo.utils")  # importing it takes seconds; where it is not, nothing was compiled
    return utils.calculate_time_spent()["total_wall_time"] if utils is not None else 0.0


class Throughput(Callback):
    """Measures; `row` gives means over the steps since it was last asked.

    tokens_per_second   video tokens of all devices together
    tflops, mfu         of each device; mfu only where `train.planning.flops.PEAK_RATES` knows it
    memory_gib          peak since the start: of the GPU, or of the process on a CPU
    data_wait           seconds a step that training stood still for data
    step_seconds, hours_left
    compile_seconds     that torch.compile took since the start, where layers are compiled
    """

    def __init__(self) -> None:
        self._reset(0)
        self._compiled_before = 0.0

    def _reset(self, step: int) -> None:
        self._first_step = step
        self._start = self._idle_since = time.perf_counter()
        self.waited = self._flops = self._tokens = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._reset(trainer.global_step)
        self._compiled_before = compile_seconds()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, index: int) -> None:
        self.waited += time.perf_counter() - self._idle_since

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        assert isinstance(module, LengthExtensionModule)
        samples, sharing = len(batch.keys), module.sequence_size
        assert module.current_attention is not None
        self._flops += samples * SampleFlops.of(module.adapter, module.current_attention).step / sharing
        groups = trainer.world_size // sharing
        self._tokens += samples * groups * module.current_attention.pattern_layout.grid.video_tokens
        self._idle_since = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Takes time off that went into no step, such as a validation's."""
        self._start += seconds
        self.busy(seconds)

    def busy(self, seconds: float) -> None:
        """Takes time off the wait for data that went by since the last step's end and was none."""
        self._idle_since += seconds

    def row(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, float]:
        """The figures since the last call; the device is waited for."""
        steps = trainer.global_step - self._first_step
        device = module.device
        name, memory = "cpu", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            name, memory = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
        seconds = time.perf_counter() - self._start
        values = {
            "tokens_per_second": self._tokens / seconds,
            "tflops": self._flops / seconds / 1e12,
            "memory_gib": memory / 2**30,
            "data_wait": self.waited / steps,
            "step_seconds": seconds / steps,
            "hours_left": (trainer.max_steps - trainer.global_step) * seconds / steps / 3600,
        }
        compiling = compile_seconds() - self._compiled_before
        if compiling:
            values["compile_seconds"] = compiling
        peak = peak_rate(name)
        if peak is not None:
            values["mfu"] = self._flops / seconds / peak
        self._reset(trainer.global_step)
        return {key: float(value) for key, value in values.items()}
