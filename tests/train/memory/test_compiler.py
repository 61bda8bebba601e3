"""What the compiler is told: 16-bit tensors are stored narrow, and a step of compiled layers takes less memory."""

import json

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from train.memory import compiler
from train.memory.compiler import StoreNarrow
from train.memory.fp8 import to_fp8
from train.models.families.wan import rotate

CONVERT = torch.ops.prims.convert_element_type.default


def stored(function, *inputs):
    """Names of the nodes of a function's graph that the pass stores."""
    graph = make_fx(function, select_decomp_table())(*inputs).graph
    StoreNarrow()(graph)
    return [node.target for node in graph.nodes if node.meta.get("inductor_realize_to_strides")]


def test_the_inputs_of_norms_are_stored():
    x, y = (torch.randn(2, 8, dtype=torch.bfloat16) for _ in range(2))
    add = torch.ops.aten.add.Tensor
    assert stored(lambda x, y: F.layer_norm((x + y).float(), [8]), x, y) == [add]
    assert stored(lambda x, y: F.rms_norm((x + y).float(), [8]), x, y) == [add]
    # widened for one use, or not narrow at all
    assert stored(lambda x, y: (x + y).float() * 2, x, y) == []
    assert stored(lambda x, y: F.layer_norm(x + y, [8]), x.float(), y.float()) == []


def test_what_goes_on_in_both_widths_is_stored():
    def gated(x, y):
        wide = (x + y).float()
        return wide * 3, wide.bfloat16()

    x, y = (torch.randn(2, 8, dtype=torch.bfloat16) for _ in range(2))
    assert stored(gated, x, y) == [torch.ops.aten.add.Tensor]


def test_the_gradients_of_norms_are_stored():
    """As rotary angles give them back: narrow again, before the norm's weight."""
    q, grad = (torch.randn(1, 6, 16, dtype=torch.bfloat16) for _ in range(2))
    cos, sin = (torch.randn(1, 6, 1, 8) for _ in range(2))

    def gradient(q, grad):
        q = q.detach().requires_grad_()
        normed = F.rms_norm(q, [16], torch.ones(16, dtype=torch.bfloat16))
        (back,) = torch.autograd.grad(rotate(normed.unflatten(-1, (2, 8)), cos, sin), q, grad.unflatten(-1, (2, 8)))
        return back

    (last, *others) = reversed(stored(gradient, q, grad))
    assert last == torch.ops.aten.view.default  # of the rotated gradient's sum
    assert torch.ops.aten.mul.Tensor not in others


def test_what_is_rounded_to_float8_is_stored():
    x, y = (torch.randn(2, 16, dtype=torch.bfloat16) for _ in range(2))
    assert stored(lambda x, y: to_fp8(x + y), x, y) == [torch.ops.aten.add.Tensor]
    # only from where it is wide all the way to the sum
    assert stored(lambda x, y: ((x + y).float() * 2).bfloat16().float().sum(-1), x, y) == [CONVERT]


def test_nodes_of_which_nothing_is_known_are_left_alone():
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    graph = make_fx(lambda x: F.layer_norm((x + x).float(), [8]), select_decomp_table())(x).graph
    for node in graph.nodes:
        node.meta.clear()
    StoreNarrow()(graph)
    assert not any(node.meta for node in graph.nodes)


class Layer(nn.Module):
    """The norms, gates and residual connections of a transformer layer, with linear layers for its rest."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=torch.bfloat16) for _ in range(4))
        self.gate = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for first, second in (self.layers[:2], self.layers[2:]):
            normed = (F.layer_norm(x.float(), x.shape[-1:]) * (1 + self.gate) + self.gate).type_as(x)
            x = (x.float() + second(F.silu(first(normed))) * self.gate).type_as(x)
        return x


def peak(layer, x, settings, monkeypatch, tmp_path):
    """Gradient of x, and the most memory that a compiled, checkpointed step has allocated, in tensors like x."""
    monkeypatch.setattr(compiler, "SETTINGS", settings)
    torch._dynamo.reset()
    run = compiler.compile_call(lambda x: checkpoint(layer, x, use_reentrant=False))

    def step():
        own = x.clone().requires_grad_()
        run(own).backward(torch.ones_like(x))
        return own.grad

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        gradient = step()
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    now = most = 0
    for event in events:
        now += event["args"]["Bytes"]
        most = max(most, now)
    return gradient, most / (x.numel() * x.element_size())


@pytest.mark.slow
def test_a_compiled_step_takes_less_memory_for_the_same_gradients(monkeypatch, tmp_path):
    torch.manual_seed(0)
    layer, x = Layer(64), torch.randn(1, 20_000, 64, dtype=torch.bfloat16)
    ours, less = peak(layer, x, compiler.SETTINGS, monkeypatch, tmp_path)
    plain, more = peak(layer, x, {"dynamic": False}, monkeypatch, tmp_path)
    torch.testing.assert_close(ours, plain, rtol=3e-2, atol=3e-2)
    print(f"{more:.2f} -> {less:.2f} tensors")
    assert less < more - 1
