"""LoRAs in generation: what their headers set and where they fit; their values in one transformer and in two."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from radial import Dense, Random, Released, Spatial
from tests.helpers.generating import close, generator, latent, stock
from tests.helpers.stock_models import TARGETS, random_lora
from tests.helpers.tiny_pipelines import HEADER, save_lora, save_pipeline, words
from train.config.compose import compose_run, finish
from train.config.schema import ClipConfig
from train.errors import UserError
from train.export.merge import merge
from train.export.run import folded, header_of
from train.lora.reading import Lora
from train.models.pretrained import stand_in
from train.sample.__main__ import main
from train.sample.jobs import jobs
from train.sample.settings import parse_settings, recipe_of, slots
from train.step.clip_recipe import clip_recipe


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_pipeline("wan", tmp_path_factory.mktemp("loras") / "wan")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return save_pipeline("wan_a14b", tmp_path_factory.mktemp("loras") / "two")


def test_a_loras_header_sets_everything_up(wan, tmp_path):
    file = save_lora(wan, tmp_path / "mine.safetensors", header={**HEADER, "radial.shift": "3.0"})
    unset = dict.fromkeys(("frames", "height", "width", "block"))
    settings, _ = parse_settings(words(wan, lora=file, **unset))
    assert (settings.frames, settings.height, settings.width, settings.block) == (33, 32, 48, 16)
    assert (settings.pattern, settings.decay, settings.dense_layers, settings.dense_sigma) == ("released", 0.4, 1, None)
    assert (settings.shift, settings.dense_steps) == (3.0, 2)
    settings, _ = parse_settings(words(wan, lora=f"{file}:0.5", decay=0.9, frames=17, dense_steps=0))
    assert (settings.frames, settings.decay, settings.dense_steps) == (17, 0.9, 0)
    sigma = save_lora(wan, tmp_path / "sigma.safetensors", header={**HEADER, "radial.dense_sigma": "0.9"})
    assert parse_settings(words(wan, lora=sigma))[0].dense_sigma == 0.9
    assert parse_settings(words(wan, lora=sigma))[0].dense_steps is None
    assert parse_settings(words(wan, lora=sigma, dense_steps=1))[0].dense_sigma is None
    both = {"radial.dense_sigma": "0.9", "radial.dense_steps": "3"}
    counted = save_lora(wan, tmp_path / "counted.safetensors", header={**HEADER, **both})
    got = parse_settings(words(wan, lora=counted, steps=10))[0]
    assert (got.dense_steps, got.dense_sigma) == (None, 0.9)  # the trained level, whatever the steps
    got = parse_settings(words(wan, lora=counted, dense_sigma=0.7))[0]
    assert (got.dense_steps, got.dense_sigma) == (None, 0.7)
    none = save_lora(wan, tmp_path / "none.safetensors", header={**HEADER, "radial.dense_steps": "0"})
    assert parse_settings(words(wan, lora=none))[0].dense_steps == 0


def test_another_size_than_the_trained_one_has_its_own_shift_and_dense_level(tmp_path):
    """A run on 480p and 720p clips trained each at its own shift; the header has the largest's."""
    config = finish(compose_run({"conf": "wan_i2v_2x", "model.path": "base"}))
    trained, small = clip_recipe(config), clip_recipe(config, ClipConfig(161, 480, 832))
    file, image = tmp_path / "mine.safetensors", tmp_path / "image.png"
    save_file({"x": torch.zeros(1)}, file, header_of(config, 1))
    Image.new("RGB", (8, 8)).save(image)

    def settings(*words):
        return parse_settings(["model=wan_i2v_14b", "prompt=x", f"lora={file}", f"image={image}", *words])[0]

    got = settings()
    assert (got.shift, got.dense_steps, got.dense_sigma) == (5.0, None, trained.attention.dense_sigma)
    got = settings("height=480", "width=832", "steps=20")
    assert (got.shift, got.dense_steps, got.dense_sigma) == (3.0, None, small.attention.dense_sigma)
    got = settings("height=480", "width=832", "shift=4")
    assert (got.shift, got.dense_sigma) == (4.0, trained.attention.dense_sigma)
    save_file({"x": torch.zeros(1)}, file, header_of(config, 1) | {"radial.shift": "7.0"})  # the run's own
    got = settings("height=480", "width=832")
    assert (got.shift, got.dense_sigma) == (7.0, trained.attention.dense_sigma)


def test_a_headers_pattern_is_the_one_that_was_trained(wan, tmp_path):
    header = {**HEADER, "radial.pattern": "random", "radial.reach": "0.25", "radial.per_head": "True"}
    file = save_lora(wan, tmp_path / "mine.safetensors", header=header)
    settings, _ = parse_settings(words(wan, lora=file))
    like = Released(settings.decay, settings.rule)
    assert recipe_of(settings).pattern == Random(like, reach=0.25, per_head=True)
    assert recipe_of(replace(settings, pattern="spatial", per_head=False)).pattern == Spatial(0.25)


