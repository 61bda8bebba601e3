"""Every family that generates: with dense attention its clips are the stock pipeline's; with the released mask not."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from tests.helpers import sample_ranks
from tests.helpers.generating import close, latent
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_pipelines import HEADER, save_lora, save_pipeline, words
from train.errors import UserError
from train.models.families import family_of
from train.sample import extend, unextend
from train.sample.__main__ import main
from train.sample.generate import Generator
from train.sample.pipeline import load_pipeline, pipeline_class
from train.sample.settings import parse_settings
from train.step.clip_recipe import dense_level

SMALL = {"frames": 33, "height": 32, "width": 48, "steps": 3, "seed": 7, "negative": "the bar"}
CASES = {
    "hunyuan": {"model": "hunyuan", "guidance": 6},
    "mochi": {"model": "mochi", "guidance": 4.5, "frames": 49},
    "wan_i2v": {"model": "wan_i2v_14b", "guidance": 5, "model.text_tokens": 512},
    "wan_a14b": {"model": "wan22_t2v_a14b", "guidance": 4, "guidance_2": 3},
    "wan_5b": {"model": "wan22_5b", "guidance": 5, "height": 64, "width": 96},
}
PICTURE = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    Image.fromarray(PICTURE).save(root / "first.png")
    return root, {family: save_pipeline(family, root / family) for family in CASES}


def settings(folders, family, image=None):
    changes = {**SMALL, **CASES[family]}
    if image:
        changes["image"] = folders[0] / "first.png"
    return folders[1][family], changes


def pipeline_of(changes):
    return diffusers.WanImageToVideoPipeline if "image" in changes else diffusers.DiffusionPipeline


def stock(folder, changes):
    return call(pipeline_of(changes).from_pretrained(folder), changes)


def call(pipeline, changes):
    """As users of diffusers do."""
    more = {"image": Image.open(changes["image"])} if "image" in changes else {}
    if "guidance_2" in changes:
        more["guidance_scale_2"] = changes["guidance_2"]
    return pipeline(
        prompt="a red ball, moving & it's a clip",
        negative_prompt=changes["negative"],
        height=changes["height"],
        width=changes["width"],
        num_frames=changes["frames"],
        num_inference_steps=changes["steps"],
        guidance_scale=changes["guidance"],
        generator=torch.Generator().manual_seed(changes["seed"]),
        max_sequence_length=changes.get("model.text_tokens", 24),
        output_type="latent",
        **more,
    ).frames


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_an_extended_pipelines_own_call_is_the_command(folders, family, tmp_path):
    folder, changes = settings(folders, family, family == "wan_i2v")
    model = parse_settings(words(folder, **changes))[1]
    header = {**HEADER, **{f"radial.{name}": f"{changes[name]}" for name in ("frames", "height", "width")}}
    targets = family if family in ("hunyuan", "mochi") else "wan"
    way = "diffusers" if family == "mochi" else "comfyui"  # file's keys
    lora = tmp_path / ("pytorch_lora_weights.safetensors" if family == "mochi" else "mine.safetensors")
    save_lora(folder, lora, header=header, family=targets, format_name=way)
    lora_2 = lora if family == "wan_a14b" else None
    given = {"lora": lora, "dense_steps": 1, "block": None, **({"lora_2": lora_2} if lora_2 else {})}
    expected = latent(folder, **{**changes, **given}).latent
    pipeline = pipeline_of(changes).from_pretrained(folder)
    extend(pipeline, lora, lora_2=lora_2, model=model, dense_steps=1)
    close(call(pipeline, changes), expected)
    unextend(pipeline)
    close(call(pipeline, changes), stock(folder, changes))


def test_two_of_fifty_steps_are_dense_in_bf16(folders):
    """HunyuanVideo's pipeline rounds the timestep to bf16, where the third step's 0.99408 is 0.996."""
    folder, changes = settings(folders, "hunyuan")
    level = dense_level(parse_settings(words(folder, **changes))[1], 2, 7.0)
    changes |= {"frames": 5, "steps": 50, "dtype": "bf16", "dense_sigma": level}
    assert latent(folder, **changes).dense == [True] * 2 + [False] * 48


@pytest.mark.parametrize(("family", "image"), [
    *((family, family == "wan_i2v") for family in CASES), ("wan_5b", True)
])  # fmt: skip
def test_dense_is_the_stock_pipeline_and_released_is_not(folders, family, image):
    folder, changes = settings(folders, family, image)
    expected = stock(folder, changes)
    got = latent(folder, **changes, pattern="dense")
    close(got.latent, expected)
    sparse = latent(folder, **changes, decay=0.4, dense_layers=0, dense_steps=1)
    assert (sparse.latent - expected).abs().max() > 1e-3
    assert sparse.dense == [True] + [False] * (changes["steps"] - 1)


@pytest.mark.parametrize(("family", "offload", "compiles"), [("mochi", "none", True), ("hunyuan", "layer", False)])
def test_the_joint_families_compare_compile_offload_and_take_styles(
    folders, tmp_path, monkeypatch, family, offload, compiles
):
    """By the command, compared with dense; torch.compile without its code generation, which takes minutes."""
    compiled = []

    def compile_layer(layer, **settings):
        compiled.append(settings)
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_layer)
    folder, changes = settings(folders, family)
    style = save_lora(folder, tmp_path / "style.safetensors", header={}, family=family, seed=2)
    changes |= {"steps": 2 if family == "mochi" else 1, "decay": 0.4, "dense_layers": 1, "dense_steps": 0}
    plain = latent(folder, **changes).latent
    changes["add"] = f"{style}:0.5"
    if family == "hunyuan":
        with pytest.raises(
            UserError, match="negative is set, but the model takes the guidance as an input: there is no pass"
        ):
            main(words(folder, **changes, out=tmp_path / "clip.mp4"))
        changes["negative"] = None
    expected = latent(folder, **changes).latent
    made = []
    write = Generator.write
    monkeypatch.setattr(
        Generator, "write", lambda self, job, known, clips: made.append(clips) or write(self, job, known, clips)
    )
    out = tmp_path / "clip.mp4"
    main(words(folder, **changes, out=out, compare="dense", offload=offload, compile=str(compiles).lower()))
    assert [settings["dynamic"] for settings in compiled] == (2 * [False] if compiles else [])
    close(made[0]["released"].latent, expected)
    for other in (plain, made[0]["dense"].latent):
        assert (other - expected).abs().max() > 1e-3
    assert out.with_stem("clip_both").exists()


@pytest.mark.parametrize("family", CASES)
def test_two_processes_make_the_clip_of_one(folders, family):
    folder, changes = settings(folders, family, family == "wan_i2v")
    changes |= {"decay": 0.4, "dense_layers": 1, "dense_steps": 1}
    expected = latent(folder, **changes).latent.numpy()
    ways = [(1, 2)] if family in ("hunyuan", "wan_a14b") else [(1, 2), (2, 1)]
    for branches, size in ways:
        ranks = run_ranks(2, sample_ranks.clip, folder, {**changes, "sequence": size})
        assert [rank["branch"] for rank in ranks] == ([0, 1] if branches == 2 else [0, 0])
        for rank in ranks:
            np.testing.assert_allclose(rank["latent"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("offload", "device"), [("none", "meta"), ("model", "cpu"), ("layer", "cpu")])
def test_an_offloaded_image_encoder_is_not_on_the_device(folders, offload, device):
    """The meta device stands in for a GPU."""
    folder, changes = settings(folders, "wan_i2v", image=True)
    given, model = parse_settings(words(folder, **changes, offload=offload))
    cls = pipeline_class(str(folder), True)
    loaded = load_pipeline(cls, family_of(model), str(folder), given, torch.device("meta"), torch.float32)
    assert loaded.vae.device.type == "meta"
    assert loaded.image_encoder.device.type == device


def test_a_picture_is_upright_and_cut_to_the_clip(folders, tmp_path):
    """Turned by its camera's note, and its sides cut off: the clip of a picture that has neither."""
    folder, changes = settings(folders, "wan_i2v", image=True)
    changes |= {"steps": 1, "pattern": "dense"}
    expected = latent(folder, **changes).latent
    wide = np.pad(PICTURE, ((0, 0), (9, 9), (0, 0)))
    turned = Image.fromarray(np.rot90(wide))  # to the left; the note says: turn to the right
    note = turned.getexif()
    note[ExifTags.Base.Orientation] = 6
    turned.save(tmp_path / "turned.png", exif=note)
    close(latent(folder, **{**changes, "image": tmp_path / "turned.png"}).latent, expected)


