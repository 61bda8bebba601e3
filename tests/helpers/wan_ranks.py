"""What each rank of the tests of Wan's models runs (tests/train/models/test_wan_variants.py)."""

from __future__ import annotations

from typing import Any

import torch

from radial import Released
from tests.helpers import wan_variants as wan
from tests.helpers.attention import step_attention
from tests.helpers.sequence_ranks import average, group_of
from train.flow import flow_loss, noised
from train.lora.layers import inject_lora


def gradients(variant: str, size: int) -> dict[str, Any]:
    """The loss and the LoRA gradients of a step on two clips of 45 tokens, averaged over the ranks that share them."""
    sequence = group_of(size)
    adapter = wan.adapter_of(variant)
    inject_lora(adapter.transformer, 4, 8, adapter.targets(text=False), seed=1)
    torch.manual_seed(4)
    for parameter in adapter.transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    for transformer in adapter.transformers:
        transformer.enable_gradient_checkpointing()
        transformer.train()
    latent, sigma, seen = wan.batch(adapter, variant, tokens=(3, 3, 5))
    x, target = noised(latent, torch.randn(latent.shape, generator=torch.Generator().manual_seed(5)), sigma)
    plan = step_attention(Released(), adapter.grid(x), block=16, sequence=sequence)
    adapter.set_attention(plan)
    loss = flow_loss(adapter.velocity(x, sigma, seen), target, plan.shard, adapter.patch, adapter.given_frames(seen))
    loss.backward()
    found = {
        name: None if p.grad is None else average(p.grad)
        for name, p in adapter.transformer.named_parameters()
        if p.requires_grad
    }
    return {"loss": average(loss.detach()), "gradients": found}