def test_what_is_typed_of_the_model_goes_before_the_header(wan, tmp_path):
    header = {**HEADER, "radial.rope": "interpolate"}
    given = {"lora": save_lora(wan, tmp_path / "mine.safetensors", header=header)}
    typed = {"model.rope": "riflex", "model.rule": "ports"}
    found = [parse_settings(words(wan, **given, **more))[0] for more in ({}, typed, {**typed, "rope": "default"})]
    assert [(each.rope, each.rule) for each in found] == [
        ("interpolate", "wan"),
        ("riflex", "ports"),
        ("default", "ports"),
    ]


def test_another_pattern_than_the_headers_has_none_of_its_numbers(wan, tmp_path):
    header = {**HEADER, "radial.pattern": "random", "radial.reach": "0.25", "radial.per_head": "True"}
    file = save_lora(wan, tmp_path / "mine.safetensors", header=header)
    for pattern, expected in (("dense", Dense()), ("released", Released(0.4)), ("spatial", Spatial())):
        assert recipe_of(parse_settings(words(wan, lora=file, pattern=pattern))[0]).pattern == expected
    assert recipe_of(parse_settings(words(wan, lora=file, pattern="spatial", reach=0.1))[0]).pattern == Spatial(0.1)
    assert recipe_of(parse_settings(words(wan, lora=file, pattern="random"))[0]).pattern.reach == 0.25


def test_the_rule_is_the_models_own():
    assert parse_settings(["model=hunyuan", "prompt=x"])[0].rule == "hunyuan"
    assert parse_settings(["model=wan_14b", "prompt=x"])[0].rule == "wan"
    assert parse_settings(["model=hunyuan", "prompt=x", "rule=ports"])[0].rule == "ports"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("frames", "abc", "a whole number"),
        ("decay", "nan", "a number"),
        ("rope", "foo", "one of default, riflex, interpolate"),
    ],
)
def test_a_damaged_header_is_told(wan, tmp_path, key, value, expected):
    file = save_lora(wan, tmp_path / "mine.safetensors", header={**HEADER, f"radial.{key}": value})
    message = f"mine.safetensors: its header's radial.{key} is '{value}', expected {expected}: give {key}=... yourself"
    with pytest.raises(UserError, match=re.escape(message)):
        parse_settings(words(wan, lora=file, **{key: None}))
    given = {"frames": 33, "decay": 0.5, "rope": "default"}[key]
    assert getattr(parse_settings(words(wan, lora=file, **{key: given}))[0], key) == given


def test_a_merged_models_header_sets_everything_up(wan, tmp_path):
    pairs = folded(random_lora(stand_in(wan / "transformer"), TARGETS["wan"], seed=1), 3)
    merge(wan / "transformer", tmp_path / "merged", [(Lora(pairs), 1.0)], None, header=HEADER)
    unset = dict.fromkeys(("frames", "height", "width", "block"))
    settings, _ = parse_settings(words(tmp_path / "merged", **unset))
    assert (settings.frames, settings.height, settings.width, settings.block) == (33, 32, 48, 16)
    assert (settings.decay, settings.dense_layers) == (0.4, 1)
    assert parse_settings(words(tmp_path / "merged", decay=0.9))[0].decay == 0.9
    styled = save_lora(wan, tmp_path / "mine.safetensors", header={**HEADER, "radial.decay": "0.7"})
    assert parse_settings(words(tmp_path / "merged", lora=styled))[0].decay == 0.7


def test_loras_are_added_with_their_strengths(wan, tmp_path):
    mine = save_lora(wan, tmp_path / "mine.safetensors", header=HEADER)
    style = save_lora(wan, tmp_path / "style.safetensors", header={}, seed=2, format_name="kohya")
    diffusers_style = save_lora(wan, tmp_path / "d" / "x", header={}, seed=2, format_name="diffusers").parent

    def change(pipeline):
        pipeline.load_lora_weights(mine, adapter_name="mine")
        pipeline.load_lora_weights(diffusers_style, adapter_name="style")
        pipeline.set_adapters(["mine", "style"], [0.5, -0.7])

    expected = stock(wan, change)
    clip = latent(wan, pattern="dense", lora=f"{mine}:0.5", add=f"{style}:-0.7")
    close(clip.latent, expected)
    assert (expected - stock(wan)).abs().max() > 1e-2


