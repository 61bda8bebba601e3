"""ComfyUI's own models and samplers with the node's attention, against diffusers' models with ours.

RADIAL_COMFYUI=<folder of ComfyUI> pytest tests/radial/comfyui
"""

from __future__ import annotations

import asyncio
import inspect
import json
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch

import radial.comfyui
from radial import RadialError
from radial.comfyui.node import load_radial_lora
from radial.patterns import Released
from tests.helpers.comfy_models import DIFFUSERS, comfyui, patcher
from tests.helpers.stock_models import CONFIGS, TARGETS, random_lora
from train.attention.recipe import AttentionRecipe
from train.export.formats import FORMATS, Adapter
from train.export.run import folded
from train.models.families import adapter_of
from train.sample.pipeline import load_loras

SHAPE = (1, 16, 9, 8, 12)  # 9 frames of 24 tokens
SIGMAS = torch.tensor([1.0, 0.95, 0.8, 0.4, 0.0])
HEADER = {
    f"radial.{name}": str(value)
    for name, value in {
        "base_model": "tiny", "pattern": "released", "rule": "wan", "decay": 0.4, "block": 16, "dense_layers": 1,
        "dense_sigma": 0.9, "rope": "default", "shift": 3.0, "frames": 33, "height": 64, "width": 96,
    }.items()
}  # fmt: skip
RECIPE = AttentionRecipe(Released(decay=0.4), block=16, dense_layers=1, dense_sigma=0.9)


@pytest.fixture(autouse=True)
def at_hand(monkeypatch):
    comfyui(monkeypatch)


def kind_of(family):
    """Of diffusers' class."""
    return family.removesuffix("22_5b")


