"""The names of the original checkpoints, held to diffusers' own converters and classes, at the models' real sizes."""

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_minimax_h3_lora_to_diffusers
from safetensors.torch import load_file
from torch import nn

from tests.helpers.original_keys import CHECKPOINTS, original_keys
from train.export.formats import FORMATS, Adapter
from train.lora.layers_by_name import weighted_layers
from train.lora.names import comfyui_layers, comfyui_names, original_layers
from train.models.families.minimax_h3 import MiniMaxH3Adapter

WAN = {"class": "WanTransformer3DModel", "convert": "convert_wan_transformer_to_diffusers"}
MODELS = {
    "Wan2.1-T2V-14B": (WAN, {}),
    "Wan2.1-T2V-1.3B": (WAN, {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "Wan2.1-I2V-14B": (WAN, {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}),
    "Wan2.2-T2V-A14B": (WAN, {}),
    "Wan2.2-TI2V-5B": (
        WAN,
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},
    ),
    "HunyuanVideo": (
        {"class": "HunyuanVideoTransformer3DModel", "convert": "convert_hunyuan_video_transformer_to_diffusers"},
        {},
    ),
    "HunyuanVideo-1.5": ({"class": "HunyuanVideo15Transformer3DModel", "convert": None}, {}),
    "MiniMax-H3": ({"class": "MiniMaxH3Transformer3DModel", "convert": None}, {}),
    "mochi-1-preview": (
        {"class": "MochiTransformer3DModel", "convert": "convert_mochi_transformer_checkpoint_to_diffusers"},
        {},
    ),
}
ATTENTION = (".attn1.", ".attn.", "single_transformer_blocks")


def model_of(name: str) -> nn.Module:
    about, config = MODELS[name]
    with torch.device("meta"):
        config = {"in_channels": 16, "out_channels": 16, **config} if about is WAN else config
        return getattr(diffusers, about["class"])(**config)


@pytest.mark.parametrize("name", [name for name, (about, _) in MODELS.items() if about["convert"] is not None])
def test_the_listed_checkpoints_are_what_diffusers_converts(name):
    assert MODELS.keys() == CHECKPOINTS.keys()
    checkpoint = {key: torch.empty(shape, device="meta") for key, shape in original_keys(name).items()}
    converted = getattr(single_file_utils, MODELS[name][0]["convert"])(checkpoint)
    expected = {key: tuple(tensor.shape) for key, tensor in model_of(name).state_dict().items()}
    assert {key: tuple(tensor.shape) for key, tensor in converted.items()} == expected


@pytest.mark.parametrize("name", MODELS)
def test_the_tables_name_every_layer(name):
    model = model_of(name)
    keys, layers = original_keys(name), weighted_layers(model)
    found = original_layers(type(model).__name__, layers)
    assert sorted(part for layer in found for part in layer.parts) == sorted(layers)
    for layer in found:
        shapes = [layers[part].weight.shape for part in layer.parts]
        assert keys[f"{layer.name}.weight"] == (sum(shape[0] for shape in shapes), *shapes[0][1:])
    assert {key for key in keys if key.endswith(".weight")} == {f"{layer.name}.weight" for layer in found}


@pytest.mark.parametrize("name", ["HunyuanVideo", "mochi-1-preview"])
def test_stacked_and_swapped_rows_lie_where_diffusers_expects_them(name):
    """Each layer's rows are numbered; the converter and the table must cut the same pieces out of a checkpoint."""
    model = model_of(name)
    layers = weighted_layers(model)
    checkpoint = {key: torch.arange(shape[0], dtype=torch.float) for key, shape in original_keys(name).items()}
    numbered = dict(checkpoint)
    converted = getattr(single_file_utils, MODELS[name][0]["convert"])(checkpoint)
    for layer in original_layers(type(model).__name__, layers):
        rows = numbered[f"{layer.name}.weight"]
        rows = torch.cat(rows.chunk(2)[::-1]) if layer.swapped else rows
        pieces = rows.split([len(layers[part].weight) for part in layer.parts])
        for part, piece in zip(layer.parts, pieces, strict=True):
            assert torch.equal(converted[f"{part}.weight"], piece), layer


@pytest.mark.parametrize("name", MODELS)
def test_comfyuis_rules_find_every_key_in_the_checkpoint(name):
    """ComfyUI joins a prefix and the checkpoint's name, and adds B A to that weight."""
    model = model_of(name)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(a in n for a in ATTENTION)}
    pairs = {
        n: (torch.ones(2, m.in_features, device="meta"), torch.ones(m.out_features, 2, device="meta"))
        for n, m in linear.items()
    }
    keys = original_keys(name)
    fused = Adapter(pairs, model, {}, "", "").fused()
    assert len(fused) <= len(pairs)
    for layer, (down, up) in fused.items():
        assert keys[f"{layer}.weight"] == (len(up), down.shape[1])
        assert down.shape[0] == up.shape[1]