def test_files_with_commas_in_their_names(wan, tmp_path, capsys):
    (tmp_path / "a, b").mkdir()
    mine = save_lora(wan, tmp_path / "a, b" / "mine.safetensors", header=HEADER)
    style = save_lora(wan, tmp_path / "style,2.safetensors", header={}, seed=2, format_name="kohya")
    prompts = tmp_path / "my,prompts.txt"
    prompts.write_text("a ball, red\n", encoding="utf-8")
    given = words(wan, lora=f"{mine}:0.5", add=f"{style}:-0.7,{style}", prompt=None, prompts=prompts)
    settings, model = parse_settings(given)
    (slot,) = slots(settings, model)
    assert slot.files() == [(mine, 0.5), (style, -0.7), (style, 1.0)]
    assert jobs(settings)[0].prompt == "a ball, red"
    said = generator(wan, lora=f"{mine}:0.5", add=style).extension.loaded
    assert f"{style}: alpha / rank is 1, from its alpha tensors" in said


@pytest.mark.parametrize("offload", ["model", "layer"])
def test_offloaded_transformers_make_the_same_clip(wan, tmp_path, offload):
    lora = save_lora(wan, tmp_path / "mine.safetensors", header=HEADER)
    close(latent(wan, lora=lora, offload=offload).latent, latent(wan, lora=lora).latent)


def test_whole_changes_of_distilled_loras_are_applied(wan, tmp_path):
    torch.manual_seed(3)
    bias, norm = torch.randn(32), torch.randn(32)
    save_file(
        {"diffusion_model.blocks.0.cross_attn.k.diff_b": bias, "diffusion_model.blocks.1.norm3.diff": norm},
        tmp_path / "few.safetensors",
    )

    def change(pipeline):
        blocks = pipeline.transformer.blocks
        blocks[0].attn2.to_k.bias.data.add_(0.5 * bias)
        blocks[1].norm2.weight.data.add_(0.5 * norm)

    close(latent(wan, pattern="dense", add=f"{tmp_path / 'few.safetensors'}:0.5").latent, stock(wan, change))


TWO = {"model": "wan22_t2v_a14b"}


def expert_header(expert, **changes):
    about = {"radial.family": "wan", "radial.expert": expert, "radial.base_model": "two", **changes}
    return {**HEADER, **about}


def test_each_experts_lora_arrives_at_that_expert(two, tmp_path, capsys):
    """An export's folder of both, with a strength, and a style for the second alone."""
    for part, expert, seed in (("high_noise", "high", 1), ("low_noise", "low", 2)):
        file = tmp_path / "export" / part / "diffusers" / "x"
        save_lora(two, file, header=expert_header(expert), seed=seed, format_name="diffusers")
    style = save_lora(two, tmp_path / "style.safetensors", header={}, seed=3)
    made = generator(two, **TWO, pattern="dense", lora=f"{tmp_path / 'export'}:0.5", add_2=f"{style}:-0.7")
    layers = [name for name, _ in stand_in(two / "transformer").named_modules() if name.endswith("attn1.to_q")]
    assert layers
    for transformer, loras in zip(made.transformers, ([(1, 0.5)], [(2, 0.5), (3, -0.7)]), strict=True):
        for number, (seed, strength) in enumerate(loras):
            expected = folded(random_lora(stand_in(two / "transformer"), TARGETS["wan"], seed=seed), 3)
            for name in layers:
                lora = transformer.get_submodule(name)
                assert lora.scaling[f"lora_{number}"] == pytest.approx(strength)
                assert torch.equal(lora.lora_A[f"lora_{number}"].weight, expected[name][0])
                assert torch.equal(lora.lora_B[f"lora_{number}"].weight, expected[name][1])
    assert "warning" not in capsys.readouterr().out
    alone = parse_settings(words(two, **TWO, lora=tmp_path / "export" / "high_noise", lora_2="none"))[0]
    assert (alone.lora_2, alone.decay) == (None, 0.4)
    swapped = parse_settings(words(two, **TWO, lora="none", lora_2=tmp_path / "export" / "low_noise"))[0]
    assert (swapped.lora, swapped.decay) == (None, 0.4)


@pytest.mark.parametrize(
    ("given", "header", "message"),
    [
        ({"lora": 1}, {}, "lora is set and lora_2 is not, the model has two experts: give lora_2=FILE, lora_2=none"),
        ({"lora_2": 1}, {}, "lora_2 is set and lora is not, the model has two experts"),
        (
            {"lora": 1, "lora_2": "none"},
            expert_header("low"),
            "its expert for low noise levels; lora is the high one's",
        ),
        ({"lora": "none", "lora_2": 1}, expert_header("high"), "for high noise levels; lora_2 is the low one's"),
        ({"add_2": 1}, expert_header("high"), "for high noise levels; lora_2 is the low one's"),
        (
            {"add": 1},
            expert_header("None", **{"radial.family": "hunyuan"}),
            "mine.safetensors was trained on two, of the family hunyuan; the model is of wan: choose",
        ),
    ],
)
def test_loras_of_the_wrong_expert_or_family(two, tmp_path, given, header, message):
    file = save_lora(two, tmp_path / "mine.safetensors", header=header)
    with pytest.raises(UserError, match=message):
        parse_settings(words(two, **TWO, **{key: file if value == 1 else value for key, value in given.items()}))


