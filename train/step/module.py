"""The LightningModule: draws noise levels and noise, calls the adapter, takes the velocity loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import lightning as L
import torch
from torch import Tensor

from data.shards.batch import Batch
from data.shards.stream import LatentStream
from radial import Pattern
from train.attention.sequence import SequenceGroup, SequenceShard
from train.attention.step import StepAttention
from train.errors import UserError
from train.flow import StepDraw, expert_range, flow_loss, noise_like, noised
from train.lora.layers import load_parameters, lora_parameters
from train.memory.layer_policies import LayerPolicies, check_agreement
from train.memory.weight_stream import WeightStream
from train.models.base import ModelAdapter
from train.parallel.zero import whole_parameter
from train.step.average import WeightAverage
from train.step.clip_recipe import Recipes
from train.step.objective import Objective
from train.step.optimizer import Optimization

_CURRENT = "current_weights"  # of a checkpoint with an average


@dataclass(frozen=True)
class Seen:
    """What a step did with one of this rank's samples.

    Attributes:
        sigma: its noise level.
        loss: its flow loss; a rank that shares the sample with others has its share of it, of which the mean is the
            loss.
        teacher_loss: its difference to the dense teacher's velocity, likewise; None without a teacher.
    """

    key: str
    frames: int  # in latents
    sigma: float
    loss: Tensor
    teacher_loss: Tensor | None = None


class LengthExtensionModule(L.LightningModule):
    """Trains what requires a gradient in the adapter's transformer: the LoRA, or everything.

    Args:
        adapter: the model with our attention installed.
        recipes: noise levels and attention of clips by their size.
        objective: captions, first frames and what the model is trained towards.
        optimization: AdamW, its learning rates, and how many micro-batches a step has.
        seed: all randomness is a function of (seed, step, sample).
        lora: whether the weights to save are the LoRA's alone.
        sequence_size: ranks that share each sample's tokens.
        policies: what layers keep, where it was chosen for this machine; all ranks must have chosen the same.
        stream: has the layers' frozen weights come, where they lie in CPU memory.
        average: of what is trained, which `train.callbacks.average` keeps up to date.
    """

    strict_loading = False  # the frozen weights are in no checkpoint

    def __init__(
        self,
        adapter: ModelAdapter,
        *,
        recipes: Recipes,
        objective: Objective,
        optimization: Optimization,
        seed: int,
        lora: bool,
        sequence_size: int = 1,
        policies: LayerPolicies | None = None,
        stream: WeightStream | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.transformer = adapter.transformer
        self.recipes, self.objective, self.optimization = recipes, objective, optimization
        self.seed, self.lora = seed, lora
        self.sequence_size, self.policies, self.stream = sequence_size, policies, stream
        self.average = average
        self.sequence: SequenceGroup | None = None
        self.current_attention: StepAttention | None = None
        """The attention of the micro-batch in work."""
        self._gradient_norm = math.nan
        self.step_lrs: list[float] = []
        """The learning rates of the last optimizer step: one, or with LoRA+ that of A and that of B."""
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
        if self.stream is not None:
            self.stream.place()  # before Lightning moves all weights to the device

    def attention_at(self, latent: Tensor, sigma: float, pattern: Pattern | None = None) -> StepAttention:
        """The attention of clips at a noise level, as they are trained; with ``pattern``, what it would be under it.

        Args:
            latent: (batch, C, F, H, W); only its shape counts.
        """
        recipe = self.recipes.at(latent.shape[2:]).attention
        recipe = recipe if pattern is None else recipe.under(pattern)
        return recipe.step(self.adapter.grid(latent), dense=recipe.is_dense(sigma), sequence=self.sequence)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        self._read = batch.step + 1
        within = self.adapter.sigma_range
        if self.adapter.boundary is not None:
            within = expert_range(self.seed, self._step, self.recipes.own.schedule, self.adapter.boundary)
        own = self.recipes.at(batch.latent.shape[2:])
        draw = StepDraw.of(self.seed, batch.step, own.schedule, own.attention.dense_sigma, within)
        sigma = torch.tensor([draw.sigma(self.seed, batch.step, key, own.schedule) for key in batch.keys])
        levels = sigma.tolist()  # read before it is on the device, which would have to be waited for
        sigma = sigma.to(batch.latent.device)
        noise = torch.stack(
            [noise_like(x, self.seed, batch.step, key) for x, key in zip(batch.latent, batch.keys, strict=True)]
        )
        x, target = noised(batch.latent, noise, sigma)
        attention = own.attention.step(self.adapter.grid(batch.latent), dense=draw.dense, sequence=self.sequence)
        self.adapter.set_attention(attention)
        self.current_attention = attention
        shown = self.objective.shown(batch)
        target = self.objective.target(
            self.transformer, target, shown, lambda empty: self.adapter.velocity(x, sigma, empty)
        )
        conditions = self.objective.drawn(shown)
        velocity = self.adapter.velocity(x, sigma, conditions)
        given = self.adapter.given_frames(conditions)
        compared, teacher = [(velocity, target, attention.shard)], self.objective.teacher
        if teacher is not None:
            lesson = teacher.lesson(self.adapter, velocity, x, sigma, conditions, own.attention, attention)
            compared.append(lesson)
        losses = [flow_loss(*pair, self.adapter.patch, given) for pair in compared]
        self._note(batch, levels, compared, given)
        return losses[0] if teacher is None else losses[0] + teacher.weight * losses[1]

    @torch.no_grad()
    def _note(
        self,
        batch: Batch,
        levels: list[float],
        compared: list[tuple[Tensor, Tensor, SequenceShard | None]],
        given: int,
    ) -> None:
        if self._seen_at != self._step:
            self.seen, self._seen_at = [], self._step
        frames = batch.latent.shape[2]
        for row, (key, level) in enumerate(zip(batch.keys, levels, strict=True)):
            losses = [flow_loss(v[row : row + 1], to[row : row + 1], shard, self.adapter.patch, given)
                      for v, to, shard in compared]  # fmt: skip
            self.seen.append(Seen(key, frames, level, *losses))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.step_lrs = [group["lr"] for group in optimizer.param_groups]  # after the step they are the next one's
        parameters = [p for p in self.transformer.parameters() if p.grad is not None]
        self._gradient_norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if not math.isfinite(self._gradient_norm):
            for parameter in parameters:  # the optimizer leaves what has no gradient as it is, its moments too
                parameter.grad = None

    @property
    def gradient_norm(self) -> float:
        """The gradients' norm in the last step, on all ranks; a step in which it is not finite has changed nothing."""
        engine: Any = self.trainer.model
        if hasattr(engine, "get_global_grad_norm"):  # DeepSpeed reduces the gradients itself, and skips such steps too
            return float(engine.get_global_grad_norm())
        return self._gradient_norm

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        if self.trainer.global_step != self._step:
            self._step, self.position = self.trainer.global_step, self._read

    def on_train_start(self) -> None:
        self._step = self.trainer.global_step
        if self.average is not None:
            self.average.start(self.trained_weights())

    def on_train_end(self) -> None:
        """Callbacks have had this hook before, so that the last checkpoint is saved."""
        self.use_average()

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        """With the last of the data Lightning would take a step of the micro-batches that there are."""
        last = (
            self.trainer.global_step + 1 == self.trainer.max_steps
            and (batch_index + 1) % self.optimization.accumulate == 0
        )
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
        return self.optimization.configured(self._trained())

    def trained_weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds, whole: the LoRA's tensors, or all of the transformer's. Every rank must call it."""
        return {name: whole_parameter(parameter) for name, parameter in self._trained().items()}

    def load_trained_weights(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trained_weights`."""
        load_parameters(self._trained(), state)

    def use_average(self) -> None:
        """Puts the average, if there is one, in the place of the trained weights. Every rank must call it."""
        if self.average is not None:
            self.load_trained_weights(self.average.weights)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model as it is measured and generates: in evaluation mode, with the average in place of the trained
        weights if there is one. Every rank must enter it; what is trained is as it was afterwards."""
        own = {} if self.average is None else {name: w.clone() for name, w in self.trained_weights().items()}
        self.transformer.eval()
        self.use_average()
        try:
            yield
        finally:
            if own:
                self.load_trained_weights(own)
            self.transformer.train()

    @property
    def parameter_groups(self) -> list[list[torch.nn.Parameter]]:
        """What is trained, in the groups and the order of the optimizer."""
        trained = self._trained()
        return [[trained[name] for name in group] for group in self.optimization.grouped(trained)]

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return lora_parameters(self.transformer) if self.lora else dict(self.transformer.named_parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = weights = self.trained_weights()
        if self.average is not None:  # what the run is about has its place; the weights to go on with lie beside it
            checkpoint["state_dict"], checkpoint[_CURRENT] = self.average.weights, weights
        # of a step that ends in this moment; in the middle of one the run goes on from its start
        position = self._read if checkpoint["global_step"] != self._step else self.position
        checkpoint["position"] = position
        stream = self.trainer.train_dataloader
        assert isinstance(stream, LatentStream)
        checkpoint["taken"] = [[list(shape), count] for shape, count in stream.taken(position).items()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        current = checkpoint.pop(_CURRENT, None)
        if self.average is not None and current is not None:
            self.average.weights = checkpoint["state_dict"]
        self.load_trained_weights(checkpoint["state_dict"] if current is None else current)
        checkpoint["state_dict"] = {}
        self.position = checkpoint["position"]
        self.optimization.follow(checkpoint, list(self._trained()))
