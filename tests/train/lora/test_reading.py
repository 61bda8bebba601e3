"""LoRAs of other tools: what the tools themselves write is read as they apply it, and nothing is passed over."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from tests.helpers.stock_models import load_transformer, save_transformer
from train.errors import UserError
from train.export.verify import empty_pipeline
from train.lora.reading import read_lora
from train.models.families import adapter_of
from train.models.pretrained import stand_in
from train.sample.pipeline import load_loras

A, B = torch.ones(4, 32), torch.ones(32, 4)
Q, KOHYA = "diffusion_model.blocks.0.self_attn.q", "lora_unet_blocks_0_self_attn_q"
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


def test_the_biases_that_peft_saves_have_the_factor_too(base, model, tmp_path):
    """Against PEFT's own merge."""
    peft_model = trained(base, r=4, lora_alpha=7, lora_bias=True)
    peft_model.save_pretrained(str(tmp_path))
    found, before = read_lora(tmp_path, model), load_transformer(base).state_dict()
    after = peft_model.merge_and_unload().state_dict()
    assert found.differences.keys() == {f"{layer}.bias" for layer in LAYERS}
    for name, change in found.differences.items():
        assert change.abs().max() > 0.01
        torch.testing.assert_close(change, after[name] - before[name], rtol=1e-4, atol=1e-6)


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
        ("pipe.dit.blocks.0.self_attn.q.", "lora_A.default.weight", "lora_B.default.weight"),
        ("module.blocks.0.self_attn.q.", "lora_A.weight", "lora_B.weight"),
        ("base_model.model.diffusion_model.blocks.0.self_attn.q.", "lora_A.my-style.weight", "lora_B.my-style.weight"),
        ("lycoris_blocks_0_self_attn_q.", "lora_down.weight", "lora_up.weight"),
        ("lora_transformer_blocks_0_attn1_to_q.", "lora_down.weight", "lora_up.weight"),
        ("transformer.blocks.0.attn1.to_q.", "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
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


@pytest.mark.parametrize("place", ["blocks.2.attn2.processor.to_out", "transformer.blocks.2.attn2.to_out.0"])
def test_what_old_diffusers_wrote(model, tmp_path, place):
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    file = tmp_path / "style.safetensors"
    save_file({f"{place}_lora.down.weight": a, f"{place}_lora.up.weight": b}, file)
    same(read_lora(file, model), {LAYERS[2]: b @ a})


def test_what_mochis_authors_write(tmp_path):
    """Factors without .weight, stacked as in their checkpoint; alpha in the header, of projections and of outputs."""
    mochi = stand_in(save_transformer("mochi", tmp_path / "base"))
    a, b = torch.randn(2, 64), torch.randn(192, 2)
    out_a, out_b = torch.randn(3, 64), torch.randn(64, 3)
    settings = {"qkv_proj_lora_rank": 2, "qkv_proj_lora_alpha": 6, "out_proj_lora_rank": 3, "out_proj_lora_alpha": 1.5}
    names = {"blocks.0.attn.qkv_x": (a, b), "blocks.0.attn.proj_x": (out_a, out_b)}
    tensors = {f"{n}.lora_{half}": t.clone() for n, pair in names.items() for half, t in zip("AB", pair, strict=True)}
    file = tmp_path / "model.lora.safetensors"
    save_file(tensors, file, {"kwargs": json.dumps(settings)})
    lora = read_lora(file, mochi)
    parts = [f"transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_k", "to_v")]
    same(
        lora,
        dict(zip(parts, (3 * b @ a).chunk(3), strict=True))
        | {"transformer_blocks.0.attn1.to_out.0": out_b @ out_a / 2},
    )
    assert lora.notes == ["alpha / rank is 0.5 to 3, from its header"]
    save_file(tensors, file, {"kwargs": json.dumps(settings | {"out_proj_lora_alpha": None})})
    with pytest.raises(
        UserError, match="model.lora.safetensors: kwargs: out_proj_lora_alpha is None, expected a positive"
    ):
        read_lora(file, mochi)


@pytest.mark.parametrize(
    ("keys", "header", "factor", "note"),
    [
        (f"{KOHYA}.lora_down", {"ss_network_alpha": "2.0"}, 0.5, "alpha / rank is 0.5, from its header"),
        (f"{Q}.lora_A", {"ss_network_alpha": "2.0"}, 1, "in these names alpha is in the weights"),
        (f"{Q}.lora_A", {"lora_alpha": "8"}, 2, "alpha / rank is 2, from its header"),
        (f"{Q}.lora_A", {"lora_alpha": "None"}, 1, "it has no alpha, alpha / rank is 1"),
    ],
)
def test_alpha_that_stands_in_the_header_alone(model, tmp_path, keys, header, factor, note):
    """musubi-tuner's conversion to diffusers' names folds alpha into the weights and keeps kohya's header."""
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    other = keys.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
    file = tmp_path / "style.safetensors"
    save_file({f"{keys}.weight": a, f"{other}.weight": b}, file, header)
    lora = read_lora(file, model)
    same(lora, {LAYERS[0]: factor * b @ a})
    assert len(lora.notes) == 1 and note in lora.notes[0]


