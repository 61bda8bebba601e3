"""The node's attention as ComfyUI calls it. How ComfyUI calls is data here, which `test_real_models.py` holds to it."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from radial import Dense, RadialError, Released, VideoGrid, attention_over, build_layout, radial_attention
from radial.comfyui import NODE_CLASS_MAPPINGS, fit
from radial.comfyui.attention import CALL, Call, Model, RadialOverride, moment, text_lengths
from radial.comfyui.node import LoadRadialLora, description
from tests.helpers.patterns import fitted

HEADER = {
    f"radial.{name}": str(value)
    for name, value in {
        "base_model": "tiny", "family": "wan", "pattern": "released", "rule": "wan", "decay": 0.4, "block": 16,
        "dense_layers": 1, "dense_sigma": 0.9, "rope": "default", "shift": 3.0, "frames": 33, "height": 64, "width": 96,
        "expert": "high",
    }.items()
}  # fmt: skip
WAN = Model("WanModel", (1, 2, 2), layers=3, double=3, joint=False)
HUNYUAN = Model("HunyuanVideo", (1, 2, 2), layers=4, double=2, joint=True)
TEXT_FIRST = replace(HUNYUAN, text_first=True)
LATENT, TEXT, HEADS, WIDTH = (2, 16, 9, 8, 12), 8, 2, 16
GRID = VideoGrid(9, 4, 6)
# In the order of a layer: tokens of the queries and of the keys, further arguments by name, whether it is the video's.
# ComfyUI 0.3.64 and 0.33.0: comfy/ldm/wan/model.py, comfy/ldm/hunyuan_video/model.py. Since February 2026 (0.13) the
# text comes before the video in HunyuanVideo's calls, and all layers are numbered.
CALLS = {
    "WanModel": [(216, 216, {}, True), (216, TEXT, {}, False)],
    "HunyuanVideo": [(TEXT, TEXT, {"skip_reshape": True}, False), (224, 224, {"skip_reshape": True}, True)],
}


def qkv(queries, keys, named):
    made = torch.Generator().manual_seed(queries + keys)
    shapes = [(2, n, HEADS, WIDTH) for n in (queries, keys, keys)]
    plain = [torch.randn(shape, generator=made) for shape in shapes]
    return plain, [x.transpose(1, 2) if named.get("skip_reshape") else x.flatten(2) for x in plain]


def own(q, k, v, heads, **kwargs):
    """Stands for ComfyUI's function."""
    return "ComfyUI's"


def run(override, calls, sigmas=0.5, latent=LATENT, numbers=None, **options):
    """What each attention of a call of the model gives; ``numbers``: what ComfyUI says of each layer."""
    outs = []

    def executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        transformer_options = dict(transformer_options)  # BaseModel._apply_model copies it
        for place, (queries, keys, named, _) in enumerate(calls):
            if numbers is not None:
                transformer_options.update(numbers[place])
            given = qkv(queries, keys, named)[1]
            outs.append(override(own, *given, heads=HEADS, **named, transformer_options=transformer_options))
        return "out"

    at = {"sigmas": torch.tensor([sigmas]), "sample_sigmas": torch.tensor([1.0, sigmas, 0.0]), **options}
    text = torch.zeros(2, TEXT, 4)
    assert override.around(executor, torch.zeros(latent), torch.zeros(2), None, text, None, at) == "out"
    return outs


def numbers_of(model):
    """What ComfyUI says of each self-attention layer, and keeps saying in the cross-attention behind it."""
    found = [{"block_type": "double", "block_index": layer} for layer in range(model.double)]
    found += [{"block_type": "single", "block_index": layer} for layer in range(model.layers - model.double)]
    return [said for said in found for _ in CALLS[model.kind]]


@pytest.mark.parametrize("model", [WAN, HUNYUAN], ids=lambda model: model.kind)
@pytest.mark.parametrize("numbered", [False, True])
def test_the_videos_self_attention_is_ours_and_no_other(model, numbered):
    calls = CALLS[model.kind] * model.layers
    outs = run(RadialOverride(HEADER, model), calls, numbers=numbers_of(model) if numbered else None)
    grid = VideoGrid(9, 4, 6, TEXT if model.joint else 0)
    layers = 0
    for (queries, keys, named, is_ours), out in zip(calls, outs, strict=True):
        if not is_ours or layers < 1:  # the first layer is dense
            assert out == "ComfyUI's"
        else:
            expected = attention_over(*qkv(queries, keys, named)[0], build_layout(Released(decay=0.4), grid, 16))
            torch.testing.assert_close(out, expected.flatten(2))
            other = attention_over(*qkv(queries, keys, named)[0], build_layout(Dense(), grid, 16))
            assert not torch.allclose(out, other.flatten(2), atol=1e-3)
        layers += is_ours


