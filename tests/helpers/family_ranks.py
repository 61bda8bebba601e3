"""What each rank of the families' tests runs (tests/train/models/test_contract.py)."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from tests.helpers.attention import step_attention
from tests.helpers.families import PATTERNS, build, conditions, latents
from tests.helpers.sequence_ranks import average, group_of
from tests.helpers.zero_ranks import SPREAD
from train.attention.sequence import SequenceGroup
from train.config.schema import ParallelConfig
from train.flow import flow_loss, noised
from train.lora.layers import inject_lora, lora_parameters
from train.memory.apply import set_memory_policy
from train.parallel.zero import spread_weights, zero_config


class Step(nn.Module):
    """The loss of a training step of a family's tiny model."""

    def __init__(
        self,
        family: str,
        tokens: tuple[int, int, int],
        pattern: str,
        samples: int,
        parallel: ParallelConfig,
        *,
        compiled: bool,
        sequence: SequenceGroup | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter = build(family)
        self.transformer = adapter.transformer
        inject_lora(adapter.transformer, 4, 8, adapter.targets(text=adapter.text_lora_targets is not None), seed=1)
        torch.manual_seed(4)
        for parameter in lora_parameters(adapter.transformer).values():  # B starts at zero: A would have no gradient
            torch.nn.init.normal_(parameter, std=0.1)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        set_memory_policy(adapter, parallel, compiled=compiled)
        self.transformer.train()
        latent = latents(adapter, tokens, samples)
        self.seen, self.sigma = conditions(adapter, latent), torch.linspace(0.3, 0.8, samples)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
        self.x, self.target = noised(latent, noise, self.sigma)
        self.plan = step_attention(PATTERNS[pattern], adapter.grid(self.x), block=16, sequence=sequence)
        adapter.set_attention(self.plan)

    def forward(self) -> Tensor:
        velocity = self.adapter.velocity(self.x, self.sigma, self.seen)
        given = self.adapter.given_frames(self.seen)
        return flow_loss(velocity, self.target, self.plan.shard, self.adapter.patch, given)


def gradients(
    family: str, tokens: tuple[int, int, int], pattern: str, size: int, samples: int, policy: str, compiled: bool
) -> dict[str, Any]:
    """The loss of a training step, averaged over the world, and its LoRA gradients."""
    parallel = ParallelConfig(activations=policy, ffn_chunk=16 if compiled else None)
    step = Step(family, tokens, pattern, samples, parallel, compiled=compiled, sequence=group_of(size))
    loss = step()
    loss.backward()
    found = {name: average(parameter.grad) for name, parameter in lora_parameters(step.transformer).items()}
    return {"loss": average(loss.detach()), "gradients": found, **_compiled()}


def gathered_gradients(
    family: str, tokens: tuple[int, int, int], pattern: str, samples: int, policy: str
) -> dict[str, Any]:
    """The same of compiled layers with ZeRO 3."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(torch.distributed.get_rank())}
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # the graphs are what counts here
    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    config = zero_config(3, bf16=False, offload_optimizer=False, offload_parameters=False, compiled=True)
    config["zero_optimization"] |= SPREAD
    parallel = ParallelConfig(strategy="zero3", activations=policy, ffn_chunk=16)
    step = Step(family, tokens, pattern, samples, parallel, compiled=True)
    spread_weights(step.transformer, torch.float32, "cpu", config)
    trained = lora_parameters(step.transformer)
    engine, *_ = deepspeed.initialize(
        model=step,
        model_parameters=list(trained.values()),
        optimizer=torch.optim.SGD(trained.values()),
        config=config,
    )
    loss = engine()
    engine.backward(loss)
    found = {name: safe_get_full_grad(parameter) for name, parameter in trained.items()}
    return {"loss": loss, "gradients": found, **_compiled()}


def _compiled() -> dict[str, Any]:
    counters = torch._dynamo.utils.counters
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}