def model_of(family):
    torch.manual_seed(0)
    name, config = CONFIGS[kind_of(family)]
    model = getattr(diffusers, name)(**{**config, **DIFFUSERS[family]}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def lora_of(family, model, folder, **changes):
    pairs = folded(random_lora(model, TARGETS[kind_of(family)]), 3)
    header = {**HEADER, "radial.family": family, **changes}
    FORMATS["comfyui"](Adapter(pairs, model, header, "tiny", "mine"), folder)
    return folder / "mine.safetensors"


def prompts(family, tokens=8):
    torch.manual_seed(1)
    texts = [torch.randn(1, tokens, 16) for _ in range(2)]
    more = {}
    if family == "hunyuan":
        mask = torch.ones(1, tokens, dtype=torch.int64)
        mask[:, 5:] = 0
        more = {"pooled_output": torch.randn(1, 8), "attention_mask": mask}
    return [(text, more) for text in texts]


def sampled(model, given, cfg, shape=SHAPE, sigmas=SIGMAS):
    """A latent of ComfyUI's Euler sampler."""
    import comfy.sample
    import comfy.samplers

    conds = [[[text, dict(more)]] for text, more in given]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return comfy.sample.sample_custom(
        model, noise, cfg, comfy.samplers.sampler_object("euler"), sigmas, *conds, torch.zeros(shape),
        disable_pbar=True, seed=2,
    )  # fmt: skip


@torch.no_grad()
def expected(family, model, given, cfg, patched, shape):
    """The same by diffusers' model with our attention."""
    adapter = adapter_of(type(model).__name__)(model, given[0][0].shape[1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    grid = adapter.grid(x)

    def predicted(text, more, sigma):
        inputs = {"encoder_hidden_states": text, "timestep": sigma[None] * 1000}
        if family == "hunyuan":
            inputs["encoder_attention_mask"] = more["attention_mask"]
            inputs |= {"pooled_projections": more["pooled_output"], "guidance": torch.tensor([6000.0])}
        return model(hidden_states=x, **inputs, return_dict=False)[0]

    for step, (sigma, later) in enumerate(pairwise(SIGMAS)):
        adapter.set_attention(RECIPE.step(grid, dense=RECIPE.is_dense(float(sigma), step)))
        velocity = predicted(*given[0], sigma)
        if cfg != 1:
            negative = predicted(*given[1], sigma)
            velocity = negative + cfg * (velocity - negative)
        x = x + (later - sigma) * velocity
    return patched.model.process_latent_out(x)


@pytest.mark.parametrize(("family", "cfg"), [("wan", 5.0), ("wan22_5b", 5.0), ("hunyuan", 1.0)])
def test_a_sampled_clip_is_that_of_diffusers(family, cfg, tmp_path):
    model = model_of(family)
    plain = patcher(family, model)
    file = lora_of(family, model, tmp_path)
    given = prompts(family)
    shape = (1, model.config.in_channels, *SHAPE[2:])
    untouched = sampled(plain, given, cfg, shape)
    changed, text = load_radial_lora(plain, file)
    got = sampled(changed, given, cfg, shape)
    load_loras(model, [(file, 1.0)])
    wanted = expected(family, model, given, cfg, changed, shape)
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=5e-3)  # the time is embedded in other orders
    assert (got - untouched).abs().max() > 0.1
    assert "Released(decay=0.4, rule='wan'), blocks of 16 tokens" in text
    assert "dense: the first 1 layers, and all from noise level 0.9 on" in text
    torch.testing.assert_close(sampled(plain, given, cfg, shape), untouched)  # the model given to the node is as it was
    dense, _ = load_radial_lora(plain, lora_of(family, model_of(family), tmp_path, **{"radial.pattern": "dense"}))
    assert (sampled(dense, given, cfg, shape) - got).abs().max() > 0.05


def test_odd_sizes_and_context_windows_have_masks_of_their_own(tmp_path):
    import comfy.context_windows

    model = model_of("wan")
    changed, _ = load_radial_lora(patcher("wan", model), lora_of("wan", model, tmp_path))
    given = prompts("wan")
    assert sampled(changed, given, 5.0, shape=(1, 16, 9, 7, 11)).isfinite().all()
    windows = comfy.context_windows.IndexListContextHandler(
        comfy.context_windows.get_matching_context_schedule("standard_static"),
        comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=9, context_overlap=3, dim=2,
    )  # fmt: skip
    changed.model_options["context_handler"] = windows
    comfy.context_windows.create_prepare_sampling_wrapper(changed)
    assert sampled(changed, given, 5.0, shape=(1, 16, 17, 8, 12)).isfinite().all()
    torch.testing.assert_close(sampled(changed, given, 5.0), sampled(changed.clone(), given, 5.0))


def test_what_does_not_fit_is_refused(tmp_path):
    wan, hunyuan = model_of("wan"), model_of("hunyuan")
    file = lora_of("wan", wan, tmp_path)
    with pytest.raises(RadialError, match="trained on wan, the model is a HunyuanVideo"):
        load_radial_lora(patcher("hunyuan", hunyuan), file)
    with pytest.raises(RadialError, match="has a layer .* which the model lacks"):
        load_radial_lora(patcher("wan", wan), lora_of("hunyuan", hunyuan, tmp_path, **{"radial.family": "None"}))
    with pytest.raises(RadialError, match="has 216 tokens, as many as the prompt"):
        changed, _ = load_radial_lora(patcher("wan", wan), lora_of("wan", wan, tmp_path))
        sampled(changed, prompts("wan", tokens=216), 1.0)


def test_a_second_node_takes_the_place_of_the_first_ones_attention(tmp_path):
    model = model_of("wan")
    plain = patcher("wan", model)
    first, _ = load_radial_lora(plain, lora_of("wan", model, tmp_path), strength=0.0)
    second, _ = load_radial_lora(first, lora_of("wan", model, tmp_path, **{"radial.pattern": "dense"}), strength=0.0)
    torch.testing.assert_close(sampled(second, prompts("wan"), 1.0), sampled(plain, prompts("wan"), 1.0))


def test_a_node_that_skips_a_layer_leaves_the_others_their_numbers(tmp_path):
    """As ComfyUI's SkipLayerGuidanceDiT does; versions before December 2025 do not number Wan's layers."""
    import comfy.ldm.wan.model

    numbered = '["block_index"]' in inspect.getsource(comfy.ldm.wan.model.WanModel.forward_orig)
    model = model_of("wan")
    found = []
    for name in ("released", "dense"):
        file = lora_of("wan", model, tmp_path, **{"radial.pattern": name, "radial.dense_layers": "2"})
        changed, _ = load_radial_lora(patcher("wan", model), file)
        changed.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 0)
        with nullcontext() if numbered else pytest.raises(RadialError, match="please update it"):
            found.append(sampled(changed, prompts("wan"), 1.0))
    if numbered:
        assert (found[0] - found[1]).abs().max() > 1e-3


def test_comfyui_finds_the_node_and_its_nodes_have_the_workflows_inputs(tmp_path, monkeypatch):
    import folder_paths
    import nodes

    own = Path(radial.comfyui.__file__).parent
    (tmp_path / "radial").symlink_to(own)
    extras = Path(nodes.__file__).parent / "comfy_extras"
    theirs = [extras / f"nodes_{name}.py" for name in ("preview_any", "model_advanced", "hunyuan", "video")]
    for place in (tmp_path / "radial", *theirs):
        assert asyncio.run(nodes.load_custom_node(str(place)))
    workflow = json.loads((own / "example_workflows" / "wan_4x.json").read_text(encoding="utf-8"))
    for node in workflow.values():
        inputs = nodes.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        assert set(inputs["required"]) <= set(node["inputs"]) <= {*inputs["required"], *inputs.get("optional", {})}
    model = model_of("wan")
    file = lora_of("wan", model, tmp_path)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    node = nodes.NODE_CLASS_MAPPINGS["LoadRadialLora"]
    assert file.name in node.INPUT_TYPES()["required"]["lora_name"][0]
    shown = node().load(model=patcher("wan", model), lora_name=file.name, strength_model=1.0)
    (text,) = shown["ui"]["text"]
    assert "Released(decay=0.4, rule='wan'), blocks of 16 tokens" in text and shown["result"][1] == text
