"""The memory of a step of a real model at its real shape, traced on fake tensors: no weights, no arithmetic."""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from radial import make_pattern
from tests.helpers.attention import step_attention
from train.attention.recipe import AttentionRecipe
from train.config.schema import RunConfig
from train.flow import flow_loss, noised
from train.lora.layers import inject_lora
from train.memory.apply import set_memory_policy
from train.memory.fp8 import Fp8Linear, exchange_linear
from train.models.families import family_of
from train.models.weights import settle
from train.step.objective import DenseTeacher


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x)
        return out


def step_memory(config: RunConfig, layers: int) -> float:
    """Bytes at the peak of forward and backward of one clip, eager, in bf16; optimizer state not included."""
    family = family_of(config.model)
    with torch.device("meta"):
        shape = family.cut(config.model.dimensions or {}, layers)
        adapter = family.from_config(shape, text_tokens=config.model.text_tokens)
    if family.family == "hunyuan15":
        adapter.transformer.forward = functools.partial(_all_text_valid, adapter.transformer)
    inject_lora(adapter.transformer, config.lora.rank, config.lora.alpha, adapter.lora_targets, seed=0)
    settle(adapter.transformer, torch.bfloat16, "meta")
    if config.trainer.fp8:
        exchange_linear(adapter.layers(), lambda linear: Fp8Linear(linear, torch.device("meta")))
    set_memory_policy(adapter, config.parallel, compiled=False)
    adapter.transformer.train()
    pattern = make_pattern(config.attention.pattern)
    latent = torch.empty(1, adapter.latent_channels, *config.latent_size(), device="meta")
    attention, teacher = step_attention(pattern, adapter.grid(latent)), DenseTeacher.of(config)
    adapter.set_attention(attention)
    if teacher is not None:  # its layouts are kept: made now, of real numbers
        AttentionRecipe(pattern).step(adapter.grid(latent[:, :, : teacher.frames]), dense=True)
    mode, live = FakeTensorMode(allow_non_fake_inputs=True), Live()
    fake(adapter.transformer, mode)
    for parameter in adapter.transformer.parameters():
        live.add(parameter)
    with mode, live:
        x0, noise = (torch.randn(1, adapter.latent_channels, *config.latent_size()) for _ in range(2))
        conditions = adapter.random_conditions(x0)
        if config.objective.first_frame > 0:
            conditions = replace(conditions, image={**conditions.image, "first_frame": x0[:, :, :1]})
        sigma = torch.tensor([0.6])
        x, target = noised(x0, noise, sigma)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            given = adapter.given_frames(conditions)
            velocity = adapter.velocity(x, sigma, conditions)
            loss = flow_loss(velocity, target, None, adapter.patch, given)
            if teacher is not None:
                seen = (adapter, velocity, x, sigma, conditions)
                lesson = teacher.lesson(*seen, AttentionRecipe(pattern), attention)
                loss = loss + teacher.weight * flow_loss(*lesson, adapter.patch, given)
        loss.backward()
    return float(live.peak)


def _all_text_valid(model: Any, x: Tensor, timestep: Tensor, words: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor]:
    """HunyuanVideo-1.5's forward of a prompt that fills its room: it orders text by its masks, which fakes have not."""
    grid = x.shape[2:]
    rotary, modulation, text = model.rope(x), model.time_embed(timestep), model.context_embedder(words, timestep, mask)
    tokens = model.x_embedder(x)
    for layer in model.transformer_blocks:
        rest = (text, modulation, mask, rotary)
        run = (
            model._gradient_checkpointing_func if model.gradient_checkpointing else lambda layer, *given: layer(*given)
        )
        tokens, text = run(layer, tokens, *rest)
    tokens = model.proj_out(model.norm_out(tokens, modulation))
    return (tokens.unflatten(1, grid).movedim(-1, 1),)


def fake(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Turns a model on the meta device into one of fake CPU tensors."""
    cpu = torch.device("cpu")
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                data = FakeTensor(mode, parameter.data, cpu)
                module._parameters[name] = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = FakeTensor(mode, buffer, cpu)


def with_parallel(config: RunConfig, **changes: Any) -> RunConfig:
    """The config with other ``parallel`` settings."""
    return replace(config, parallel=replace(config.parallel, **changes))
