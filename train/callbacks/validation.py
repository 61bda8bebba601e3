"""The loss on held-out clips while training: fixed clips, noise levels and noise, at several clip lengths.

Attention at a noise level (`train.measures.levels`) is the run's own there: dense from the level on from which training
is.

A shorter clip is the beginning of a longer one: the VAEs are causal in time, so its latents are the longer's first.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence

import lightning as L
import torch

from data.shards.manifest import Manifest
from data.shards.sample import Sample
from data.shards.stages import Stage
from data.shards.stream import read_samples
from radial import LatentTime
from train.callbacks.base import StepCallback, every
from train.callbacks.metrics import VALIDATION
from train.callbacks.stop import StopSignals
from train.callbacks.throughput import Throughput
from train.callbacks.watchdog import Watchdog
from train.measures.losses import loss_at
from train.parallel.control_group import ControlGroup
from train.step.module import LengthExtensionModule


class Validation(StepCallback):
    """Measures every ``every`` steps and at the end, on all ranks together; the random state stays as it is.

    Args:
        every: optimizer steps; 0: never.
        shards: held-out clips.
        count: how many of them, the first.
        stages: applied to each of them, as to the samples of training.
        levels: noise levels, each with its share of the mean (`validation_levels`).
        lengths: in latent frames; each at most the clips'.

    Attributes:
        row: the last figures: ``validation/<length>_frames/sigma_<level>``, ``validation/<length>_frames``, and
            ``validation/loss`` for the longest.
    """

    def __init__(
        self,
        every: int,
        shards: Manifest | None,
        count: int,
        stages: Sequence[Stage],
        levels: Mapping[float, float],
        lengths: Sequence[int],
        control: ControlGroup,
        watchdog: Watchdog,
        throughput: Throughput,
        stop: StopSignals,
    ) -> None:
        super().__init__()
        self.every, self.levels, self.lengths = every, dict(levels), sorted(lengths)
        self.control, self.watchdog, self.throughput, self.stop = control, watchdog, throughput, stop
        self.shards, self.count, self.stages = shards, count, stages
        self.row: dict[str, float] = {}
        self._clips: list[Sample] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.control.open(trainer)

    def on_step_end(self, trainer: L.Trainer, module: LengthExtensionModule) -> None:
        self.row = {}
        if self.shards is not None and every(self.every, trainer):
            start = time.perf_counter()
            with module.evaluating():
                self.row = self.measure(trainer, module)
            self.throughput.leave_out(time.perf_counter() - start)

    def digest(self) -> str:
        """SHA-256 of the keys and tensors of the clips: losses on others do not compare. Empty before the first use."""
        if not self._clips:
            return ""
        return hashlib.sha256("\n".join(f"{clip.key} {clip.digest()}" for clip in self._clips).encode()).hexdigest()

    @torch.no_grad()
    def measure(self, trainer: L.Trainer, module: LengthExtensionModule) -> dict[str, float]:
        """The figures now; none when the run is asked to stop meanwhile. Every rank must call it."""
        assert self.shards is not None
        self._clips = self._clips or list(read_samples(self.shards, self.count, self.stages))
        sharing = module.sequence_size
        group, groups = self.control.rank // sharing, self.control.world // sharing
        sums = torch.zeros(len(self.lengths), len(self.levels), 2, dtype=torch.float64)
        with trainer.precision_plugin.forward_context():
            # every rank makes as many forward passes, so that none waits for another's
            for turn in range(math.ceil(len(self._clips) / groups)):
                number = turn * groups + group
                counts = number < len(self._clips)
                clip = self._clips[number % len(self._clips)]
                for i, length in enumerate(self.lengths):
                    for j, sigma in enumerate(self.levels):
                        loss = self._loss(module, clip, length, sigma)
                        sums[i, j] += counts * torch.tensor([loss / sharing, 1 / sharing])
                        self.watchdog.progress()
                        if self.stop.agree(trainer):
                            return {}
        sums = self.control.sum(sums)
        table = sums[..., 0] / sums[..., 1]
        row: dict[str, float] = {}
        for length, losses in zip(self.lengths, table.tolist(), strict=True):
            name = f"validation/{length}_frames"
            row |= {f"{name}/sigma_{sigma:.4g}": loss for sigma, loss in zip(self.levels, losses, strict=True)}
            row[name] = sum(share * loss for share, loss in zip(self.levels.values(), losses, strict=True))
        return {**row, VALIDATION: row[f"validation/{self.lengths[-1]}_frames"]}

    def _loss(self, module: LengthExtensionModule, clip: Sample, length: int, sigma: float) -> float:
        return loss_at(module.adapter, clip, length, sigma, module.attention_at, module.objective)


def lengths_of(frames: int, time: LatentTime) -> list[int]:
    """Latent frames of a clip, of its half and of its quarter, each a length that clips may have.

    Args:
        frames: of the video.
        time: how the model's VAE compresses time.
    """
    steps = (frames - time.rest) // time.step
    return sorted({time.latents(steps // part * time.step + time.rest) for part in (1, 2, 4)})
