"""The LightningModule: draw sigma and noise, call the adapter, velocity loss, log."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import lightning as L
import torch
from torch import Tensor

from data.shards.batch import Batch
from data.shards.sample import Prompt
from data.shards.stream import LatentStream
from radial import Pattern
from train.attention.levels import ClipLevels
from train.attention.sequence import SequenceGroup, flow_loss
from train.attention.step import StepAttention
from train.errors import UserError
from train.flow import SigmaSchedule, StepDraw, expert_range, generator_for, noise_like, noised
from train.lora.layers import load_parameters, lora_parameters
from train.models.base import ModelAdapter
from train.models.conditions import Conditions
from train.parallel.zero import whole_parameter
from train.planning.policies import BlockPolicies, check_agreement
from train.storage.resuming import follow_settings


@dataclass(frozen=True)
class Seen:
    """What a step did with one of this rank's samples.

    Attributes:
        sigma: its noise level.
        loss: its loss; a rank that shares the sample with others has its share of it, of which the mean is the loss.
    """

    key: str
    frames: int  # in latents
    sigma: float
    loss: Tensor


class LengthExtensionModule(L.LightningModule):
    """Trains what requires a gradient in the adapter's transformer: the LoRA, or everything.

    Args:
        adapter: the model with our attention installed.
        pattern, block, dense_layers, backend: the attention (`train.config.schema.AttentionConfig`).
        schedule: the distribution of the noise levels of the run's clip; of two experts, each step's is drawn by it.
        levels: of clips of a latent size (frames, height, width).
        caption_dropout: share of samples that see ``empty_prompt`` instead of their caption.
        first_frame: share of micro-batches whose clips go on from their own first latent frame.
        empty_prompt: the empty prompt's embedding.
        guidance: what a guidance-distilled model is told.
        seed: all randomness is a function of (seed, step, sample).
        lr, betas, weight_decay, warmup, decay, steps: AdamW and its schedule, in optimizer steps.
        accumulate: micro-batches in an optimizer step, all of one expert.
        lora: whether the weights to save are the LoRA's alone.
        sequence_size: ranks that share each sample's tokens.
        policies: what blocks keep, where it was chosen for this machine; all ranks must have chosen the same.
    """

    strict_loading = False  # the frozen weights are in no checkpoint

    def __init__(
        self,
        adapter: ModelAdapter,
        *,
        pattern: Pattern,
        block: int,
        dense_layers: int,
        backend: str | None,
        schedule: SigmaSchedule,
        levels: Callable[[Sequence[int]], ClipLevels],
        caption_dropout: float,
        first_frame: float = 0.0,
        empty_prompt: Prompt,
        guidance: float = 1.0,
        seed: int,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        warmup: int,
        decay: str,
        steps: int,
        accumulate: int = 1,
        lora: bool,
        sequence_size: int = 1,
        policies: BlockPolicies | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.transformer = adapter.transformer
        self.pattern, self.block, self.backend = pattern, block, backend
        self.dense_layers = dense_layers
        self.schedule, self.levels = schedule, levels
        self.caption_dropout, self.empty_prompt = caption_dropout, empty_prompt
        self.guidance, self.first_frame = guidance, first_frame
        self.seed = seed
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.warmup, self.decay, self.steps, self.accumulate = warmup, decay, steps, accumulate
        self.lora = lora
        self.sequence_size, self.policies = sequence_size, policies
        self.sequence: SequenceGroup | None = None
        self.current_attention: StepAttention | None = None
        """The attention of the micro-batch in work."""
        self._gradient_norm = math.nan
        self.step_lr = math.nan
        """The learning rate of the last optimizer step."""
        self.seen: list[Seen] = []
        """The samples of the step in work."""
        self._step = 0
        self._seen_at = -1
        self.position = self._read = 0
        """Micro-batches of the finished steps: where the data goes on after a resume."""

    def setup(self, stage: str) -> None:
        self.sequence = SequenceGroup.of(self.sequence_size)
        if self.policies is not None:
            check_agreement(self.policies)

    def plan(self, latent: Tensor, *, all_dense: bool, pattern: Pattern | None = None) -> StepAttention:
        """The attention of a micro-batch; with ``pattern``, what it would be under that one."""
        return StepAttention.of(
            pattern or self.pattern,
            self.adapter.grid(latent),
            block=self.block,
            dense_layers=self.dense_layers,
            all_dense=all_dense,
            backend=self.backend,
            sequence=self.sequence,
        )

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        self._read = batch.step + 1
        within = self.adapter.sigma_range
        if self.adapter.boundary is not None:
            within = expert_range(self.seed, self._step, self.schedule, self.adapter.boundary)
        own = self.levels(batch.latent.shape[2:])
        draw = StepDraw.of(self.seed, batch.step, own.schedule, own.dense_sigma, within)
        sigma = torch.tensor([draw.sigma(self.seed, batch.step, key, own.schedule) for key in batch.keys])
        levels = sigma.tolist()  # read before it is on the device, which would have to be waited for
        sigma = sigma.to(batch.latent.device)
        noise = torch.stack(
            [noise_like(x, self.seed, batch.step, key) for x, key in zip(batch.latent, batch.keys, strict=True)]
        )
        x, target = noised(batch.latent, noise, sigma)
        plan = self.plan(batch.latent, all_dense=draw.dense)
        self.adapter.set_attention(plan)
        self.current_attention = plan
        conditions = Conditions.of(self._with_first_frame(self._drop_captions(batch)), self.guidance)
        velocity = self.adapter.velocity(x, sigma, conditions)
        given = self.adapter.given_frames(conditions)
        loss = flow_loss(velocity, target, plan.shard, self.adapter.patch, given)
        self._note(batch, levels, velocity.detach(), target, plan, given)
        return loss

    def _note(
        self, batch: Batch, levels: list[float], velocity: Tensor, target: Tensor, plan: StepAttention, given: int
    ) -> None:
        if self._seen_at != self._step:
            self.seen, self._seen_at = [], self._step
        frames = batch.latent.shape[2]
        for row, (key, level) in enumerate(zip(batch.keys, levels, strict=True)):
            part = slice(row, row + 1)
            loss = flow_loss(velocity[part], target[part], plan.shard, self.adapter.patch, given)
            self.seen.append(Seen(key, frames, level, loss))

    def _drop_captions(self, batch: Batch) -> Batch:
        dropped = [
            row
            for row, key in enumerate(batch.keys)
            if torch.rand((), generator=generator_for(self.seed, batch.step, key, "caption")) < self.caption_dropout
        ]
        return batch.with_prompt(dropped, self.empty_prompt) if dropped else batch

    def _with_first_frame(self, batch: Batch) -> Batch:
        """The batch with its first latent frame as a condition, in a share of the micro-batches."""
        if torch.rand((), generator=generator_for(self.seed, batch.step, "first_frame")) >= self.first_frame:
            return batch
        return dataclasses.replace(batch, image={**batch.image, "first_frame": batch.latent[:, :, :1]})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.step_lr = optimizer.param_groups[0]["lr"]  # after the step it is the next one's
        parameters = [p for p in self.transformer.parameters() if p.grad is not None]
        self._gradient_norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if not math.isfinite(self._gradient_norm):
            for parameter in parameters:  # the optimizer leaves what has no gradient as it is, its moments too
                parameter.grad = None

    @property
    def gradient_norm(self) -> float:
        """Of the last step, on all ranks; a step in which it is not finite has changed nothing."""
        engine: Any = self.trainer.model
        if hasattr(engine, "get_global_grad_norm"):  # DeepSpeed reduces the gradients itself, and skips such steps too
            return float(engine.get_global_grad_norm())
        return self._gradient_norm

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        if self.trainer.global_step != self._step:
            self._step, self.position = self.trainer.global_step, self._read

    def on_train_start(self) -> None:
        self._step = self.trainer.global_step

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """With the last of the data Lightning would take a step of the micro-batches that there are."""
        last = self.trainer.global_step + 1 == self.trainer.max_steps and (batch_index + 1) % self.accumulate == 0
        if self.trainer.is_last_batch and not last:
            self._data_ended()

    def on_train_epoch_end(self) -> None:
        """Without any data Lightning would begin again, without end."""
        if self.trainer.global_step < self.trainer.max_steps and not self.trainer.should_stop:
            self._data_ended()

    def _data_ended(self) -> NoReturn:
        raise UserError(
            f"the data end in step {self.trainer.global_step + 1} of trainer.steps={self.trainer.max_steps}: the run "
            "goes on from its last checkpoint, with data for all steps that are left"
        )

    def cpu(self) -> LengthExtensionModule:
        """Nothing: Lightning calls it after training, when it would copy the whole model on every rank."""
        return self

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def _lr_factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.decay == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def trained_weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds, whole: the LoRA's tensors, or all of the transformer's. Every rank must call it."""
        return {name: whole_parameter(parameter) for name, parameter in self._trained().items()}

    def load_trained_weights(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trained_weights`."""
        load_parameters(self._trained(), state)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return lora_parameters(self.transformer) if self.lora else dict(self.transformer.named_parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.trained_weights()
        # of a step that ends in this moment; in the middle of one the run goes on from its start
        position = self._read if checkpoint["global_step"] != self._step else self.position
        checkpoint["position"] = position
        stream = self.trainer.train_dataloader
        assert isinstance(stream, LatentStream)
        checkpoint["taken"] = [[list(shape), count] for shape, count in stream.taken(position).items()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.load_trained_weights(checkpoint["state_dict"])
        checkpoint["state_dict"] = {}
        self.position = checkpoint["position"]
        follow_settings(
            checkpoint,
            lr=self.lr,
            betas=self.betas,
            weight_decay=self.weight_decay,
            factor=self._lr_factor,
            accumulate=self.accumulate,
        )
