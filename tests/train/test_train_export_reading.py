"""LoRAs of other tools: what the tools themselves write is read as they apply it, and nothing is passed over."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from stock_models import load_transformer, save_transformer

from train.errors import UserError
from train.export.base import stand_in
from train.export.reading import read_lora
from train.export.verify import empty_pipeline
from train.models import adapter_of
from train.sample.pipeline import load_loras

LAYERS = ["blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj", "blocks.2.attn2.to_out.0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_transformer("wan", tmp_path_factory.mktemp("reading") / "base")


@pytest.fixture(scope="module")
def model(base):
    return stand_in(base)


def trained(base, **settings):
    """A transformer with PEFT's LoRA layers, B away from zero."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=LAYERS, init_lora_weights=False, **settings)
    return get_peft_model(load_transformer(base), config)


def changes(peft_model):
    """What PEFT adds to each weight."""
    return {
        name: module.get_delta_weight("default")
        for name, module in peft_model.base_model.model.named_modules()
        if name in LAYERS
    }


def same(lora, expected):
    assert lora.pairs.keys() == expected.keys()
    for name, change in expected.items():
        down, up = lora.pairs[name]
        torch.testing.assert_close(up @ down, change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 7},
        {"r": 4, "lora_alpha": 7, "use_rslora": True},
        {"r": 4, "lora_alpha": 2, "rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn1.to_q": 5}},
    ],
)
def test_what_peft_saves(base, model, tmp_path, settings):
    peft_model = trained(base, **settings)
    peft_model.save_pretrained(str(tmp_path))
    same(read_lora(tmp_path, model), changes(peft_model))


def test_what_diffusers_saves_with_its_metadata(base, model, tmp_path):
    """As its training scripts do: the scale is in the header alone."""
    peft_model = trained(base, r=4, lora_alpha=9)
    pipeline = empty_pipeline(adapter_of("WanTransformer3DModel").pipeline_class(), peft_model.base_model.model)
    pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(peft_model.base_model.model, adapter_name="default"),
        transformer_lora_adapter_metadata={k: v for k, v in peft_model.peft_config["default"].to_dict().items() if v},
    )
    same(read_lora(tmp_path, model), changes(peft_model))


def test_what_the_released_script_reads(base, model, tmp_path):
    peft_model = trained(base, r=4, lora_alpha=9)
    state = get_peft_model_state_dict(peft_model.base_model.model, adapter_name="default")
    save_file({f"transformer.{k}": t for k, t in state.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "lora_config.json").write_text(
        json.dumps({"lora_params": {"lora_rank": 4, "lora_alpha": 9}}), encoding="utf-8"
    )
    same(read_lora(tmp_path, model), changes(peft_model))


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("transformer.blocks.0.attn1.to_q.", "lora_A.default.weight", "lora_B.default.weight"),
        ("blocks.0.attn1.to_q.", "lora.down.weight", "lora.up.weight"),
        ("diffusion_model.blocks.0.self_attn.q.", "lora_down.weight", "lora_up.weight"),
        ("model.diffusion_model.blocks.0.self_attn.q.", "lora_A.weight", "lora_B.weight"),
        ("lora_unet_blocks_0_self_attn_q.", "lora_down.weight", "lora_up.weight"),
        ("lora_unet__blocks_0_self_attn_q.", "lora_down.weight", "lora_up.weight"),
    ],
)
def test_other_spellings(model, tmp_path, prefix, down, up):
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    file = tmp_path / "style.safetensors"
    for config in ("adapter_config.json", "lora_config.json"):  # of another LoRA in the same folder
        (tmp_path / config).write_text('{"lora_alpha": 64, "r": 4}', encoding="utf-8")
    save_file({prefix + down: a, prefix + up: b}, file)
    same(read_lora(file, model), {LAYERS[0]: b @ a})
    save_file({prefix + down: a, prefix + up: b, prefix + "alpha": torch.tensor(6.0)}, file)
    same(read_lora(file, model), {LAYERS[0]: 1.5 * b @ a})