def test_alpha_of_each_layer_comes_before_the_headers(model, tmp_path):
    file = tmp_path / "style.safetensors"
    tensors = {"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor(6.0)}
    save_file({f"{Q}.{name}": t for name, t in tensors.items()}, file, {"lora_alpha": "8"})
    lora = read_lora(file, model)
    same(lora, {LAYERS[0]: 1.5 * B @ A})
    assert lora.notes == ["alpha / rank is 1.5, from its alpha tensors"]
    with pytest.raises(UserError, match="style.safetensors: its header: lora_alpha is 'x', expected a positive number"):
        save_file({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}, file, {"lora_alpha": "x"})
        read_lora(file, model)


@pytest.mark.parametrize("rows", [1, 4])
def test_factors_in_float8_with_scales(model, tmp_path, rows):
    a, scale = torch.randn(4, 32).to(torch.float8_e4m3fn), torch.rand(rows) + 0.5
    b = torch.randn(32, 4)
    tensors = {f"{Q}.lora_A.weight": a, f"{Q}.lora_A.scale_weight": scale, f"{Q}.lora_B.weight": b}
    file = tmp_path / "style.safetensors"
    save_file({**tensors, "scaled_fp8": torch.zeros(0)}, file)
    same(read_lora(file, model), {LAYERS[0]: b @ (a.float() * scale[:, None])})
    save_file({**tensors, f"{Q}.lora_A.scale_weight": torch.ones(3)}, file)
    with pytest.raises(
        UserError, match=r"scale_weight of layer blocks.0.self_attn.q has 3 values and a factor \(4, 32\)"
    ):
        read_lora(file, model)


def test_layers_that_change_nothing_are_named(model, tmp_path):
    file = tmp_path / "style.safetensors"
    k = Q.replace("attn.q", "attn.k")
    tensors = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": 0 * B, f"{k}.lora_A.weight": A, f"{k}.lora_B.weight": B}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    lora = read_lora(file, model)
    assert list(lora.pairs) == ["blocks.0.attn1.to_k"]
    assert lora.notes[1] == "1 of 2 layers change nothing, such as blocks.0.self_attn.q: their B is zero"


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_adapters_that_changed_the_base_weights_are_refused(base, model, tmp_path, init):
    """As PEFT makes and saves them: their file alone is not the change that was trained. Converted, it is one."""
    peft_model = get_peft_model(load_transformer(base), LoraConfig(target_modules=LAYERS, r=4, init_lora_weights=init))
    before = {name: load_transformer(base).get_submodule(name).weight for name in LAYERS}
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(str(tmp_path / "start"))
    peft_model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peft_model.save_pretrained(str(tmp_path / "as_it_is"))
    with pytest.raises(UserError, match=f"was started with init_lora_weights='{init}' .*path_initial_model_for_weight"):
        read_lora(tmp_path / "as_it_is", model)
    trained_weights = {
        name: peft_model.base_model.model.get_submodule(name).get_delta_weight("default")
        + peft_model.base_model.model.get_submodule(name).base_layer.weight
        for name in LAYERS
    }
    peft_model.save_pretrained(str(tmp_path / "lora"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    same(read_lora(tmp_path / "lora", model), {name: trained_weights[name] - before[name] for name in LAYERS})


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
        (
            {f"{Q}.dora_scale": A},
            r"style.safetensors is a DoRA \(diffusion_model.*dora_scale\), expected a LoRA",
        ),
        ({f"{Q}.lora_magnitude_vector.default.weight": A[0]}, "is a DoRA"),
        ({f"{Q}.hada_w1_a": A}, "is a LoHa"),
        ({f"{Q}.lokr_w2": A}, "is a LoKr"),
        ({f"{Q}.oft_blocks": A}, "is a OFT"),
        ({f"{Q}.lora_mid.weight": A}, "is a Tucker LoRA"),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.alpha": torch.tensor(0.0)},
            "alpha of layer blocks.0.self_attn.q is 0, which would switch it off",
        ),
        ({f"{Q}.lora_A.weight": A * torch.nan, f"{Q}.lora_B.weight": B}, "lora_A.weight holds NaN or infinite numbers"),
        ({f"{Q}.diff": torch.full((32, 32), torch.inf)}, "diff holds NaN or infinite numbers"),
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
        ("adapter_model", {"peft_type": "LOHA"}, r"is a LOHA, expected a LoRA \(.*adapter_config.json says so\)"),
        ("adapter_model", {"use_dora": True}, r"is a DoRA, expected a LoRA \(.*adapter_config.json says so\)"),
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
