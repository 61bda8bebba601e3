"""The figures of every step, one row with the same keys for metrics.csv, TensorBoard and Weights & Biases.

loss, grad_norm, lr, sigma             of the step itself; loss and sigma are means over its samples, on all ranks
lr_b                                   with optim.lora_plus: of the LoRA's B (and a DoRA's norms), and lr that of its A
teacher_loss                           with objective.dense_teacher: the difference to the teacher, without the weight
loss_sigma/0.4-0.6                     loss of the samples at such noise levels since the last row that had some
loss_frames/81                         loss of the samples of so many latent frames
lora_norm/<layer>                      Frobenius norm of B A times the LoRA's factor, over a layer's modules, at times
skipped                                steps that were skipped until now (`train.callbacks.bad_steps`)
tokens_per_second, mfu, …              `train.callbacks.throughput`
validation/…                           `train.callbacks.validation`
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from data.shards.stream import LatentStream
from train.callbacks.base import StepCallback, every
from train.callbacks.throughput import Throughput
from train.lora.layers import ADAPTER
from train.parallel.control_group import ControlGroup
from train.step.module import LengthExtensionModule

BUCKETS = 5
"""Of equal width, over noise levels from 0 to 1."""
VALIDATION = "validation/loss"
"""On the longest held-out clips: the best checkpoint has least of it."""


class StepMetrics(StepCallback):
    """Collects and logs them. It stands before the checkpoints, so that no saved step lacks its row.

    Args:
        every: optimizer steps between rows; a step with a validation or with norms has one too.
        norms_every: optimizer steps between LoRA norms; 0: none.
        more: gives further figures of the step, by name: what other callbacks have counted.

    Attributes:
        row: the last one.
    """

    def __init__(
        self, every: int, norms_every: int, throughput: Throughput, control: ControlGroup,
        more: Callable[[], dict[str, float]],
    ) -> None:  # fmt: skip
        super().__init__()
        self.every, self.norms_every = every, norms_every
        self.throughput, self.control, self.more = throughput, control, more
        self.row: dict[str, float] = {}
        self._lengths: list[int] = []
        self._sums = torch.zeros(0, 2, dtype=torch.float64)
        self._saved: Tensor | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.control.open(trainer)
        stream = trainer.train_dataloader
        assert isinstance(stream, LatentStream)
        self._lengths = sorted({info.shape[1] for info in stream.manifest.samples})
        self._sums = torch.zeros(BUCKETS + len(self._lengths), 2, dtype=torch.float64)
        if self._saved is not None and self._saved.shape[1:] == self._sums.shape:
            # a rank its own; with fewer ranks those of the others are spread over them
            self._sums += self._saved[self.control.rank :: self.control.world].sum(0)

    @property
    def state_key(self) -> str:
        """Under which checkpoints hold its state; those of earlier versions too."""
        return "Figures"

    def state_dict(self) -> dict[str, Any]:
        return {"sums": torch.stack(self.control.gather(self._sums))}  # (rank, bucket, loss and count)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["sums"]

    def on_step_end(self, trainer: L.Trainer, module: LengthExtensionModule) -> None:
        row = self._step_row(module)
        due = every(self.every, trainer)
        if due:
            row |= self._bucket_row() | self.throughput.row(trainer, module)
        if self.norms_every and trainer.global_step % self.norms_every == 0:
            row |= lora_norms(module)
            due = True
        row |= self.more()
        self.row = row
        if due or VALIDATION in row:  # what was measured is never thrown away
            for logger in trainer.loggers:
                logger.log_metrics(row, step=trainer.global_step - 1)

    def _step_row(self, module: LengthExtensionModule) -> dict[str, float]:
        """Means over all ranks' samples; also adds them to the buckets."""
        taught = [each.teacher_loss for each in module.seen if each.teacher_loss is not None]
        losses = torch.stack([each.loss for each in module.seen] + taught).double().cpu()  # the one wait for the device
        step = torch.zeros(4, dtype=torch.float64)
        step[3] = losses[len(module.seen) :].sum()
        for each, loss in zip(module.seen, losses.tolist(), strict=False):
            step[:3] += torch.tensor([loss, each.sigma, 1.0])
            entry = torch.tensor([loss, 1.0])
            self._sums[min(int(each.sigma * BUCKETS), BUCKETS - 1)] += entry
            self._sums[BUCKETS + self._lengths.index(each.frames)] += entry
        loss, sigma, count, teacher = self.control.sum(step).tolist()
        return {
            "loss": loss / count,
            **({"teacher_loss": teacher / count} if taught else {}),
            "sigma": sigma / count,
            "grad_norm": module.gradient_norm,
            **dict(zip(("lr", "lr_b"), module.step_lrs, strict=False)),
        }

    def _bucket_row(self) -> dict[str, float]:
        sums, self._sums = self.control.sum(self._sums), torch.zeros_like(self._sums)
        names = [f"loss_sigma/{i / BUCKETS:.1f}-{(i + 1) / BUCKETS:.1f}" for i in range(BUCKETS)]
        names += [f"loss_frames/{length}" for length in self._lengths]
        rows = zip(names, sums.tolist(), strict=True)
        return {name: total / count for name, (total, count) in rows if count}


@torch.no_grad()
def lora_norms(module: LengthExtensionModule) -> dict[str, float]:
    """``lora_norm/<layer>`` of every layer with a LoRA; empty when all weights train. Every rank must call it."""
    if not module.lora:
        return {}
    squares: dict[str, Tensor] = {}
    weights = module.trained_weights()
    for name, a in weights.items():
        if ".lora_A." not in name:
            continue
        b = weights[name.replace(".lora_A.", ".lora_B.")].float()
        a = a.float()
        found = re.search(r"(\w+)\.(\d+)\.", name)  # blocks.7.attn1.to_q, transformer_blocks.7.attn.to_q
        layer = f"{found[1]}_{int(found[2]):02d}" if found else name.split(".lora_A.")[0]
        # |BA|^2 = tr(A^T B^T B A), without the product of the full size
        squares[layer] = squares.get(layer, torch.zeros((), device=a.device)) + ((b.T @ b) * (a @ a.T)).sum()
    scale = next(layer.scaling[ADAPTER] for layer in module.transformer.modules() if hasattr(layer, "scaling"))
    return {
        f"lora_norm/{layer}": scale * float(square.clamp(min=0).sqrt()) for layer, square in sorted(squares.items())
    }
