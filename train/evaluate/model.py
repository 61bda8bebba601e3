"""The run's model, tuned and as it was, and the attention of each variant."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from radial import Dense
from radial.patterns.ultravico import UltraViCo
from train.attention.recipe import AttentionRecipe
from train.attention.step import StepAttention
from train.config.schema import RunConfig
from train.evaluate.settings import Job, Variant
from train.lora.layers import inject_lora, load_parameters, lora_parameters
from train.models.base import ModelAdapter
from train.models.loading import load_adapter
from train.planning import resolve_precision
from train.sample.pipeline import load_loras
from train.step.clip_recipe import Recipes
from train.storage.checkpoints import last_checkpoint, load_weights


class EvaluatedModel:
    """A run's model that can be each variant of a job in turn.

    Attributes:
        adapter: with the weights of the variant that was `put` last.
        device: where they are.

    Raises:
        UserError: weights that are missing, or do not fit.
    """

    def __init__(self, job: Job) -> None:
        config = job.config
        self.precision = resolve_precision(config.trainer.precision)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._lora = job.lora is not None or config.lora is not None
        dtype = torch.bfloat16 if self.precision == "bf16" and self._lora else torch.float32
        self.adapter = load_adapter(config.model, dtype, config.seed, self.device)
        AttentionRecipe.of(config).check_model(*self.adapter.attention_shape[:2])
        transformer = self.adapter.transformer
        self._whole: dict[bool, dict[str, Tensor]] = {}
        if job.lora is not None:
            print("\n".join(load_loras(transformer, [job.lora])))
        elif config.lora is not None:
            _add_lora(config, self.adapter, load_weights(last_checkpoint(job.given.run)))
        else:
            before = {name: tensor.cpu().clone() for name, tensor in transformer.state_dict().items()}
            self._whole = {False: before, True: load_weights(last_checkpoint(job.given.run))}
        transformer.eval().requires_grad_(False)
        self._recipes = Recipes(config)
        self._shape = self.adapter.attention_shape

    def put(self, variant: Variant) -> None:
        """Gives the model the variant's weights."""
        transformer = self.adapter.transformer
        if self._whole:
            transformer.load_state_dict(self._whole[variant.tuned])
        elif variant.tuned:
            transformer.enable_adapters()
        else:
            transformer.disable_adapters()

    def attention(self, variant: Variant, latent: Tensor, sigma: float) -> StepAttention:
        """A variant's attention at a noise level.

        Args:
            latent: (batch, C, F, H, W); only its shape counts.
        """
        recipe = self._recipes.at(latent.shape[2:]).attention
        if isinstance(variant.pattern, Dense):
            recipe = recipe.dense()
        elif isinstance(variant.pattern, UltraViCo):  # in every layer and at every noise level
            recipe = AttentionRecipe(variant.pattern, recipe.block)
        elif variant.pattern is not None:
            recipe = recipe.under(variant.pattern)
        return recipe.step(self.adapter.grid(latent), dense=recipe.is_dense(sigma))

    def gflops(self, variant: Variant, latent: Tensor) -> float:
        """1e9 operations of self-attention in one forward of one clip, where attention is not dense for its noise."""
        return self.attention(variant, latent, 0.0).attention_flops(*self._shape) / 1e9

    def precisely(self) -> AbstractContextManager[object]:
        """The precision that training runs in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()


def _add_lora(config: RunConfig, adapter: ModelAdapter, weights: dict[str, Tensor]) -> None:
    lora, transformer = config.lora, adapter.transformer
    assert lora is not None
    targets = lora.targets or adapter.targets(text=lora.text)
    inject_lora(transformer, lora.rank, lora.alpha, targets, config.seed, rslora=lora.rslora, dora=lora.dora)
    load_parameters(lora_parameters(transformer), weights)
