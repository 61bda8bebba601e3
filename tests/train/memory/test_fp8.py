"""Frozen linear layers in float8 against float64, alone and in a model with a LoRA."""

import pytest
import torch
from torch import nn

from tests.helpers.attention import step_attention
from tests.helpers.sequence_ranks import PATTERNS, clips, tiny_adapter
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.flow import noised
from train.memory.fp8 import Fp8Linear, to_fp8, use_fp8, why_not
from train.models.conditions import Conditions
from train.preflight import preflight

_WHY_NOT = why_not(torch.device("cpu"))
needs_products = pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def test_rounding_keeps_three_bits_whatever_the_row():
    matrix = torch.randn(64, 256) * torch.logspace(-28, 4, 64)[:, None]
    matrix[3] = 0
    rounded, scale = to_fp8(matrix)
    back = rounded.float() * scale
    assert torch.equal(back[3], matrix[3])
    large = matrix.abs() > matrix.abs().amax(1, keepdim=True) / 100
    assert ((back - matrix).abs() <= matrix.abs() / 16 * 1.001)[large].all()


@needs_products
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_rounded_operands(bias, dtype):
    """Against float64 of the operands as they are rounded: only bfloat16's rounding of the result is left."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 208, bias=bias)
    layer = Fp8Linear(linear)
    x = torch.randn(3, 7, 96, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 7, 208).to(dtype)
    out = layer(x)
    (dx,) = torch.autograd.grad(out, x, grad)
    assert out.dtype == dx.dtype == dtype

    def rounded(matrix):
        numbers, scale = to_fp8(matrix)
        return numbers.double() * scale.double()

    weight = linear.weight.detach()
    exact = rounded(x.detach().flatten(0, 1)) @ rounded(weight).t()
    exact = exact + linear.bias.detach().double() if bias else exact
    exact_dx = rounded(grad.flatten(0, 1).bfloat16()) @ rounded(weight.t()).t()
    assert relative(out.flatten(0, 1), exact) < 5e-3
    assert relative(dx.flatten(0, 1), exact_dx) < 5e-3
    assert 1e-2 < relative(dx, grad.double() @ weight.double()) < 6e-2


@needs_products
def test_a_model_trains_its_lora_over_rounded_weights():
    def run(fp8: bool):
        adapter = tiny_adapter()
        exchanged = use_fp8(adapter.layers(), torch.device("cpu")) if fp8 else 0
        x0, eps, sigma, text = clips(1, (3, 12, 20))
        x, target = noised(x0, eps, sigma)
        adapter.set_attention(step_attention(PATTERNS["released"], adapter.grid(x), block=16))
        loss = (adapter.velocity(x, sigma, Conditions({"text": text})) - target).square().mean()
        loss.backward()
        grads = [p.grad.flatten() for p in adapter.transformer.parameters() if p.requires_grad]
        return loss.item(), torch.cat(grads), exchanged, adapter

    loss, grads, _, plain = run(False)
    rounded_loss, rounded_grads, exchanged, adapter = run(True)
    # Q, K, V, O of both attentions and the feed-forward's two, in each layer; the LoRA's own stay
    assert exchanged == 10 * len(plain.transformer.blocks)
    names = {n for n, p in plain.transformer.named_parameters() if p.requires_grad}
    assert {n for n, p in adapter.transformer.named_parameters() if p.requires_grad} == names
    assert rounded_loss == pytest.approx(loss, rel=0.05)
    assert 0 < relative(rounded_grads, grads.double()) < 0.2


@pytest.mark.parametrize("words", [{"lora": "null"}, {"parallel": "zero3"}])
def test_where_weights_cannot_be_rounded_the_config_is_refused(words):
    with pytest.raises(UserError, match="trainer.fp8 is true with"):
        finish(compose_run({"conf": "wan_4x", "trainer.fp8": "true", **words}))


def test_a_device_without_float8_is_named(monkeypatch):
    def refuses(*_, **__):
        raise RuntimeError("only per-tensor scaling here\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    said = r"no float8 products .* on the CPU \(only per-tensor scaling here\): expected torch 2.13"
    with pytest.raises(UserError, match=said):
        use_fp8(tiny_adapter().layers(), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = finish(compose_run({"conf": "wan_4x", "trainer.fp8": "true", "model.path": "hub:a/b"}))
    with pytest.raises(UserError, match=said):  # before anything is loaded
        preflight(config)
