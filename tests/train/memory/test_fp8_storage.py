"""Weights stored in float8: their error, exactness where they were float8 before, and what is refused."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers.family_ranks import Step
from tests.helpers.tiny import save_model
from train.config.compose import compose_run, finish
from train.config.schema import ParallelConfig
from train.errors import UserError
from train.export.merge import merge
from train.lora.reading import Lora
from train.memory import fp8, fp8_storage
from train.memory.fp8 import Fp8Linear, to_fp8, why_not
from train.memory.fp8_storage import StoredLinear, expanded, store_fp8
from train.models.families import ADAPTERS
from train.models.loading import load_adapter
from train.planning.sizes import Sizes

CPU = torch.device("cpu")
needs_products = pytest.mark.skipif(why_not(CPU) is not None, reason=str(why_not(CPU)))


def relative(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("products", [False, pytest.param(True, marks=needs_products)])
@pytest.mark.parametrize("bias", [True, False])
def test_both_products_are_those_of_the_stored_weight(products, bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 208, bias=bias)
    with torch.no_grad():
        linear.weight *= torch.logspace(-3, 2, 208)[:, None]  # rows of all sizes
    layer = StoredLinear(linear, CPU, CPU, products=products)
    x, grad = torch.randn(3, 7, 96, requires_grad=True), torch.randn(3, 7, 208)
    out = layer(x)
    (dx,) = torch.autograd.grad(out, x, grad)
    stored = expanded(layer.weight, layer.scale, torch.float64)
    exact = x.detach().double() @ stored.t() + (linear.bias.detach().double() if bias else 0)
    limit = 5e-2 if products else 1e-6
    assert relative(out, exact) < limit and relative(dx, grad.double() @ stored) < limit
    # the error of the stored weight itself: 3 bits behind the leading one
    assert 0.01 < relative(stored, linear.weight.detach().double()) < 0.03
    assert layer.weight.nbytes == 96 * 208 and layer.scale.nbytes == 4 * 208


def plain_product(left, right_bytes, right_scale, bias):
    """`train.memory.fp8.multiply` without the hardware's product, which CPUs have from torch 2.13 on."""
    rounded, scale = to_fp8(left)
    product = (rounded.float() * scale) @ (right_bytes.view(torch.float8_e4m3fn).float().t() * right_scale)
    return (product if bias is None else product + bias.float()).to(torch.bfloat16)


@pytest.mark.parametrize(
    "make",
    [
        lambda linear: StoredLinear(linear, CPU, CPU, products=True),
        lambda linear: StoredLinear(linear, CPU, CPU, products=False),
        Fp8Linear,
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_layers_hand_the_gradient_on(monkeypatch, make, dtype):
    """In autocast's own dtype too: torch 2.11 gave no gradient where the layer's last conversion had no effect."""
    monkeypatch.setattr(fp8, "multiply", plain_product)
    monkeypatch.setattr(fp8_storage, "multiply", plain_product)
    torch.manual_seed(0)
    layer = make(nn.Linear(96, 208).requires_grad_(False))
    x, grad = torch.randn(3, 7, 96, dtype=dtype, requires_grad=True), torch.randn(3, 7, 208)

    def gradient(run):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(x * 1.5)
        return torch.autograd.grad(out, x, grad.to(out.dtype))[0]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative(gradient(compiled), gradient(layer).double()) < 0.02


@needs_products
def test_compiled_products_are_those_of_the_layer():
    """But for the gradient's rounding to bfloat16 ahead of that to float8, which the compiler leaves out."""
    torch.manual_seed(0)
    layer = StoredLinear(nn.Linear(96, 208), CPU, CPU, products=True)
    x, grad = torch.randn(21, 96, requires_grad=True), 1e-5 * torch.randn(21, 208)
    compiled = torch.compile(layer, fullgraph=True)
    (out, dx), (got, got_dx) = ((out, *torch.autograd.grad(out, x, grad)) for out in (layer(x), compiled(x)))
    torch.testing.assert_close(got, out, rtol=1e-2, atol=1e-6)
    assert relative(got_dx, dx.double()) < 0.02
    exact = grad.double() @ expanded(layer.weight, layer.scale, torch.float64)
    assert relative(got_dx, exact) < 1.02 * relative(dx, exact)


def test_numbers_that_are_float8_already_stay_exact():
    linear = nn.Linear(32, 48)
    with torch.no_grad():
        linear.weight.copy_((linear.weight * 1000).to(torch.float8_e4m3fn).float())
    layer = StoredLinear(linear, CPU, CPU, products=False)
    assert torch.equal(expanded(layer.weight, layer.scale, torch.float32), linear.weight)


@pytest.mark.parametrize("family", sorted(ADAPTERS))
def test_a_model_trains_its_lora_over_stored_weights(family):
    step = Step(family, (3, 4, 5), "released", 1, ParallelConfig(), compiled=False)
    adapter, exact = step.adapter, step().item()
    before = {n for n, p in adapter.transformer.named_parameters() if p.requires_grad}
    assert store_fp8(adapter.layers(), CPU, CPU) >= 4 * len(adapter.layers())
    assert {n for n, p in adapter.transformer.named_parameters() if p.requires_grad} == before
    stored = [m for m in adapter.transformer.modules() if isinstance(m, StoredLinear)]
    assert all(not p.requires_grad for m in stored for p in m.parameters())
    loss = step()
    loss.backward()
    assert loss.item() != exact and loss.item() == pytest.approx(exact, rel=0.1)
    assert all(p.grad.abs().max() > 0 for p in adapter.transformer.parameters() if p.requires_grad)


def test_the_plan_counts_it():
    config = finish(compose_run({"conf": "wan_2x"}))
    plain = Sizes.of(config, "bf16")
    stored = Sizes.of(dataclasses.replace(config, model=dataclasses.replace(config.model, storage="fp8")), "bf16")
    assert 0.5 < stored.layers_weights / plain.layers_weights < 0.51
    assert plain.weights - stored.weights == plain.layers_weights - stored.layers_weights


def float8_file(folder, scales):
    file = save_model(folder) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "blocks.0.ffn.net.2.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors | ({name.replace("weight", "scale_weight"): torch.ones(1)} if scales else {}), file)
    return name, tensors[name]


def adapter_of(folder):
    config = finish(compose_run({"conf": "shapes_4x", "model.path": str(folder)}))
    return load_adapter(config.model, torch.bfloat16, 0)


def test_files_of_float8_without_scales_are_read_as_they_are(tmp_path):
    name, weight = float8_file(tmp_path / "model", scales=False)
    loaded = dict(adapter_of(tmp_path / "model").transformer.named_parameters())[name]
    assert torch.equal(loaded, weight.bfloat16())
    with pytest.raises(UserError, match="in float8: a LoRA merges into the original weights"):
        merge(tmp_path / "model", tmp_path / "merged", [(Lora(pairs={}), 1.0)], None)


def test_scales_that_diffusers_ignores_are_refused(tmp_path):
    float8_file(tmp_path / "model", scales=True)
    with pytest.raises(UserError, match=r"scales of quantized weights \(blocks.0.ffn.net.2.scale_weight\)"):
        adapter_of(tmp_path / "model")


@pytest.mark.parametrize("words", [{"lora": "null"}, {"parallel": "zero3"}, {"trainer.fp8": "true"}])
def test_where_weights_cannot_be_stored_so_the_config_is_refused(words):
    with pytest.raises(UserError, match="model.storage is fp8"):
        finish(compose_run({"conf": "wan_4x", "model.storage": "fp8", **words}))