@pytest.mark.parametrize("name", ["comfyui", "kohya"])
def test_diffusers_reads_minimax_h3s_loras_by_their_original_names(tmp_path, name):
    """What its modular pipeline makes of the files, feed-forward layers and their swapped halves included."""
    model = diffusers.MiniMaxH3Transformer3DModel(**MiniMaxH3Adapter.tiny_config)
    pairs = {
        layer: (torch.randn(2, m.in_features), torch.randn(m.out_features, 2))
        for layer, m in model.named_modules()
        if isinstance(m, nn.Linear) and "transformer_blocks." in layer
    }
    FORMATS[name](Adapter(pairs, model, {}, "", "x"), tmp_path)
    found = _convert_non_diffusers_minimax_h3_lora_to_diffusers(load_file(tmp_path / "x.safetensors"))
    assert len(found) == 2 * len(pairs)
    for layer, (down, up) in pairs.items():
        a, b = (found[f"transformer.{layer}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(b @ a, up @ down)


# HunyuanVideo's layers in ComfyUI, and the names under which its loader also takes them
COMFYUI = {
    "double_blocks.3.img_mod.linear": ("double_blocks.3.img_mod.lin", "double_blocks.3.img_mod.linear"),
    "double_blocks.3.img_attn_qkv": ("double_blocks.3.img_attn.qkv", "double_blocks.3.img_attn_qkv"),
    "double_blocks.3.txt_attn_proj": ("double_blocks.3.txt_attn.proj", "double_blocks.3.txt_attn_proj"),
    "double_blocks.3.img_mlp.fc1": ("double_blocks.3.img_mlp.0", "double_blocks.3.img_mlp.fc1"),
    "double_blocks.3.txt_mlp.fc2": ("double_blocks.3.txt_mlp.2", "double_blocks.3.txt_mlp.fc2"),
    "single_blocks.39.linear1": ("single_blocks.39.linear1",),
    "single_blocks.39.modulation.linear": ("single_blocks.39.modulation.lin", "single_blocks.39.modulation.linear"),
    "txt_in.individual_token_refiner.blocks.1.self_attn_qkv": (
        "txt_in.individual_token_refiner.blocks.1.self_attn.qkv",
        "txt_in.individual_token_refiner.blocks.1.self_attn_qkv",
    ),
    "txt_in.individual_token_refiner.blocks.1.mlp.fc1": (
        "txt_in.individual_token_refiner.blocks.1.mlp.0",
        "txt_in.individual_token_refiner.blocks.1.mlp.fc1",
    ),
    "txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1": (
        "txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1",
    ),
    "time_in.mlp.0": ("time_in.in_layer",),
    "guidance_in.mlp.2": ("guidance_in.out_layer",),
    "vector_in.in_layer": ("vector_in.in_layer",),
    "txt_in.t_embedder.mlp.2": ("txt_in.t_embedder.out_layer",),
    "txt_in.c_embedder.linear_1": ("txt_in.c_embedder.in_layer",),
    "txt_in.input_embedder": ("txt_in.input_embedder",),
    "final_layer.adaLN_modulation.1": ("final_layer.adaLN_modulation.1",),
}


def test_comfyuis_own_names_of_hunyuan_videos_layers():
    assert COMFYUI.keys() <= {key.removesuffix(".weight") for key in original_keys("HunyuanVideo")}
    for name, expected in COMFYUI.items():
        assert comfyui_names("HunyuanVideoTransformer3DModel", name) == expected
    assert comfyui_names("MochiTransformer3DModel", "t_embedder.mlp.0") == ("t_embedder.mlp.0",)


def test_comfyui_stacks_q_k_and_v_of_hunyuan_video_15_as_hunyuan_videos():
    """Its checkpoint has them apart; ComfyUI's has the layers of HunyuanVideo, under the names of those."""
    model = model_of("HunyuanVideo-1.5")
    kind, layers = type(model).__name__, weighted_layers(model)
    original = {layer.name: layer for layer in original_layers(kind, layers)}
    comfyui = {layer.name: layer for layer in comfyui_layers(kind, layers)}
    stacked = {name: layer for name, layer in comfyui.items() if name not in original}
    assert set(stacked) == {f"double_blocks.{n}.{side}_attn_qkv" for n in range(54) for side in ("img", "txt")}
    assert stacked["double_blocks.7.img_attn_qkv"].parts == tuple(f"transformer_blocks.7.attn.to_{x}" for x in "qkv")
    assert stacked["double_blocks.7.txt_attn_qkv"].parts == tuple(
        f"transformer_blocks.7.attn.add_{x}_proj" for x in "qkv"
    )
    assert sorted(p for layer in comfyui.values() for p in layer.parts) == sorted(layers)
    assert {name: layer for name, layer in comfyui.items() if name in original} == {
        name: layer for name, layer in original.items() if comfyui_names(kind, name)
    }
    assert not comfyui_names(kind, "double_blocks.7.img_attn_q")
    for name in COMFYUI:
        if name in comfyui:
            assert comfyui_names(kind, name) == COMFYUI[name]
    wan = model_of("Wan2.1-T2V-14B")
    assert comfyui_layers(type(wan).__name__, weighted_layers(wan)) == original_layers(
        type(wan).__name__, weighted_layers(wan)
    )