@pytest.mark.parametrize("shorthand", [False, True])
def test_what_few_step_loras_change(base, model, tmp_path, shorthand):
    """Their keys: modulations, a norm, biases; the patch embedding as a difference or as a pair of convolutions."""
    torch.manual_seed(0)
    change = {
        "scale_shift_table": torch.randn(1, 2, 32),
        "blocks.1.scale_shift_table": torch.randn(1, 6, 32),
        "blocks.0.attn1.norm_q.weight": torch.randn(32),
        "condition_embedder.time_proj.bias": torch.randn(192),
        "patch_embedding.weight": torch.randn(32, 4, 1, 2, 2),
    }
    ending = "diff_m" if shorthand else "modulation.diff"
    named = dict(
        zip(
            [f"head.{ending}", f"blocks.1.{ending}", "blocks.0.self_attn.norm_q.diff", "time_projection.1.diff_b"],
            list(change.values()),
            strict=False,
        )
    )
    if shorthand:
        named["patch_embedding.diff"] = change["patch_embedding.weight"]
    else:
        down, up = torch.randn(3, 4, 1, 2, 2), torch.randn(32, 3, 1, 1, 1)
        named |= {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
        named["patch_embedding.alpha"] = torch.tensor(6.0)
        x = torch.randn(1, 4, 3, 4, 4)
        stacked = torch.nn.functional.conv3d(torch.nn.functional.conv3d(x, down, stride=(1, 2, 2)), up)
    file = tmp_path / "few_step.safetensors"
    save_file({f"diffusion_model.{name}": tensor.clone() for name, tensor in named.items()}, file)
    lora = read_lora(file, model)
    assert not lora.pairs
    assert lora.differences.keys() == change.keys()
    for name in change.keys() - (set() if shorthand else {"patch_embedding.weight"}):
        assert torch.equal(lora.differences[name], change[name])
    if not shorthand:
        got = torch.nn.functional.conv3d(x, lora.differences["patch_embedding.weight"], stride=(1, 2, 2))
        torch.testing.assert_close(got, 2 * stacked, rtol=1e-4, atol=1e-4)
    transformer = load_transformer(base)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    load_loras(transformer, [(file, 0.5)])
    for name, tensor in transformer.state_dict().items():
        torch.testing.assert_close(
            tensor - before[name], 0.5 * lora.differences.get(name, torch.zeros(())).expand_as(tensor)
        )


@pytest.mark.parametrize(("r", "factor"), [(4, 9 / 4), (8, 9 / 8)])
def test_the_released_scripts_factor_is_the_files(model, tmp_path, r, factor):
    """Whatever a layer's own rank is."""
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    tensors = {"transformer.blocks.0.attn1.to_q.lora_A.weight": a, "transformer.blocks.0.attn1.to_q.lora_B.weight": b}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "lora_config.json").write_text(
        json.dumps({"lora_params": {"lora_rank": r, "lora_alpha": 9}}), encoding="utf-8"
    )
    same(read_lora(tmp_path, model), {LAYERS[0]: factor * b @ a})


