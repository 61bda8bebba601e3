"""What a training step shows the model beside the noised latent, captions or a first frame, and what it aims at.

Noise levels are drawn in `train.flow`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from data.shards.batch import Batch
from data.shards.sample import Prompt
from train.attention.recipe import AttentionRecipe
from train.attention.sequence import SequenceShard
from train.attention.step import StepAttention
from train.config.schema import RunConfig
from train.flow import generator_for
from train.models.base import ModelAdapter
from train.models.conditions import Conditions


@contextmanager
def frozen(transformer: Any) -> Iterator[None]:
    """Without gradients, and with the LoRA off: the model as it was before training. A LoRA that is off stays off."""
    on = any(isinstance(layer, BaseTunerLayer) and not layer.disable_adapters for layer in transformer.modules())
    transformer.disable_adapters()
    try:
        with torch.no_grad():
            yield
    finally:
        if on:
            transformer.enable_adapters()


@dataclass(frozen=True)
class DenseTeacher:
    """The frozen model with dense attention at its native length: what the LoRA is to give there under its own mask.

    VAEs are causal, so that the first latent frames of a noised clip are a noised clip themselves: the window. It has
    the positions of a clip of its length, which up to the native one are the model's own whatever ``model.rope`` is.

    Attributes:
        weight: of the mean squared difference, beside the flow loss.
        frames: latent frames of the native length.
    """

    weight: float
    frames: int

    @classmethod
    def of(cls, config: RunConfig) -> DenseTeacher | None:
        """That of a run; None without ``objective.dense_teacher``."""
        weight, native = config.objective.dense_teacher, config.model.native_frames
        if not weight:
            return None
        assert native is not None, "train.config.check asks for it"
        return cls(weight, config.model.time.latents(native))

    def lesson(
        self,
        adapter: ModelAdapter,
        velocity: Tensor,
        x: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        recipe: AttentionRecipe,
        attention: StepAttention,
    ) -> tuple[Tensor, Tensor, SequenceShard | None]:
        """The model's velocity for the windows of a step's clips, the teacher's, and how ranks share them.

        Clips of the native length or less are their own window: ``velocity`` is what the model gives for it.

        Args:
            velocity: (batch, C, F, H, W), the model's for the whole clips, with its graph.
            x, sigma, conditions: noised latents, noise levels and conditions that it was given.
            recipe: the clips' attention.
            attention: the same in this step; the model has it set, and again when the backward comes to ``velocity``.
        """
        window, seen = x[:, :, : self.frames], conditions.first_frames(self.frames)
        grid, sequence = adapter.grid(window), None if attention.shard is None else attention.shard.group
        adapter.set_attention(recipe.dense().step(grid, dense=True, sequence=sequence))
        with frozen(adapter.transformer):
            target = adapter.velocity(window, sigma, seen)
        if x.shape[2] <= self.frames:
            adapter.set_attention(attention)
            return velocity, target, attention.shard
        own = recipe.step(grid, dense=attention.all_dense, sequence=sequence)
        adapter.set_attention(own)
        # Layers that run again in the backward need the attention of their forward. Autograd runs what was made last
        # first: all of the window's backward lies before that of the clips.
        velocity.register_hook(lambda _: adapter.set_attention(attention))
        return adapter.velocity(window, sigma, seen), target, own.shard


@dataclass(frozen=True)
class Objective:
    """The conditions of the flow-matching objective; what is drawn is a function of (seed, micro-batch, sample).

    Attributes:
        seed: of the run.
        empty_prompt: the empty prompt's embedding.
        caption_dropout: share of samples that see ``empty_prompt`` instead of their caption.
        first_frame: share of micro-batches whose clips go on from their own first latent frame.
        guidance: the weight that a guidance-distilled model takes as an input.
        distilled_guidance: the weight that a model without that input is distilled at; None: it is not.
        teacher: that holds the model to what it was at its native length; None: nothing does.
    """

    seed: int
    empty_prompt: Prompt
    caption_dropout: float = 0.0
    first_frame: float = 0.0
    guidance: float = 1.0
    distilled_guidance: float | None = None
    teacher: DenseTeacher | None = None

    @classmethod
    def of(cls, config: RunConfig, empty_prompt: Prompt) -> Objective:
        return cls(
            seed=config.seed,
            empty_prompt=empty_prompt,
            caption_dropout=config.caption_dropout(),
            first_frame=config.objective.first_frame,
            guidance=config.objective.guidance,
            distilled_guidance=config.objective.distilled_guidance,
            teacher=DenseTeacher.of(config),
        )

    def shown(self, batch: Batch) -> Batch:
        """The batch of a training step with its first latent frame as a condition, in a share of the micro-batches."""
        drawn = torch.rand((), generator=generator_for(self.seed, batch.step, "first_frame")) < self.first_frame
        # of a picture it is all that there is: no loss would be left
        return _with_first_frame(batch) if drawn and batch.latent.shape[2] > 1 else batch

    def drawn(self, batch: Batch) -> Conditions:
        """The conditions of a training step; ``batch`` as it is `shown`."""
        return Conditions.of(self._drop_captions(batch), self.guidance)

    def held_out(self, batch: Batch, frames: int) -> Batch:
        """A batch whose loss on its first latent ``frames`` is measured: with the first of them where every step of
        training has it."""
        return _with_first_frame(batch) if self.first_frame == 1 and frames > 1 else batch

    def target(
        self, transformer: Any, target: Tensor, batch: Batch, velocity: Callable[[Conditions], Tensor]
    ) -> Tensor:
        """What the velocity is trained towards: u + weight (v - u) for a model that is distilled at that weight.

        Such a model gives the guided velocity in one pass. Trained towards the data's own, it would unlearn that.

        Args:
            transformer: with the LoRA, which is off for u.
            target: (batch, C, F, H, W), the data's velocity v.
            batch: of the step, as the model is shown it but for the captions.
            velocity: the model's prediction for the step's noised latents, in the step's attention.
        """
        if self.distilled_guidance is None:
            return target
        empty = batch.with_prompt(list(range(len(batch.keys))), self.empty_prompt)
        with frozen(transformer):
            unguided = velocity(Conditions.of(empty, self.guidance))
        return unguided + self.distilled_guidance * (target - unguided)

    def both(self, batch: Batch, guidance: float | None = None) -> tuple[Conditions, Conditions]:
        """The conditions of a batch of one sample with its caption, and with the empty prompt.

        Args:
            guidance: that the model takes as an input with the caption, instead of the objective's.
        """
        told = self.guidance if guidance is None else guidance
        return Conditions.of(batch, told), Conditions.of(batch.with_prompt([0], self.empty_prompt), self.guidance)

    def _drop_captions(self, batch: Batch) -> Batch:
        dropped = [
            row
            for row, key in enumerate(batch.keys)
            if torch.rand((), generator=generator_for(self.seed, batch.step, key, "caption")) < self.caption_dropout
        ]
        return batch.with_prompt(dropped, self.empty_prompt) if dropped else batch


def _with_first_frame(batch: Batch) -> Batch:
    return dataclasses.replace(batch, image={**batch.image, "first_frame": batch.latent[:, :, :1]})