def test_text_may_come_before_the_video():
    override = RadialOverride({**HEADER, "radial.dense_layers": "0"}, TEXT_FIRST)
    grid = VideoGrid(9, 4, 6, TEXT)
    mask = torch.zeros(1, 1, grid.tokens)
    mask[..., 5:TEXT] = -torch.finfo(torch.float32).max
    plain, given = qkv(224, 224, {"skip_reshape": True})
    ours = [torch.cat([x[:, TEXT:], x[:, :TEXT]], 1) for x in plain]
    layout = build_layout(Released(decay=0.4), grid, 16)
    for text, named in ((None, {}), (torch.tensor([5, 5]), {"mask": mask})):
        options = {CALL: Call(grid, 0.5, 0)}
        out = override(own, *given, HEADS, **named, skip_reshape=True, transformer_options=options)
        expected = attention_over(*ours, layout, text_lengths=text).flatten(2)
        torch.testing.assert_close(out, torch.cat([expected[:, -TEXT:], expected[:, :-TEXT]], 1))
        options = {CALL: Call(grid, 0.5, 0)}
        whole = {"skip_reshape": True, "skip_output_reshape": True, "transformer_options": options}
        torch.testing.assert_close(override(own, *given, HEADS, **named, **whole).transpose(1, 2).flatten(2), out)


def test_masks_that_differ_by_head_are_those_beside_the_lora(tmp_path):
    pattern = fitted(GRID, 16, layers=(1, 2), heads=HEADS)
    masks = {"radial.masks_sha256": pattern.masks.digest, "radial.masks_share": "0.4"}
    header = {**HEADER, "radial.pattern": "fitted", **masks}
    with pytest.raises(RadialError, match=r"mine.masks.safetensors is missing: copy it from the export"):
        fit.masks_beside(tmp_path / "mine.safetensors", header)
    assert fit.masks_beside(tmp_path / "mine.safetensors", HEADER) is None
    calls = CALLS["WanModel"] * 3
    outs = run(RadialOverride(header, WAN, masks=pattern.masks), calls)
    q, k, v = qkv(*calls[0][:3])[0]
    for layer, out in ((1, outs[2]), (2, outs[4])):
        expected = radial_attention(q, k, v, GRID, pattern, block=16, layer=layer)
        torch.testing.assert_close(out, expected.flatten(2))
    fit.check_header(header, WAN, "mine", pattern.masks)
    with pytest.raises(RadialError, match="its masks end with layer 2, the model has layers 0 to 3"):
        fit.check_header(header, replace(WAN, layers=4), "mine", pattern.masks)
    text = description(header, 12, 1.0, "mine", shift=None, masks=pattern.masks)
    assert "attention: fitted, 0.4 of the blocks, blocks of 16 tokens" in text


def test_dense_steps_are_the_headers():
    override, calls = RadialOverride(HEADER, WAN), CALLS["WanModel"][:1] * 3
    assert run(override, calls, sigmas=0.95) == ["ComfyUI's"] * 3
    assert [isinstance(out, str) for out in run(override, calls, sigmas=0.89)] == [True, False, False]
    counted = RadialOverride({**HEADER, "radial.dense_sigma": "None", "radial.dense_steps": "2"}, WAN)
    schedule = torch.tensor([1.0, 0.8, 0.6, 0.0])
    for sigma, dense in ((1.0, True), (0.8, True), (0.7, True), (0.6, False)):
        outs = run(counted, calls, sigmas=sigma, sample_sigmas=schedule)
        assert isinstance(outs[-1], str) == dense
    later = run(counted, calls, sigmas=0.6, sample_sigmas=torch.tensor([0.6, 0.3, 0.0]))  # a second sampler goes on
    assert not isinstance(later[-1], str)
    with pytest.raises(RadialError, match="gives no noise level"):
        moment({})