A, B = torch.ones(4, 32), torch.ones(32, 4)
Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no LoRA tensor"),
        ({f"{Q}.lora_A.weight": A}, "layer blocks.0.self_attn.q has down of a LoRA, the rest is missing"),
        ({f"{Q}.alpha": torch.tensor(1.0)}, "has alpha of a LoRA, the rest is missing"),
        ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B[:16]}, r"has factors \(16, 4\) and \(4, 32\), expected"),
        ({f"{Q}.lora_A.weight": A[:2], f"{Q}.lora_B.weight": B}, r"has factors \(32, 4\) and \(2, 32\), expected"),
        ({f"{Q}.diff": A}, r"weight of blocks.0.self_attn.q changes by a \(4, 32\) tensor, the model has \(32, 32\)"),
        (
            {f"{Q.replace('q', 'norm_q')}.diff_b": A[0]},
            r"norm_q changes by a \(32,\) tensor, the model has none",
        ),
        ({"blocks.0.modulation.lora_A.weight": A}, "blocks.0.modulation.lora_A.weight fits no layer"),
        ({"blocks.0.diff_m": torch.ones(1, 5, 32)}, r"blocks.0.modulation changes by a \(1, 5, 32\) tensor, the model"),
        (
            {"patch_embedding.lora_down.weight": A, "patch_embedding.lora_up.weight": B},
            r"patch_embedding has factors \(32, 4\) and \(4, 32\), expected them for a \(32, 4, 1, 2, 2\) convolution",
        ),
        ({f"{Q}.dora_scale": A}, "dora_scale fits no layer of WanTransformer3DModel"),
        ({"lora_te_text_model_encoder_q.lora_down.weight": A}, "fits no layer"),
        ({"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": A}, "fits no layer"),
        (
            {
                f"{name}.{part}.weight": tensor.clone()
                for name in (Q, "transformer.blocks.0.attn1.to_q")
                for part, tensor in (("lora_A", A), ("lora_B", B))
            },
            "layer blocks.0.attn1.to_q is there twice, under two names",
        ),
        (
            {f"{name}.{part}.weight": A.clone() for name in (Q, Q[16:]) for part in ("lora_A", "lora_B")},
            "down of layer blocks.0.self_attn.q is there twice, once as",
        ),
        ({f"{Q}.{part}.weight": A.clone() for part in ("lora_A", "lora_down")}, "self_attn.q is there twice"),
        ({f"{Q}.lora_A.{name}.weight": A.clone() for name in ("one", "two")}, "self_attn.q is there twice"),
        (
            {f"{name}.diff": torch.ones(32, 32) for name in (Q, "blocks.0.attn1.to_q")},
            "the change of blocks.0.attn1.to_q.weight is there twice, under two names",
        ),
        ({f"{Q}.diff_b": torch.tensor(1.0)}, r"bias of blocks.0.self_attn.q changes by a \(\) tensor, the model has"),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.alpha": torch.ones(2)},
            "alpha of layer blocks.0.self_attn.q has 2 values, expected one",
        ),
        (
            {f"{Q}.lora_A.weight": A[:0], f"{Q}.lora_B.weight": B[:, :0]},
            r"has factors \(32, 0\) and \(0, 32\), expected",
        ),
        (
            {f"{Q}.lora_A.weight": torch.tensor(1.0), f"{Q}.lora_B.weight": B},
            r"has factors \(32, 4\) and \(\), expected",
        ),
    ],
)
def test_nothing_is_passed_over(model, tmp_path, tensors, message):
    file = tmp_path / "style.safetensors"
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        read_lora(file, model)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("adapter_model", {"lora_alpha": "x"}, "adapter_config.json: lora_alpha is 'x', expected a positive number"),
        ("adapter_model", {"alpha_pattern": {"q": None}}, "adapter_config.json: alpha_pattern: q is None, expected a"),
        (
            "pytorch_lora_weights",
            {"lora_params": {"lora_alpha": 4}},
            "lora_config.json: lora_params: lora_rank is None",
        ),
        ("pytorch_lora_weights", {"lora_params": None}, "lora_config.json: lora_params: lora_rank is None"),
        (
            "pytorch_lora_weights",
            {"lora_params": {"lora_rank": 0, "lora_alpha": 4}},
            "lora_rank is 0, expected a positive number",
        ),
    ],
)
def test_a_config_beside_the_file_is_checked(model, tmp_path, name, config, message):
    save_file({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}, tmp_path / f"{name}.safetensors")
    beside = {"adapter_model": "adapter_config.json", "pytorch_lora_weights": "lora_config.json"}[name]
    (tmp_path / beside).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path, model)


def test_files_that_are_none(model, tmp_path):
    with pytest.raises(UserError, match="holds 0 safetensors files, expected one"):
        read_lora(tmp_path, model)
    (tmp_path / "a.safetensors").write_bytes(b"not a LoRA")
    with pytest.raises(UserError, match="a.safetensors is not readable as safetensors"):
        read_lora(tmp_path, model)
    with pytest.raises(UserError, match="b.safetensors is missing, expected a LoRA"):
        read_lora(tmp_path / "b.safetensors", model)
    file = tmp_path / "adapter_model.safetensors"
    for config, header, message in (
        ("{", {}, "adapter_config.json is not JSON"),
        ("[]", {}, "adapter_config.json is a list, expected a JSON object"),
        ("{}", {"lora_adapter_metadata": "{"}, "adapter_model.safetensors: lora_adapter_metadata is not JSON"),
    ):
        save_file({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}, file, header)
        (tmp_path / "adapter_config.json").write_text(config, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_lora(file, model)
