"""Activation policies: the same gradients from less memory."""

import math

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from radial.backends import BACKENDS
from tests.helpers.attention import step_attention
from tests.helpers.sequence_ranks import PATTERNS, clips, tiny_adapter
from train.config.schema import ParallelConfig
from train.errors import UserError
from train.flow import noised
from train.memory.apply import set_memory_policy
from train.memory.layer_policies import LayerPolicies
from train.memory.layer_runners import layer_runner
from train.memory.offload import Offload, Stored
from train.models.conditions import Conditions

CELLS = (3, 12, 20)  # 45 tokens


def gradients(prepare=lambda adapter: None, pattern="released"):
    """LoRA gradients of a tiny Wan after ``prepare(adapter)``."""
    adapter = tiny_adapter()
    prepare(adapter)
    adapter.transformer.train()
    x0, eps, sigma, text = clips(2, CELLS)
    x, target = noised(x0, eps, sigma)
    adapter.set_attention(step_attention(PATTERNS[pattern], adapter.grid(x), block=16))
    (adapter.velocity(x, sigma, Conditions({"text": text})) - target).square().mean().backward()
    return [p.grad for p in adapter.transformer.parameters() if p.requires_grad]


def policy(**settings):
    return lambda adapter: set_memory_policy(adapter, ParallelConfig(**settings), compiled=False)


def mixed(offload, *names, compiled=False):
    """Each of the three layers keeps something else."""
    parallel, policies = ParallelConfig(activations="auto"), LayerPolicies(names, offload)
    return lambda adapter: set_memory_policy(adapter, parallel, compiled=compiled, policies=policies)


def with_offload(name, offload, compiled=False):
    runner = layer_runner(name, offload, compiled=compiled)
    return lambda adapter: adapter.transformer.enable_gradient_checkpointing(runner)


@pytest.mark.parametrize("pattern", ["released", "dense"])
@pytest.mark.parametrize(
    "prepare",
    [
        policy(activations="full"),
        policy(activations="selective"),
        policy(activations="full", offload_activations=True),
        policy(ffn_chunk=16),
        policy(activations="selective", ffn_chunk=7),
        with_offload("full", Offload(least=0)),
        with_offload("selective", Offload(least=0)),
        mixed(0, "full", "selective", "none"),
        mixed(math.inf, "selective", "full", "none"),
    ],
)
def test_gradients_are_those_without_a_policy(prepare, pattern):
    for got, expected in zip(gradients(prepare, pattern), gradients(pattern=pattern), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("prepare", "forwards"),
    [
        (policy(activations="none"), 3),
        (policy(activations="full"), 6),
        (policy(activations="selective"), 3),
        (mixed(0, "full", "full", "selective"), 5),
        (mixed(0, "full", "selective", "none"), 4),
    ],
)
def test_selective_never_computes_attention_again(monkeypatch, prepare, forwards):
    calls = []
    kernel = type(BACKENDS["torch"])
    whole = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *arguments: calls.append(1) or whole(*arguments))
    gradients(prepare)
    assert len(calls) == forwards


