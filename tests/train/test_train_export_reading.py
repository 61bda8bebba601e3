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
from train.export.verify import PIPELINES, empty_pipeline

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
    pipeline = empty_pipeline(PIPELINES["WanTransformer3DModel"], peft_model.base_model.model)
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
    (tmp_path / "lora_config.json").write_text(json.dumps({"lora_params": {"lora_rank": 4, "lora_alpha": 9}}))
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
    save_file({prefix + down: a, prefix + up: b, prefix + "alpha": torch.tensor(6.0)}, file)
    same(read_lora(file, model), {LAYERS[0]: 1.5 * b @ a})


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
        ({f"{Q}.dora_scale": A}, "dora_scale fits no layer of WanTransformer3DModel"),
        ({"lora_te_text_model_encoder_q.lora_down.weight": A}, "fits no layer"),
        ({"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": A}, "fits no layer"),
        (
            {
                f"{name}.{part}.weight": tensor.clone()
                for name in (Q, "transformer.blocks.0.attn1.to_q")
                for part, tensor in (("lora_A", A), ("lora_B", B))
            },
            "is there twice",
        ),
    ],
)
def test_nothing_is_passed_over(model, tmp_path, tensors, message):
    file = tmp_path / "style.safetensors"
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        read_lora(file, model)


def test_files_that_are_none(model, tmp_path):
    with pytest.raises(UserError, match="holds 0 safetensors files, expected one"):
        read_lora(tmp_path, model)
    (tmp_path / "a.safetensors").write_bytes(b"not a LoRA")
    with pytest.raises(UserError, match="a.safetensors is not readable as safetensors"):
        read_lora(tmp_path, model)
    with pytest.raises(UserError, match="b.safetensors is missing, expected a LoRA"):
        read_lora(tmp_path / "b.safetensors", model)
