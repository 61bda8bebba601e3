"""Frozen weights that stream on a GPU: the losses and gradients of resident ones, from a ring instead of all layers."""

import dataclasses
import gc

import pytest
import torch

from radial import Released
from tests.helpers.attention import step_attention
from train.config.schema import ParallelConfig
from train.flow import flow_loss
from train.lora.layers import inject_lora
from train.memory.apply import set_memory_policy
from train.memory.fp8 import why_not
from train.memory.fp8_storage import StoredLinear, expanded, store_fp8
from train.models.families.wan import WanAdapter
from train.models.weights import settle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
WIDE = {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 8192, "num_layers": 6, "text_dim": 64}
POLICIES = {
    "none": ParallelConfig(),
    "full": ParallelConfig(activations="full", ffn_chunk=500),
    "selective": ParallelConfig(activations="selective"),
    "offload": ParallelConfig(activations="selective", offload_activations=True),
}


def steps(parallel, compiled, stored=False):
    """Losses and gradients of three steps of six layers that are large against their clip, and the peak of memory.

    Args:
        stored: the layers' frozen weights are stored in float8.
    """
    torch._dynamo.reset()
    gc.collect()  # a module that was used is part of reference cycles: the one before would still be on the GPU
    torch.manual_seed(0)
    adapter = WanAdapter.from_config(WIDE, text_tokens=32)
    inject_lora(adapter.transformer, 8, 8, adapter.targets(text=False), seed=0)
    settle(adapter.transformer, torch.bfloat16, "cuda", on_cpu=adapter.layers() if parallel.offload_weights else ())
    if stored:
        store_fp8(adapter.layers(), adapter.device, adapter.device)
    set_memory_policy(adapter, parallel, compiled=compiled)
    adapter.transformer.train()
    trained = [p for p in adapter.transformer.parameters() if p.requires_grad]
    torch.manual_seed(1)
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.02)
    latent = torch.randn(1, 16, 5, 32, 32, device="cuda")
    conditions = adapter.random_conditions(latent)
    attention = step_attention(Released(), adapter.grid(latent), block=128)
    adapter.set_attention(attention)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            velocity = adapter.velocity(latent, torch.tensor([0.6], device="cuda"), conditions)
        loss = flow_loss(velocity, torch.zeros_like(latent), attention.shard, adapter.patch)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in trained)]
        adapter.transformer.zero_grad()
    return found, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_streamed_weights_give_what_resident_ones_give(policy, compiled):
    parallel = POLICIES[policy]
    resident, all_layers = steps(parallel, compiled)
    streamed, ring = steps(dataclasses.replace(parallel, offload_weights=True), compiled)
    for got, expected in zip(streamed, resident, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    assert ring < all_layers


needs_products = pytest.mark.skipif(
    torch.cuda.is_available() and why_not(torch.device("cuda")) is not None, reason="no float8"
)


@needs_products
@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_layers_over_stored_weights_have_the_gradients_of_those_that_are_not(policy):
    """Each of the trained tensors, and beside the bfloat16 weights: float8 has 3 bits behind the leading one."""
    exact, _ = steps(POLICIES[policy], False)
    plain, _ = steps(POLICIES[policy], False, stored=True)
    compiled, _ = steps(POLICIES[policy], True, stored=True)

    def off(some, others):
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(some, others, strict=True))

    assert off(compiled, plain) < 0.1 and off(plain, exact) < 0.2


@needs_products
def test_both_products_of_a_stored_weight_on_a_gpu():
    device = torch.device("cuda")
    linear = torch.nn.Linear(1024, 2048, device=device)
    layer = StoredLinear(linear, device, device, products=True)
    x = torch.randn(300, 1024, device=device, requires_grad=True)
    grad = torch.randn(300, 2048, device=device)
    out = layer(x)
    (dx,) = torch.autograd.grad(out, x, grad)
    stored = expanded(layer.weight, layer.scale, torch.float64)
    for got, exact in ((out, x.double() @ stored.t() + linear.bias.double()), (dx, grad.double() @ stored)):
        assert (got.double() - exact).norm() / exact.norm() < 0.05
