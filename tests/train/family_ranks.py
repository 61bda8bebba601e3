"""What each rank of the families' sequence-parallel tests runs (tests/train/test_train_contract.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo
from families import PATTERNS, build, conditions, latents
from sequence_ranks import average, group_of

from train.build import set_memory_policy
from train.config import ParallelConfig
from train.flow import noised
from train.lora import inject_lora
from train.plan import AttentionPlan
from train.sequence import flow_loss


def gradients(
    family: str, tokens: tuple[int, int, int], pattern: str, size: int, samples: int, policy: str, compiled: bool
) -> dict[str, Any]:
    """The loss of a training step, averaged over the world, and its LoRA gradients."""
    sequence = group_of(size)
    adapter = build(family)
    inject_lora(adapter.transformer, 4, 8, adapter.targets(text=adapter.text_lora_targets is not None), seed=1)
    torch.manual_seed(4)
    for parameter in adapter.transformer.parameters():
        if parameter.requires_grad:  # B starts at zero: A would have no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    set_memory_policy(
        adapter, ParallelConfig(activations=policy, ffn_chunk=16 if compiled else None), compiled=compiled
    )
    adapter.transformer.train()
    latent = latents(adapter, tokens, samples)
    seen = conditions(adapter, latent)
    sigma = torch.linspace(0.3, 0.8, samples)
    x, target = noised(latent, torch.randn(latent.shape, generator=torch.Generator().manual_seed(5)), sigma)
    plan = AttentionPlan.of(PATTERNS[pattern], adapter.grid(x), block=16, sequence=sequence)
    adapter.set_plan(plan)
    loss = flow_loss(adapter.velocity(x, sigma, seen), target, plan.shard, adapter.patch, adapter.given_frames(seen))
    loss.backward()
    said = {
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "breaks": dict(torch._dynamo.utils.counters["graph_break"]),
    }
    found = {n: average(p.grad) for n, p in adapter.transformer.named_parameters() if p.requires_grad}
    return {"loss": average(loss.detach()), "gradients": found, **said}