def test_numbered_layers_may_be_left_out_and_counted_ones_not():
    override, (self_attention, _) = RadialOverride(HEADER, WAN), CALLS["WanModel"]
    with pytest.raises(RadialError, match="2 of the model's 3 layers have run"):
        run(override, [self_attention] * 2)
    (out,) = run(override, [self_attention], numbers=[{"block_index": 2, "block_type": "double"}])
    assert not isinstance(out, str)
    (out,) = run(override, [self_attention], numbers=[{"block_index": 0, "block_type": "double"}])
    assert isinstance(out, str)
    single = [{"block_index": 0, "block_type": "single"}]
    (out,) = run(RadialOverride(HEADER, HUNYUAN), CALLS["HunyuanVideo"][1:], numbers=single)
    assert not isinstance(out, str)


def test_another_override_computes_what_is_not_ours():
    override = RadialOverride(HEADER, WAN, before=lambda func, *args, **kwargs: f"before {func(*args, **kwargs)}")
    outs = run(override, CALLS["WanModel"] * 3)
    assert [out for out in outs if isinstance(out, str)] == ["before ComfyUI's"] * 4


@pytest.mark.parametrize(
    ("latent", "calls", "message"),
    [
        ((1, 16, 8, 12), [], r"shape \(1, 16, 8, 12\), expected that of a video"),
        (LATENT, [(240, 240, {}, True)], "has 240 tokens, the clip 216: reference frames"),
        ((1, 16, 2, 4, 4), [], "has 8 tokens, as many as the prompt"),
    ],
)
def test_what_the_mask_cannot_serve_is_refused(latent, calls, message):
    with pytest.raises(RadialError, match=message):
        run(RadialOverride(HEADER, WAN), calls, latent=latent)
    with pytest.raises(RadialError, match="expected multiples of"):
        run(RadialOverride(HEADER, HUNYUAN), [], latent=(1, 16, 9, 7, 12))


def test_padded_sizes_and_tiles_have_the_mask_of_their_tokens():
    outs = run(RadialOverride(HEADER, WAN), CALLS["WanModel"][:1] * 3, latent=(2, 16, 9, 7, 11))
    assert not isinstance(outs[-1], str)
    tile = [(108, 108, {}, True)] * 3
    out = run(RadialOverride(HEADER, WAN), tile, latent=(2, 16, 9, 4, 12))[-1]
    layout = build_layout(Released(decay=0.4), VideoGrid(9, 2, 6), 16)
    torch.testing.assert_close(out, attention_over(*qkv(108, 108, {})[0], layout).flatten(2))


def test_masked_text_counts_for_each_sample():
    grid = VideoGrid(9, 4, 6, TEXT)
    mask = torch.zeros(1, 1, grid.tokens)
    mask[..., -3:] = -torch.finfo(torch.float32).max
    assert text_lengths(mask, grid, 2).tolist() == [5, 5]
    assert text_lengths(mask[:, 0, None] == 0, grid, 1).tolist() == [5]
    override = RadialOverride({**HEADER, "radial.dense_layers": "0"}, HUNYUAN)
    plain, given = qkv(224, 224, {"skip_reshape": True})
    options = {CALL: Call(grid, 0.5, 0)}
    out = override(own, *given, HEADS, mask, skip_reshape=True, skip_output_reshape=True, transformer_options=options)
    layout = build_layout(Released(decay=0.4), grid, 16)
    expected = attention_over(*plain, layout, text_lengths=torch.tensor([5, 5]))
    torch.testing.assert_close(out, expected.transpose(1, 2))
    mask[..., grid.video_tokens] = -1e9
    with pytest.raises(RadialError, match="not one of the text's padding"):
        text_lengths(mask, grid, 2)
    with pytest.raises(RadialError, match="over the video's own tokens"):
        text_lengths(mask.roll(-10, -1) * 0 - torch.eye(1, grid.tokens), grid, 2)


def network(kind, **fields):
    return type(kind, (SimpleNamespace,), {})(**fields)


def test_models_of_other_classes_are_refused():
    assert fit.model_of(network("WanModel", patch_size=(1, 2, 2), blocks=[0] * 3)) == WAN
    for block, model in ((SimpleNamespace(flipped_img_txt=True), HUNYUAN), (SimpleNamespace(), TEXT_FIRST)):
        blocks = {"double_blocks": [block] * 2, "single_blocks": [0] * 2}
        assert fit.model_of(network("HunyuanVideo", patch_size=[1, 2, 2], **blocks)) == model
    with pytest.raises(RadialError, match="is a VaceWanModel, expected WanModel or HunyuanVideo"):
        fit.model_of(network("VaceWanModel"))
    with pytest.raises(RadialError, match="another of the HunyuanVideo class"):
        fit.model_of(network("HunyuanVideo", patch_size=[1, 2, 2], byt5_in=1, **blocks))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radial.family": "hunyuan"}, "mine was trained on hunyuan, the model is a WanModel"),
        ({"radial.rope": "riflex"}, "mine was trained with rope=riflex, which ComfyUI's models do not have"),
        ({"radial.pattern": "None"}, "mine: the header has no radial.pattern"),
    ],
)
def test_files_of_other_models_are_refused(changes, message):
    fit.check_header(HEADER, WAN, "mine")
    with pytest.raises(RadialError, match=message):
        fit.check_header({**HEADER, **changes}, WAN, "mine")


