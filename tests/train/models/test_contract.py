"""What every registered model family must hold, whatever it is: an adapter is tested here by being registered."""

import csv
import dataclasses
import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from radial import Dense, VideoGrid
from tests.helpers import family_ranks
from tests.helpers.attention import step_attention
from tests.helpers.families import PATTERNS, TEXT, build, conditions, latents, shards, stock
from tests.helpers.family_steps import config_of, longest_runs, shrunk, step_of_two_layers
from tests.helpers.oracles import attend_exactly
from tests.helpers.ranks import run_ranks
from train.config.compose import compose_run, finish
from train.config.schema import ParallelConfig
from train.errors import UserError
from train.export.run import export_run
from train.lora.layers import inject_lora
from train.memory.apply import set_memory_policy
from train.memory.fp8 import use_fp8, why_not
from train.models.families import ADAPTERS
from train.models.layout_attention import LayoutAttention
from train.preflight import preflight
from train.run import RunFolder, train
from train.storage.checkpoints import load_weights

FAMILIES = sorted(ADAPTERS)
TOKENS = (6, 4, 5)  # 120 video tokens: the last of their blocks of 16 is not full
ODD = (3, 3, 5)  # 45: uneven on 2 ranks


def ready(adapter, tokens=TOKENS, pattern="dense", **settings):
    """A batch, after the plan is set: latent, noise levels, conditions."""
    x = latents(adapter, tokens)
    adapter.set_attention(step_attention(PATTERNS[pattern], adapter.grid(x), block=16, **settings))
    return x, torch.tensor([0.3, 0.9]), conditions(adapter, x)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_describes_its_model(family):
    adapter = build(family)
    layers, heads, head_dim = adapter.attention_shape
    assert len(adapter.layers()) == layers
    for layer in adapter.layers():
        attention = adapter.self_attention(layer)
        assert isinstance(attention.processor, LayoutAttention)
        assert attention.to_q.weight.shape[0] == heads * head_dim
    x = latents(adapter, TOKENS)
    grid = adapter.grid(x)
    assert grid == VideoGrid(*TOKENS, text_tokens=grid.text_tokens)
    assert grid.text_tokens in (0, TEXT)
    levels = adapter.noise_levels(10, 3.0)
    assert len(levels) == 10
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == pytest.approx(1)
    assert levels[-1] > 0
    assert len(adapter.noise_levels(1, 3.0)) == 1
    assert 0 <= adapter.given_frames(conditions(adapter, x)) < TOKENS[0]
    for layers in (2, 3):
        smaller = type(adapter).from_config(type(adapter).cut(type(adapter).tiny_config, layers), text_tokens=TEXT)
        assert len(smaller.layers()) == smaller.attention_shape[0] == layers