def test_pictures_are_opened_first_and_another_one_is_noticed(folders, tmp_path, monkeypatch):
    folder, changes = settings(folders, "wan_i2v", image=True)
    image = tmp_path / "first.png"
    Image.fromarray(PICTURE).save(image)
    arguments = words(folder, **{**changes, "image": image, "steps": 1}, out=tmp_path / "clip.mp4")
    main(arguments)
    Image.fromarray(PICTURE[::-1]).save(image)
    with pytest.raises(UserError, match="clip.mp4 is there, of other settings .another picture.: give another out"):
        main(arguments)
    (tmp_path / "no.png").write_text("no picture", encoding="utf-8")
    lines = [{"prompt": "a", "image": str(image)}, {"prompt": "b", "image": str(tmp_path / "no.png")}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    monkeypatch.setattr("train.sample.generate.Generator", None)
    with pytest.raises(UserError, match="no.png is not readable"):
        given = {**changes, "image": None, "prompt": None, "prompts": tmp_path / "prompts.jsonl"}
        main(words(folder, **given, out=tmp_path / "clips"))


def test_images_and_models_that_do_not_fit(folders):
    folder, changes = settings(folders, "mochi", image=True)
    with pytest.raises(UserError, match="steps is 1, expected at least 2"):
        latent(folder, **{**changes, "steps": 1})
    with pytest.raises(UserError, match="image is set, but .* is text-to-video"):
        latent(folder, **changes)