def test_flex_attention_in_plain_layers_is_refused_by_selective():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.trained = nn.Parameter(torch.ones(()))

        def forward(self, q):  # without a gradient, which a CPU cannot give
            return flex_attention(q, q, q)

    run = layer_runner("selective")
    with pytest.raises(UserError, match="add trainer.compile=true"):
        run(Attention(), torch.randn(1, 1, 16, 16))


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("compiled", [False, True])
def test_first_layers_that_learn_nothing_keep_nothing(policy, compiled):
    """A LoRA may leave them out; no backward comes to them, which would take back what goes to CPU memory."""
    found = []
    for kept in ("none", policy):
        torch._dynamo.reset()
        adapter, offload = tiny_adapter(), Offload(least=0)
        if kept == "none":
            set_memory_policy(adapter, ParallelConfig(activations="none"), compiled=False)
        else:
            with_offload(kept, offload, compiled=compiled)(adapter)
        adapter.transformer.train()
        for name, parameter in adapter.transformer.named_parameters():
            parameter.requires_grad_(".lora_" in name and name.startswith("blocks.2."))
        x0, eps, sigma, text = clips(2, (3, 12, 20))
        x, target = noised(x0, eps, sigma)
        adapter.set_attention(step_attention(PATTERNS["released"], adapter.grid(x), block=16))
        for _ in range(2):
            (adapter.velocity(x, sigma, Conditions({"text": text})) - target).square().mean().backward()
            assert offload.stored == 0
        found.append([p.grad for p in adapter.transformer.parameters() if p.requires_grad])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_torchs_selective_policy_does_not_see_compiled_flex_attention():
    """Why layers that are not compiled have contexts of our own. Once this fails, torch's may do for them."""
    q, seen = torch.randn(1, 1, 16, 16), []
    forward, _ = create_selective_checkpoint_contexts(lambda context, operator, *_: seen.append(operator))
    with forward:
        torch.compile(lambda q: flex_attention(q, q, q), fullgraph=True)(q)
        assert not seen
        (q + 1).sum()
    assert seen == [torch.ops.aten.add.Tensor, torch.ops.aten.sum.default]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "forwards"),
    [
        (lambda adapter: set_memory_policy(adapter, ParallelConfig(activations="full"), compiled=True), 6),
        (lambda adapter: set_memory_policy(adapter, ParallelConfig(activations="selective"), compiled=True), 3),
        (with_offload("selective", Offload(least=0), compiled=True), 3),
        (mixed(0, "selective", "selective", "selective", compiled=True), 3),
    ],
)
def test_compiled_layers_keep_the_same(monkeypatch, prepare, forwards):
    """One graph for the first layer, whose input has no gradient, one for all others, and no breaks."""
    expected, calls = gradients(), []
    kernel = type(BACKENDS["torch"])
    whole = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *arguments: calls.append(1) or whole(*arguments))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    out = []
    monkeypatch.setattr("train.memory.offload.Stored", lambda *arguments: out.append(Stored(*arguments)) or out[-1])
    for got, want in zip(gradients(prepare), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    assert len(calls) == forwards
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    weights = {tuple(p.shape) for p in tiny_adapter().transformer.parameters()}
    assert not {tuple(stored.like.shape) for stored in out} & weights


@pytest.mark.slow
def test_compiled_layers_may_keep_different_things():
    """One graph for each policy, and one for the first layer, whose input has no gradient: no breaks."""
    expected = gradients()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    got = gradients(mixed(math.inf, "selective", "full", "none", compiled=True))
    for gradient, want in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


class Sizes(TorchDispatchMode):
    """Records the shapes of everything that operators give."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


def test_the_wide_middle_of_a_chunked_ffn_never_exists_whole():
    wide = 96

    def longest(prepare):
        with Sizes() as sizes:
            gradients(prepare)
        return max(shape[-2] for shape in sizes.shapes if len(shape) > 1 and shape[-1] == wide)

    assert longest(policy()) >= 45
    assert longest(policy(ffn_chunk=16)) <= 64  # 64 is the weight itself, (64, 96) transposed


@pytest.mark.parametrize(("name", "kept"), [("full", 3), ("selective", 6)])
def test_what_is_kept_goes_out_and_all_of_it_comes_back(name, kept):
    offload = Offload(least=0)
    put, out = offload.put, []

    def counted(x):
        stored = put(x)
        if not isinstance(stored, torch.Tensor):
            out.append(stored)
        return stored

    offload.put = counted
    gradients(with_offload(name, offload))
    assert len(out) == kept  # each layer's input, and with selective attention's output; all share text and angles
    assert not offload.stored
    assert len(offload.spare) == kept
    gradients(with_offload(name, offload))
    assert len(offload.spare) == kept  # the second step used them again


def test_what_exceeds_the_limit_stays():
    offload = Offload(least=0, limit=100)
    for _ in range(2):  # the same each step
        first, second, third = (offload.put(torch.arange(n)) for n in (8, 4, 2))
        assert [isinstance(x, torch.Tensor) for x in (first, second, third)] == [False, False, True]
        assert [len(offload.get(x)) for x in (third, second, first)] == [2, 4, 8]


@pytest.mark.parametrize("limit", [math.inf, 4 * 8 * 800])
def test_buffers_of_other_clips_make_room(limit):
    """Clips of several shapes take turns: each goes out as a whole, in no more memory than the largest needs."""
    offload = Offload(least=0, limit=limit)
    for size in (300, 800, 500, 800, 700, 300, 600):
        tensors = [torch.full((size,), float(i), dtype=torch.float64) for i in range(4)]
        stored = [offload.put(x) for x in tensors]
        assert not any(isinstance(x, torch.Tensor) for x in stored)
        for handle, x in zip(reversed(stored), reversed(tensors), strict=True):
            assert torch.equal(offload.get(handle), x)
        assert sum(offload.spare) == offload.locked <= 4 * 8 * 800


def test_tensors_come_back_as_they_were_in_any_order():
    offload = Offload(least=0)
    tensors = [torch.randn(5, 7).t(), torch.randn(3, dtype=torch.bfloat16), torch.arange(6), torch.randn(2, 3, 4)]
    stored = [offload.put(x) for x in tensors]
    for index in (3, 1, 2, 0):
        back = offload.get(stored[index])
        assert torch.equal(back, tensors[index])
        assert back.stride() == tensors[index].stride()
    small = torch.ones(3)
    assert Offload(least=13).put(small) is small