def test_every_layer_has_a_place_of_its_size():
    tensors = {"a.lora_A.weight": torch.zeros(2, 4), "a.lora_B.weight": torch.zeros(6, 2)}
    weights = {"model.a.weight": torch.zeros(6, 4)}
    assert fit.check_layers(tensors, {"a": "model.a.weight"}, weights, "mine") == 1
    assert fit.check_layers(tensors, {"a": ("model.a.weight", (0, 0, 6))}, weights, "mine") == 1
    with pytest.raises(RadialError, match=r"a \(6, 4\) weight at a, the model has \(5, 4\)"):
        fit.check_layers(tensors, {"a": "model.a.weight"}, {"model.a.weight": torch.zeros(5, 4)}, "mine")
    with pytest.raises(RadialError, match="has a layer a, which the model lacks"):
        fit.check_layers(tensors, {}, weights, "mine")
    with pytest.raises(RadialError, match="holds no LoRA"):
        fit.check_layers({"x": torch.zeros(1)}, {}, weights, "mine")


def test_what_was_set_stands_in_words():
    text = description(HEADER, 12, 0.9, "mine.safetensors", shift=8.0)
    assert text.splitlines() == [
        "mine.safetensors: 12 layers at strength 0.9",
        "trained on: tiny",
        "for the model of high noise levels",
        "attention: Released(decay=0.4, rule='wan'), blocks of 16 tokens",
        "dense: the first 1 layers, and all from noise level 0.9 on",
        "trained clips: 33 frames of 64 x 96 pixels",
        "shift of the noise levels: 3",
        "the model samples with shift 8: set 3 in ModelSamplingSD3",
    ]


@pytest.mark.parametrize("way", [Path.symlink_to, lambda place, folder: shutil.copytree(folder, place)])
def test_the_folder_is_a_custom_node_by_a_link_and_by_a_copy(way, tmp_path, monkeypatch):
    """As ``nodes.load_custom_node`` of ComfyUI loads what lies in ``custom_nodes``."""
    place = tmp_path / "radial"
    way(place, Path(fit.__file__).parent)
    spec = importlib.util.spec_from_file_location("custom_nodes_radial", place / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert {"LoadRadialLora": LoadRadialLora} == module.NODE_CLASS_MAPPINGS
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(module.NODE_CLASS_MAPPINGS)


def test_the_node_offers_the_loras_and_shows_what_it_set(monkeypatch):
    folder = SimpleNamespace(
        get_filename_list=lambda kind: [f"{kind}.safetensors"],
        get_full_path_or_raise=lambda kind, name: f"/models/{kind}/{name}",
    )
    monkeypatch.setitem(sys.modules, "folder_paths", folder)
    monkeypatch.setattr("radial.comfyui.node.load_radial_lora", lambda *given: ("changed", f"set {given}"))
    inputs = LoadRadialLora.INPUT_TYPES()["required"]
    assert inputs["lora_name"][0] == ["loras.safetensors"] and inputs["model"][0] == "MODEL"
    found = getattr(LoadRadialLora(), LoadRadialLora.FUNCTION)(model="mine", lora_name="a", strength_model=0.5)
    text = f"set {('mine', Path('/models/loras/a'), 0.5)}"
    assert found == {"ui": {"text": [text]}, "result": ("changed", text)}
    assert len(LoadRadialLora.RETURN_TYPES) == len(LoadRadialLora.RETURN_NAMES) == 2


def test_the_example_workflow_uses_the_node():
    folder = Path(fit.__file__).parent / "example_workflows"
    (file,) = folder.glob("*.json")
    workflow = json.loads(file.read_text(encoding="utf-8"))
    nodes = [node for node in workflow.values() if node["class_type"] in NODE_CLASS_MAPPINGS]
    assert nodes and set(nodes[0]["inputs"]) == {"model", "lora_name", "strength_model"}
    for node in workflow.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in workflow