@pytest.mark.parametrize("backend", ["sdpa", "torch"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_dense_equals_the_stock_model(family, backend):
    adapter, reference = build(family), stock(family)
    x, sigma, seen = ready(adapter, backend=backend)
    got = adapter.velocity(x, sigma, seen)
    assert got.dtype == torch.float32
    assert got.shape == x.shape
    torch.testing.assert_close(got, reference.velocity(x, sigma, seen), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dense_layers", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_released_equals_a_masked_softmax_model(family, dense_layers):
    adapter = build(family)
    x, sigma, seen = ready(adapter, (12, 8, 8), "released", dense_layers=dense_layers)
    got = adapter.velocity(x, sigma, seen)
    layouts = attend_exactly(adapter)
    torch.testing.assert_close(got, adapter.velocity(x, sigma, seen), rtol=0, atol=1e-5)
    assert [layout.is_dense for layout in layouts] == [n < dense_layers for n in range(len(layouts))]
    dense = build(family)
    assert (got - dense.velocity(*ready(dense, (12, 8, 8)))).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_is_never_attended_where_the_family_masks_it(family):
    """Joint attention: what lies behind a prompt's end, and how far the batch is padded, changes nothing."""
    adapter = build(family)
    x, sigma, seen = ready(adapter)
    if not adapter.grid(x).text_tokens:
        pytest.skip("no joint attention")
    text = seen.named("text", "text")
    velocity = adapter.velocity(x, sigma, seen)
    cut = type(text)(text.tokens[:, :8], text.mask[:, :8])
    garbage = torch.where(text.mask[..., None], text.tokens, torch.tensor(7.0))
    last = text.mask.to(torch.uint8).argsort(dim=1, stable=True)  # padding first, and words in their order
    turned = type(text)(text.tokens.gather(1, last[..., None].expand_as(text.tokens)), text.mask.gather(1, last))
    for other in (cut, type(text)(garbage, text.mask), turned):
        got = adapter.velocity(x, sigma, dataclasses.replace(seen, text={"text": other}))
        torch.testing.assert_close(got, velocity, rtol=0, atol=1e-5)
    for length in (1, 2, 3):
        fewer = type(text)(text.tokens, torch.arange(TEXT).expand(2, TEXT) < length)
        got = adapter.velocity(x, sigma, dataclasses.replace(seen, text={"text": fewer}))
        assert (got - velocity)[1].abs().max() > 1e-5
    with pytest.raises(UserError, match="the shards' text has 21 tokens, model.text_tokens is 20"):
        long = type(text)(torch.zeros(2, 21, text.tokens.shape[2]), torch.ones(2, 21, dtype=torch.bool))
        adapter.velocity(x, sigma, dataclasses.replace(seen, text={"text": long}))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_gradients_equal_the_stock_models_with_peft(family):
    gradients = []
    adapter, reference = build(family), stock(family)
    names = inject_lora(adapter.transformer, 4, 8, adapter.targets(text=False), seed=3)
    reference.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=adapter.targets(text=False)))
    for side in (adapter, reference):
        torch.manual_seed(4)
        for parameter in side.transformer.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        side.velocity(*ready(adapter)).square().mean().backward()
        gradients.append({n: p.grad for n, p in side.transformer.named_parameters() if p.requires_grad})
    assert len(names) == 4 * adapter.attention_shape[0]  # Q, K, V and O of each layer
    assert len(gradients[0]) == 2 * len(names)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tokens_in_a_patterns_own_order_change_nothing(family):
    """They lie in it from the first layer to the last, dense ones among them; an oracle has them in raster order."""
    adapter = build(family)
    x, sigma, seen = ready(adapter, (3, 6, 9), "tiles", dense_layers=1)
    assert adapter.self_attention(adapter.layers()[1]).processor.layout.order is not None
    got = adapter.velocity(x, sigma, seen)
    again = adapter.velocity(x, sigma, seen)
    torch.testing.assert_close(again, got, rtol=0, atol=0)
    adapter.unset_attention()
    attend_exactly(adapter)
    torch.testing.assert_close(got, adapter.velocity(x, sigma, seen), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", ["released", "tiles"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sequence_parallel_gradients_are_the_single_processs(family, pattern):
    settings = (family, ODD, pattern)
    ranks = run_ranks(2, family_ranks.gradients, *settings, 2, 2, "none", False)
    expected = family_ranks.gradients(*settings, 1, 2, "none", False)
    for got in ranks:
        assert got["loss"] == pytest.approx(expected["loss"].item(), rel=2e-5)
        assert got["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            scale = gradient.abs().max().item()
            np.testing.assert_allclose(got["gradients"][name], gradient, rtol=1e-4, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_same_gradients(family, policy):
    expected, got = (family_ranks.gradients(family, ODD, "released", 1, 2, p, False) for p in ("none", policy))
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(got["gradients"][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(why_not(torch.device("cpu")) is not None, reason="this torch has no float8 products on the CPU")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_frozen_layers_run_in_float8(family):
    adapter = build(family)
    batch = ready(adapter)
    exact = adapter.velocity(*batch)
    adapter.transformer.requires_grad_(False)
    assert use_fp8(adapter.layers(), torch.device("cpu")) >= 4 * len(adapter.layers())
    error = (adapter.velocity(*batch) - exact).norm() / exact.norm()
    assert 0 < error < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_of_block_compiles_to_one_graph(monkeypatch, family, policy):
    """And to one more where the first layer's input has no gradient."""
    # the graphs are what counts here, not the code that becomes of them
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    got = family_ranks.gradients(family, ODD, "dense", 1, 2, policy, True)
    expected = family_ranks.gradients(family, ODD, "dense", 1, 2, "none", False)
    layers = build(family).layers()
    kinds = {(type(layer), *((name, weight.shape) for name, weight in layer.named_parameters())) for layer in layers}
    hooks = {hook for layer in layers for hook in layer._forward_hooks.values()} if policy == "none" else ()
    assert got["breaks"] == {}
    assert got["graphs"] <= len(kinds) + 1 + len(hooks)
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(got["gradients"][name], gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_zero3_gathers_whole_compute_the_same(family):
    """Without gradients, as in validation."""
    adapter, gathered = build(family), build(family)
    x, sigma, batch = ready(adapter)
    set_memory_policy(gathered, ParallelConfig(strategy="zero3", activations="full"), compiled=True)
    ready(gathered)
    torch.testing.assert_close(gathered.velocity(x, sigma, batch), adapter.velocity(x, sigma, batch))
    assert gathered.transformer.state_dict().keys() == adapter.transformer.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_zero3_gathers_whole_have_the_same_gradients(family):
    """Compiled, with DeepSpeed; on all ranks the same samples."""
    expected = family_ranks.gradients(family, ODD, "released", 1, 2, "none", False)
    for got in run_ranks(2, family_ranks.gathered_gradients, family, ODD, "released", 2, "selective"):
        assert got["breaks"] == {}
        assert got["loss"] == pytest.approx(expected["loss"].item(), rel=2e-5)
        assert got["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            scale = gradient.abs().max().item()
            np.testing.assert_allclose(got["gradients"][name], gradient, rtol=1e-4, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_torch_counts(family):
    adapter = build(family)
    x = latents(adapter, (24, 8, 8), 1)
    # other kernels' operations are not counted on a CPU
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stock(family).velocity(x, torch.tensor([0.5]), adapter.random_conditions(x))
    attention = step_attention(Dense(), adapter.grid(x), block=16).attention_flops(*adapter.attention_shape)
    assert adapter.linear_flops(adapter.grid(x)) + attention == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_load_in_shards_and_what_does_not_fit_is_said(tmp_path, family):
    adapter, cls = build(family), ADAPTERS[family]
    folder = tmp_path / "model" / "transformer"
    adapter.transformer.save_pretrained(folder, max_shard_size="50KB")
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) > 2

    def load():
        return cls.load(tmp_path / "model", "transformer", text_tokens=TEXT, dtype=torch.float32)

    loaded = load()
    assert torch.equal(loaded.velocity(*ready(loaded)), adapter.velocity(*ready(adapter)))
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8")
    described = json.loads(text)
    for change, message in (
        (
            {"num_layers": described["num_layers"] + 1},
            r"weights lack tensors of its config.json's model",
        ),
        ({"num_layers": described["num_layers"] - 1}, r"weights (lack|hold unknown) tensors of its config.json's"),
        ({"num_attention_heads": 2 * described["num_attention_heads"]}, r" is \[.*\], its config.json says \["),
    ):
        config.write_text(json.dumps({**described, **change}), encoding="utf-8")
        with pytest.raises(UserError, match=message) as caught:
            load()
        assert "\n" not in str(caught.value)
    config.write_text(text.replace(cls.model_class.__name__, "UNet2DModel"), encoding="utf-8")
    with pytest.raises(UserError, match=f"holds a UNet2DModel, expected a {cls.model_class.__name__}"):
        load()
    config.write_text(text, encoding="utf-8")
    whole = parts[1].read_bytes()
    parts[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{parts[1].name} is damaged"):
        load()
    parts[1].unlink()
    with pytest.raises(UserError, match=f"{parts[1].name} is missing, is the download complete"):
        load()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_trains_and_exports(tmp_path, family):
    settings = shards(family, tmp_path, ODD) | {"trainer.precision": "bf16", "objective.caption_dropout": "0.5"}
    config = finish(compose_run(settings))
    preflight(config)
    folder = RunFolder.create(config)
    train(config, folder)
    with (folder.path / "metrics.csv").open(encoding="utf-8") as stream:
        losses = [float(row["loss"]) for row in csv.DictReader(stream) if row["loss"]]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    trained = load_weights(folder.path / "checkpoints" / "step-000002")
    assert all(tensor.abs().max() > 0 for tensor in trained.values())
    exported = load_file(folder.path / "export" / "diffusers" / "pytorch_lora_weights.safetensors")
    assert len(exported) == len(trained) == 8 * build(family).attention_shape[0]
    export_run(folder.path, out=tmp_path / "out", merged=True)
    merged = ADAPTERS[family].load(tmp_path / "out" / "merged", text_tokens=TEXT, dtype=torch.float32)
    assert merged.velocity(*ready(merged)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "change"), [
    ("hunyuan15", {"lora.targets": r"transformer_blocks\.\d+\.attn\.(to_q|to_add_out)"}),
    ("minimax_h3", {"lora": "null"}),
])  # fmt: skip
def test_two_processes_train_what_gets_no_gradient_too(tmp_path, family, change):
    settings = shards(family, tmp_path, ODD) | {"trainer.devices": "2", **change}
    if "lora" in change:
        del settings["lora.rank"]
    words = [f"{key}={value}" for key, value in settings.items()]
    done = subprocess.run([sys.executable, "-m", "train", *words], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(longest_runs()))
def test_the_longest_runs_step_is_measured(family):
    """What tests/gpu runs at the real shapes, tiny."""
    result = step_of_two_layers(shrunk(config_of(longest_runs()[family])))
    assert result.layers == 2
    assert result.step > 0
    assert result.tflops > 0
