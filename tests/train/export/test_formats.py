"""Each format of each family, loaded by the tools' own loaders: values of all tensors, and the output of the model."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from radial import Dense, VideoGrid
from tests.helpers.attention import step_attention
from tests.helpers.families import build, conditions, latents
from tests.helpers.stock_models import TARGETS, load_transformer, output, random_lora, save_transformer
from train.errors import UserError
from train.export.formats import FORMATS, WEIGHTS, Adapter, formats_of
from train.export.run import folded
from train.export.verify import empty_pipeline, verify
from train.lora.layers import inject_lora, load_parameters, lora_parameters
from train.lora.reading import read_header, read_lora
from train.models.families import ADAPTERS, adapter_of
from train.models.pretrained import stand_in

RANK, ALPHA = 3, 5
FAMILIES = list(TARGETS)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A base model's folder, the checkpoint's tensors, the output of training's model, and all formats written."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    base = save_transformer(family, folder / "base")
    model = load_transformer(base)
    before = output(model, family)
    weights = random_lora(model, TARGETS[family], RANK)
    inject_lora(model, RANK, ALPHA, TARGETS[family], seed=0)
    load_parameters(lora_parameters(model), weights)
    trained = output(model, family)
    assert (trained - before).abs().max() > 1e-2
    adapter = Adapter(folded(weights, ALPHA), stand_in(base), {"radial.frames": "321"}, "base", "clip_4x")
    for name in formats_of(adapter.model_class):
        FORMATS[name](adapter, folder / name)
    return family, folder, adapter, trained


def by_pipeline(folder, path):
    model = load_transformer(folder / "base")
    cls = adapter_of(type(model).__name__).pipeline_class()
    if hasattr(cls, "load_lora_weights"):
        empty_pipeline(cls, model).load_lora_weights(path)
    else:
        model.load_lora_adapter(path, weight_name=WEIGHTS, prefix="transformer", adapter_name="default_0")
    return model


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_diffusers_pipelines_run_what_was_trained(case):
    family, folder, adapter, trained = case
    model = by_pipeline(folder, folder / "diffusers")
    loaded = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    assert len(loaded) == 2 * len(adapter.pairs)
    for layer, pair in adapter.pairs.items():
        for part, expected in zip("AB", pair, strict=True):
            assert torch.equal(loaded[f"{layer}.lora_{part}.default_0.weight"], expected)
    close(output(model, family), trained)


def test_peft_runs_what_was_trained(case):
    family, folder, _, trained = case
    close(output(PeftModel.from_pretrained(load_transformer(folder / "base"), str(folder / "peft")), family), trained)


def test_one_wan_file_serves_comfyui_and_diffusers(case):
    family, folder, adapter, trained = case
    if not family.startswith("wan"):
        pytest.skip("of Wan")
    close(output(by_pipeline(folder, folder / "comfyui" / "clip_4x.safetensors"), family), trained)
    said = verify("comfyui", adapter, folder / "base", folder / "comfyui")
    assert len(said) == 2
    assert "WanPipeline.load_lora_weights" in said[1]


@pytest.mark.parametrize("name", ["comfyui", "kohya"])
def test_the_original_checkpoints_layers_change_as_the_diffusers_layers_do(case, name):
    """What ComfyUI does: B A, times alpha / rank, added to the stacked weight. Cut apart, that is training's change."""
    family, folder, adapter, _ = case
    tensors = load_file(folder / name / "clip_4x.safetensors")
    down, up = ("lora_A", "lora_B") if name == "comfyui" else ("lora_down", "lora_up")
    expected = {
        "wan": {"blocks.1.self_attn.q": ["blocks.1.attn1.to_q"], "blocks.0.self_attn.o": ["blocks.0.attn1.to_out.0"]},
        "hunyuan": {
            "double_blocks.1.img_attn_qkv": [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"],
            "single_blocks.0.linear1": [f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"],
            "single_blocks.1.linear2": ["single_transformer_blocks.1.proj_out"],
        },
        "mochi": {
            "blocks.1.attn.qkv_x": [f"transformer_blocks.1.attn1.to_{x}" for x in "qkv"],
            "blocks.0.attn.qkv_y": [f"transformer_blocks.0.attn1.add_{x}_proj" for x in "qkv"],
            "blocks.0.attn.proj_y": ["transformer_blocks.0.attn1.to_add_out"],
        },
        "hunyuan15": {
            f"double_blocks.1.img_attn_{x}": [f"transformer_blocks.1.attn.to_{y}" for y in x]
            for x in (["qkv"] if name == "comfyui" else "qkv")
        },
    }[family.split("_")[0]]
    for layer, parts in expected.items():
        key = f"diffusion_model.{layer}" if name == "comfyui" else f"lora_unet_{layer.replace('.', '_')}"
        a, b = tensors[f"{key}.{down}.weight"], tensors[f"{key}.{up}.weight"]
        scale = tensors[f"{key}.alpha"].item() / len(a) if name == "kohya" else 1.0
        change = torch.cat([adapter.pairs[part][1] @ adapter.pairs[part][0] for part in parts])
        got = scale * b @ a
        close(got[: len(change)], change)
        assert not got[len(change) :].any()
        assert (len(got) > len(change)) == (layer == "single_blocks.0.linear1")


def test_every_format_can_be_read_back(case):
    _, folder, adapter, _ = case
    for name in formats_of(adapter.model_class):
        lora = read_lora(folder / name, adapter.model)
        assert lora.header["radial.frames"] == read_header(folder / name)["radial.frames"] == "321"
        assert lora.pairs.keys() == adapter.pairs.keys()
        assert not lora.differences
        for layer, pair in adapter.pairs.items():
            assert all(torch.equal(a, b) for a, b in zip(lora.pairs[layer], pair, strict=True)), (name, layer)


def test_the_released_script_multiplies_by_one(case):
    family, folder, adapter, trained = case
    assert ("released" in formats_of(adapter.model_class)) == (family == "hunyuan")
    if family == "hunyuan":
        params = json.loads((folder / "released" / "lora_config.json").read_text(encoding="utf-8"))["lora_params"]
        model = by_pipeline(folder, folder / "released")
        model.set_adapters(["default_0"], [params["lora_alpha"] / params["lora_rank"]])
        close(output(model, family), trained)


ALL_HUNYUAN = (
    r".*(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|to_add_out)|proj_out|ff\.net\.0\.proj|ff\.net\.2|norm1\.linear"
    r"|proj_mlp|norm\.linear|timestep_embedder\.linear_1|text_embedder\.linear_2|proj_in)"
)


@pytest.mark.parametrize(("rank", "dtype"), [(3, torch.float32), (129, torch.bfloat16)])
def test_layers_beyond_attention_reach_comfyui(tmp_path, rank, dtype):
    """HunyuanVideo's, by the names that ComfyUI has; what it passes over in kohya's names is said, with the way out."""
    base = save_transformer("hunyuan", tmp_path / "base")
    model = stand_in(base)
    pairs = folded(random_lora(model, ALL_HUNYUAN, rank), rank)
    pairs = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in pairs.items()}
    adapter = Adapter(pairs, model, {}, "base", "x")
    for name in ("comfyui", "kohya"):
        FORMATS[name](adapter, tmp_path / name)
    keys = {key.split(".lora_")[0] for key in load_file(tmp_path / "comfyui" / "x.safetensors")}
    keys = {key.removeprefix("diffusion_model.") for key in keys}
    assert {"time_in.in_layer", "txt_in.c_embedder.out_layer"} <= keys
    assert {"double_blocks.1.img_mod.linear", "double_blocks.0.img_mlp.fc2"} <= keys
    assert verify("comfyui", adapter, base, tmp_path / "comfyui")[0].endswith(f"{2 * len(keys)} tensors")
    (said,) = verify("kohya", adapter, base, tmp_path / "kohya")
    assert "; ComfyUI passes over 13 of 30 modules such as time_in.mlp.0: give it format=comfyui; " in said
    outside = "musubi-tuner passes over 10 of 30 modules such as time_in.mlp.0: "
    assert said.endswith(f"{outside}it reads only those inside the transformer's layers")
    alphas = [t for k, t in load_file(tmp_path / "kohya" / "x.safetensors").items() if k.endswith(".alpha")]
    assert {alpha.item() for alpha in alphas} <= {rank, 2 * rank, 3 * rank, 4 * rank}


def test_musubi_passes_over_what_is_outside_of_wans_layers(tmp_path):
    base = save_transformer("wan_i2v", tmp_path / "base")
    model = stand_in(base)
    pairs = folded(random_lora(model, r".*(attn1\.to_q|image_embedder\.ff\.net\.2|text_embedder\.linear_1)"), 3)
    adapter = Adapter(pairs, model, {}, "base", "x")
    FORMATS["kohya"](adapter, tmp_path / "kohya")
    (said,) = verify("kohya", adapter, base, tmp_path / "kohya")
    assert said.endswith(
        "; musubi-tuner passes over 2 of 4 modules such as text_embedding.0: "
        "it reads only those inside the transformer's layers"
    )


def test_comfyuis_layers_have_one_rank(case):
    """Without alpha, diffusers before 0.40 takes the most frequent rank for every layer's alpha."""
    _, folder, _, _ = case
    tensors = load_file(folder / "comfyui" / "clip_4x.safetensors")
    assert len({len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}) == 1
    assert all(name.startswith("diffusion_model.") for name in tensors)


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_that_learned_nothing_counts_as_absent(name, tmp_path):
    """Such as one of a custom lora.targets that never gets a gradient."""
    base = save_transformer("hunyuan", tmp_path / "base")
    weights = random_lora(load_transformer(base), TARGETS["hunyuan"], RANK)
    silent = ["transformer_blocks.0.attn.to_k", "transformer_blocks.1.attn.to_out.0"]
    for layer in silent:
        weights[f"{layer}.lora_B.weight"].zero_()
    adapter = Adapter(folded(weights, ALPHA), stand_in(base), {}, "base", "x")
    FORMATS[name](adapter, tmp_path / name)
    verify(name, adapter, base, tmp_path / name)
    found = read_lora(tmp_path / name, adapter.model).pairs
    assert found.keys() == adapter.pairs.keys() - set(silent)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("family", ADAPTERS)
def test_what_every_family_trains_is_exported_in_every_format(family, text, tmp_path):
    """After a step, each target has learned; each format is read back by its tool."""
    adapter = build(family)
    if text and adapter.text_lora_targets is None:
        with pytest.raises(UserError, match="lora.text is true, but the text has no attention of its own"):
            adapter.targets(text=True)
        return
    adapter.transformer.save_pretrained(tmp_path / "base")
    names = inject_lora(adapter.transformer, RANK, ALPHA, adapter.targets(text=text), seed=0)
    adapter.set_attention(
        step_attention(Dense(), VideoGrid(2, 2, 2, text_tokens=adapter.grid(latents(adapter, (2, 2, 2))).text_tokens))
    )
    latent = latents(adapter, (2, 2, 2))
    adapter.velocity(latent, torch.full((2,), 0.5), conditions(adapter, latent)).square().mean().backward()
    parameters = lora_parameters(adapter.transformer)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter -= parameter.grad
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    assert {name for name in names if not weights[f"{name}.lora_B.weight"].any()} == set()
    exported = Adapter(folded(weights, ALPHA), stand_in(tmp_path / "base"), {}, "base", "x")
    for name in formats_of(exported.model_class):
        FORMATS[name](exported, tmp_path / name)
        said = verify(name, exported, tmp_path / "base", tmp_path / name)
        # of HunyuanVideo-1.5 kohya's trainers have q, k and v apart, ComfyUI stacked
        apart = (family, name) == ("hunyuan15", "kohya")
        assert ("ComfyUI passes over" in " ".join(said)) == apart
        assert "musubi-tuner passes over" not in " ".join(said)


def test_a_second_loaders_failure_costs_no_export(tmp_path):
    """diffusers' reading of original names wants a block; the file is ComfyUI's."""
    base = save_transformer("wan", tmp_path / "base")
    model = stand_in(base)
    pairs = folded(random_lora(model, r"condition_embedder\.time_proj"), 3)
    adapter = Adapter(pairs, model, {}, "base", "x")
    FORMATS["comfyui"](adapter, tmp_path / "comfyui")
    said = verify("comfyui", adapter, base, tmp_path / "comfyui")
    assert said[0] == "names and shapes of the original checkpoint: 2 tensors"
    assert said[1].startswith("diffusers does not read this file, format=diffusers is for it (ValueError: ")


def test_verification_finds_what_loaders_pass_over(case):
    """Files that load without an error and yet not whole."""
    _, folder, adapter, _ = case
    file = folder / "diffusers" / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as stream:
        header = stream.metadata()
    keys, lost = sorted(tensors), "(missing|has other values) after .*load_lora"

    def check(changed, message):
        save_file(changed, file, header)
        with pytest.raises(UserError, match=message):
            verify("diffusers", adapter, folder / "base", folder / "diffusers")

    try:
        check({k: t for k, t in tensors.items() if k not in keys[:2]}, "is missing after")
        check({**tensors, keys[1]: tensors[keys[1]] + 1}, "has other values after")
        check(
            {k.removeprefix("transformer."): t for k, t in tensors.items()}, "(missing|other values) after .*load_lora"
        )
        check({k.replace("lora_A", "lora_A.default"): t for k, t in tensors.items()}, lost)
        check({**tensors, keys[0].replace("transformer.", "transformer.x"): torch.ones(1)}, "fits no layer")
    finally:
        save_file(tensors, file, header)
    verify("diffusers", adapter, folder / "base", folder / "diffusers")


@pytest.mark.slow
def test_diffusers_splits_the_fused_layers_of_a_hunyuan_of_the_real_width(tmp_path):
    """Its converter knows the width 3072 alone, which takes gigabytes even with one block of each kind."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    config = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16}
    model = HunyuanVideoTransformer3DModel(**config, mlp_ratio=0.25, pooled_projection_dim=8, in_channels=4)
    model.save_pretrained(tmp_path / "base")
    weights = random_lora(model, TARGETS["hunyuan"], RANK)
    adapter = Adapter(folded(weights, ALPHA), stand_in(tmp_path / "base"), {}, "base", "clip_4x")
    FORMATS["comfyui"](adapter, tmp_path / "comfyui")
    said = verify("comfyui", adapter, tmp_path / "base", tmp_path / "comfyui")
    assert said[1].startswith("HunyuanVideoPipeline.load_lora_weights: 16 tensors")
    pipeline = empty_pipeline(adapter_of("HunyuanVideoTransformer3DModel").pipeline_class(), model)
    pipeline.load_lora_weights(tmp_path / "comfyui" / "clip_4x.safetensors")
    got = output(model, "hunyuan")
    model.unload_lora()
    inject_lora(model, RANK, ALPHA, TARGETS["hunyuan"], seed=0)
    load_parameters(lora_parameters(model), weights)
    close(got, output(model, "hunyuan"))
