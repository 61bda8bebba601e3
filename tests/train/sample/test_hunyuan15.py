"""HunyuanVideo-1.5 by the command: its pipeline has two texts, a guider of its own, and calls nobody after a step."""

import types

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from data.encoders.decoding import decode_frames
from tests.helpers import sample_ranks
from tests.helpers.generating import close, generator, latent
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_pipelines import HEADER, save_lora, save_pipeline, words
from train.errors import UserError
from train.sample import extend, unextend
from train.sample.extension import model_of
from train.sample.pipeline import pipeline_class
from train.sample.settings import parse_settings

PROMPT = 'a red ball, moving & it\'s a "clip"'
CHANGES = {
    "model": "hunyuan15", "model.text_tokens": 300, "prompt": PROMPT, "negative": "the bar", "frames": 33, "height": 64,
    "width": 96, "steps": 3, "seed": 7, "guidance": 6,
}  # fmt: skip
SPARSE = {"decay": 0.4, "dense_layers": 1, "dense_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline("hunyuan15", tmp_path_factory.mktemp("hunyuan15") / "pipeline")


def call(pipeline, **changes):
    """As users of diffusers do."""
    return pipeline(
        prompt=PROMPT, negative_prompt="the bar", height=64, width=96, num_frames=33, num_inference_steps=3,
        generator=torch.Generator().manual_seed(7), output_type="latent", **changes,
    ).frames  # fmt: skip


def test_dense_is_the_stock_pipeline_and_released_is_not(folder):
    """Its texts padded to 1,000 and 256 tokens there, to 44 and 256 here: padding is nothing."""
    expected = call(diffusers.DiffusionPipeline.from_pretrained(folder))
    got = latent(folder, **CHANGES, pattern="dense")
    close(got.latent, expected)
    assert len(got.seconds) == 3 and got.dense == [True] * 3
    sparse = latent(folder, **CHANGES, **SPARSE)
    assert (sparse.latent - expected).abs().max() > 1e-3
    assert sparse.dense == [True, False, False]


@pytest.mark.parametrize("guidance", [1, 3.5])
def test_the_guidance_is_the_settings(folder, guidance):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.guider = diffusers.ClassifierFreeGuidance(guidance_scale=guidance)
    changes = {**CHANGES, "guidance": guidance, "negative": "the bar" if guidance > 1 else None}
    made = generator(folder, **changes, pattern="dense")
    close(made.denoise(made.todo[0], made.prompts[0], made.attention).latent, call(pipeline))
    assert any("negative" in name for name in made.prompts[0]) == (guidance > 1)
    if guidance == 1:
        with pytest.raises(UserError, match="negative is set, but guidance 1 is off"):
            parse_settings_and_run(folder, {**changes, "negative": "the bar"})


def parse_settings_and_run(folder, changes):
    from train.sample.__main__ import main

    main(words(folder, **changes, out=folder / "clip.mp4"))


def test_an_extended_pipelines_own_call_is_the_command(folder, tmp_path):
    """With the model's own text length, which is what its pipeline pads to."""
    header = {**HEADER, **{f"radial.{name}": str(CHANGES[name]) for name in ("frames", "height", "width")}}
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    save_lora(folder, lora, header=header, family="hunyuan15", format_name="diffusers")
    changes = {**CHANGES, "model.text_tokens": 1256, "lora": lora, "dense_steps": 1, "block": None}
    expected = latent(folder, **changes).latent
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    stock = call(pipeline)
    extend(pipeline, lora, model=parse_settings(words(folder, **changes))[1], dense_steps=1)
    close(call(pipeline), expected)
    unextend(pipeline)
    close(call(pipeline), stock)
    assert (expected - stock).abs().max() > 1e-3


@pytest.mark.parametrize(("branches", "size"), [(1, 2), (2, 1)])
def test_two_processes_make_the_clip_of_one(folder, branches, size):
    """They share its tokens, or its two prompts."""
    changes = {**CHANGES, **SPARSE}
    expected = latent(folder, **changes).latent.numpy()
    ranks = run_ranks(2, sample_ranks.clip, folder, {**changes, "sequence": size})
    assert [rank["branch"] for rank in ranks] == ([0, 1] if branches == 2 else [0, 0])
    for rank in ranks:
        np.testing.assert_allclose(rank["latent"], expected, rtol=1e-4, atol=1e-4)


def test_frames_are_the_stock_pipelines(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    found = latent(folder, **CHANGES, pattern="dense").latent
    frames = np.concatenate(list(decode_frames(pipeline.vae, found, tiled=True)))
    pipeline.vae.enable_tiling()
    torch.manual_seed(0)
    stock = pipeline(
        prompt=PROMPT, negative_prompt="the bar", height=64, width=96, num_frames=33, num_inference_steps=3,
        generator=torch.Generator().manual_seed(7),
    ).frames[0]  # fmt: skip
    assert np.abs(frames - 255 * stock).max() <= 2


def test_image_to_video_is_the_stock_pipelines(tmp_path):
    """Which takes the clip's size from the picture's and the model's; the command's is that of its settings."""
    folder = save_pipeline("hunyuan15_i2v", tmp_path / "i2v")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))
    picture.save(tmp_path / "first.png")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.target_size = 80
    assert pipeline.video_processor.calculate_default_height_width(64, 96, 80) == (64, 96)
    expected = pipeline(
        prompt=PROMPT, negative_prompt="the bar", image=picture, num_frames=33,
        num_inference_steps=3, generator=torch.Generator().manual_seed(7), output_type="latent",
    ).frames  # fmt: skip
    changes = {**CHANGES, "model": "hunyuan15_i2v", "model.text_tokens": 729 + 300, "image": tmp_path / "first.png"}
    got = latent(folder, **changes, pattern="dense")
    assert got.latent.shape == expected.shape
    close(got.latent, expected)
    sparse = latent(folder, **changes, **SPARSE)
    assert (sparse.latent - expected).abs().max() > 1e-3
    with pytest.raises(UserError, match="is image-to-video, give image=FILE"):
        pipeline_class(str(folder), image=False)


def test_a_text_without_room_for_words_is_refused(folder):
    with pytest.raises(UserError, match="model.text_tokens is 256, expected more than the 256 of glyphs and image"):
        generator(folder, **{**CHANGES, "model.text_tokens": 256})


@pytest.mark.parametrize(("task", "shift"), [("t2v", 9.0), ("i2v", 7.0)])
def test_a_pipelines_model_is_found_by_its_task(task, shift):
    config = {"task_type": task, "num_layers": 54, "num_attention_heads": 16, "attention_head_dim": 6}
    with torch.device("meta"):
        model = diffusers.HunyuanVideo15Transformer3DModel(**config, rope_axes_dim=(2, 2, 2))
    pipeline = types.SimpleNamespace(transformer=model, config={})
    assert model_of(pipeline).shifts[720] == shift


def test_a_first_frame_is_refused(folder):
    with pytest.raises(UserError, match="image is set, but .* is text-to-video"):
        pipeline_class(str(folder), image=True)
