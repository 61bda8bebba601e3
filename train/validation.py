"""The loss on held-out clips while training: fixed clips, noise levels and noise, at several clip lengths.

A shorter clip is the beginning of a longer one: the VAEs are causal in time, so its latents are the longer's first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from data.batch import collate
from data.manifest import Manifest
from data.sample import Sample
from data.stream import read_samples
from train.control import ControlGroup
from train.figures import VALIDATION
from train.flow import noise_like, noised
from train.models import Conditions
from train.module import LengthExtensionModule
from train.sequence import flow_loss
from train.stop import StopSignals
from train.throughput import Throughput
from train.watchdog import Watchdog


class Validation(Callback):
    """Measures every ``every`` steps and at the end, on all ranks together; the random state stays as it is.

    Args:
        every: optimizer steps; 0: never.
        shards: held-out clips.
        count: how many of them, the first.
        sigmas: noise levels.
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
        sigmas: Sequence[float],
        lengths: Sequence[int],
        seed: int,
        control: ControlGroup,
        watchdog: Watchdog,
        throughput: Throughput,
        stop: StopSignals,
    ) -> None:
        self.every, self.sigmas, self.lengths, self.seed = every, list(sigmas), sorted(lengths), seed
        self.control, self.watchdog, self.throughput, self.stop = control, watchdog, throughput, stop
        self.shards, self.count = shards, count
        self.row: dict[str, float] = {}
        self._step = -1
        self._clips: list[Sample] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.control.open(trainer)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.row = {}
        if trainer.global_step == self._step or not self.every or self.shards is None:
            return
        self._step = trainer.global_step
        if self._step % self.every == 0 or self._step == trainer.max_steps:
            assert isinstance(module, LengthExtensionModule)
            start = time.perf_counter()
            module.transformer.eval()
            self.row = self.measure(trainer, module)
            module.transformer.train()
            self.throughput.leave_out(time.perf_counter() - start)

    @torch.no_grad()
    def measure(self, trainer: L.Trainer, module: LengthExtensionModule) -> dict[str, float]:
        """The figures now; none when the run is asked to stop meanwhile. Every rank must call it."""
        assert self.shards is not None
        self._clips = self._clips or list(read_samples(self.shards, self.count))
        sharing = module.sequence_size
        group, groups = self.control.rank // sharing, self.control.world // sharing
        sums = torch.zeros(len(self.lengths), len(self.sigmas), 2, dtype=torch.float64)
        with trainer.precision_plugin.forward_context():
            # every rank makes as many forward passes, so that none waits for another's
            for turn in range(math.ceil(len(self._clips) / groups)):
                number = turn * groups + group
                counts = number < len(self._clips)
                clip = self._clips[number % len(self._clips)]
                for i, length in enumerate(self.lengths):
                    for j, sigma in enumerate(self.sigmas):
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
            row |= {f"{name}/sigma_{sigma:g}": loss for sigma, loss in zip(self.sigmas, losses, strict=True)}
            row[name] = sum(losses) / len(losses)
        return {**row, VALIDATION: row[f"validation/{self.lengths[-1]}_frames"]}

    def _loss(self, module: LengthExtensionModule, clip: Sample, length: int, sigma: float) -> float:
        batch = collate([clip], 0).to(module.device)
        latent = batch.latent[:, :, :length]
        level = torch.tensor([sigma], device=latent.device)
        noise = noise_like(latent, self.seed, "validation", clip.key, length)
        x, target = noised(latent, noise, level)
        plan = module.plan(latent, all_dense=module.levels(latent.shape[2:]).dense(sigma))
        module.adapter.set_plan(plan)
        conditions = Conditions.of(batch, module.guidance).first_frames(length)
        velocity, given = module.adapter.velocity(x, level, conditions), module.adapter.given_frames(conditions)
        loss: Tensor = flow_loss(velocity, target, plan.shard, module.adapter.patch, given)
        return loss.item()


def lengths_of(latent_frames: int) -> list[int]:
    """A clip's own length, its half and its quarter: 4x, 2x and 1x of a native clip, in latent frames."""
    return sorted({(latent_frames - 1) // part + 1 for part in (1, 2, 4)})