def test_two_experts_loras_of_different_trainings_are_told(two, tmp_path):
    """A clip has one attention for both: the second's would be another than it was trained under."""
    high = save_lora(two, tmp_path / "high.safetensors", header=expert_header("high"))

    def settings(changes, **given):
        header = expert_header("low", **{f"radial.{key}": value for key, value in changes.items()})
        low = save_lora(two, tmp_path / "low.safetensors", header=header)
        return parse_settings(words(two, **{**TWO, "block": None, "lora": high, "lora_2": low, **given}))[0]

    for key, value in (("decay", "0.5"), ("pattern", "dense"), ("block", "32"), ("dense_layers", "2")):
        message = f"high.safetensors was trained with {key} .*low.safetensors with {value}, .*: give {key}=... yourself"
        with pytest.raises(UserError, match=message):
            settings({key: value})
        assert str(getattr(settings({key: value}, **{key: value}), key)) == value
    assert settings({"frames": "17", "dense_sigma": "0.95"}).frames == 33
    assert settings({"decay": "0.5", "rule": "ports"}, pattern="dense").decay == 0.4  # which counts for nothing


def test_an_experts_lora_is_not_for_a_model_of_one(wan, tmp_path):
    file = save_lora(wan, tmp_path / "mine.safetensors", header=expert_header("high"))
    with pytest.raises(UserError, match="its expert for high noise levels; the model has one transformer"):
        parse_settings(words(wan, lora=file))


def test_another_base_model_is_said(wan, tmp_path, capsys):
    generator(wan, lora=save_lora(wan, tmp_path / "mine.safetensors", header=HEADER))
    assert "warning: " in (said := capsys.readouterr().out)
    assert "mine.safetensors was trained on base, model.path is wan: are they the same model?" in said


def test_another_lora_in_an_export_folder_is_noticed(wan, tmp_path):
    file = tmp_path / "export" / "diffusers" / "x"
    save_lora(wan, file, header=HEADER, format_name="diffusers")
    arguments = words(wan, out=tmp_path / "clip.mp4", lora=tmp_path / "export", steps=1, offload="model")
    main(arguments)
    record = json.loads((tmp_path / "clip.json").read_text(encoding="utf-8"))
    assert list(record["lora_files"]) == [str(file.with_name("pytorch_lora_weights.safetensors"))]
    assert record["execution"]["offload"] == "model"
    assert set(record["execution"]) == {"compare", "backend", "sequence", "split_guidance", "offload", "compile"}
    main([word.replace("offload=model", "offload=none") for word in arguments])  # the same clip
    save_lora(wan, file, header=HEADER, seed=2, format_name="diffusers")
    with pytest.raises(UserError, match="of other settings .another LoRA.: give another out"):
        main(arguments)


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        ("wan_14b", {}, (720, 1280, 50, 5.0, None, 5.0)),
        ("wan_14b", {"height": 480, "width": 832}, (480, 832, 50, 5.0, None, 5.0)),
        ("wan_1.3b", {}, (480, 832, 50, 6.0, None, 8.0)),
        ("wan_i2v_14b_480p", {}, (480, 832, 40, 5.0, None, 3.0)),
        ("wan22_t2v_a14b", {}, (720, 1280, 40, 4.0, 3.0, 12.0)),
        ("wan22_t2v_a14b", {"guidance": 2, "shift": 5}, (720, 1280, 40, 2.0, None, 5.0)),
        ("wan22_i2v_a14b", {}, (720, 1280, 40, 3.5, 3.5, 5.0)),
        ("wan22_5b", {}, (704, 1280, 50, 5.0, None, 5.0)),
        ("hunyuan", {}, (720, 1280, 50, 6.0, None, 7.0)),
        ("hunyuan15", {}, (720, 1280, 50, 6.0, None, 9.0)),
        ("hunyuan15", {"height": 480, "width": 848}, (480, 848, 50, 6.0, None, 5.0)),
        ("hunyuan15_i2v", {}, (720, 1280, 50, 6.0, None, 7.0)),
        ("mochi", {}, (480, 848, 64, 4.5, None, 1.0)),
    ],
)
def test_what_is_not_said_is_the_models_own(model, changes, expected):
    got, _ = parse_settings([f"model={model}", "prompt=x", *(f"{key}={value}" for key, value in changes.items())])
    assert (got.height, got.width, got.steps, got.guidance, got.guidance_2, got.shift) == expected
