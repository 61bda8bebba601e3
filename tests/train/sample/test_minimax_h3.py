"""MiniMax-H3 by the command: video without sound, of lengths that diffusers' modular pipeline refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLMiniMaxH3, MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3Blocks, before_denoise
from diffusers.modular_pipelines.minimax_h3.decoders import MiniMaxH3AfterDenoiseStep, MiniMaxH3VideoDecodeStep
from diffusers.modular_pipelines.minimax_h3.denoise import MiniMaxH3DenoiseStep
from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks
from huggingface_hub.utils import filter_repo_objects

from data.encoders import load_encoder
from data.encoders.base import EncoderSettings
from data.encoders.decoding import decode_frames
from data.prepare.video import read_clips
from tests.helpers import sample_ranks
from tests.helpers.generating import close, generator, latent
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_pipelines import HEADER, save_lora, save_pipeline, words
from train.errors import UserError
from train.export.merge import merge
from train.lora.reading import read_lora
from train.models.families.minimax_h3 import MiniMaxH3Adapter
from train.models.pretrained import stand_in, transformer_folder
from train.sample import extend
from train.sample.__main__ import main
from train.sample.pipeline import pipeline_class, pipeline_folder
from train.sample.settings import parse_settings

PROMPT = "a red ball, moving & it's a clip"
CHANGES = {
    "model": "minimax_h3", "model.text_tokens": 48, "prompt": PROMPT, "negative": None, "frames": 124, "height": 64,
    "width": 96, "steps": 3, "guidance": None,
}  # fmt: skip
SPARSE = {"decay": 0.4, "dense_layers": 1, "dense_steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pipeline("minimax_h3", tmp_path_factory.mktemp("minimax_h3") / "pipeline")


def stock(folder, frames=124):
    """The latent and the frames of diffusers' modular pipeline, for the prompt's states as the encoder has them."""
    blocks = {
        "layout": before_denoise.MiniMaxH3PrepareLayoutStep, "latents": before_denoise.MiniMaxH3PrepareLatentsStep,
        "timesteps": before_denoise.MiniMaxH3SetTimestepsStep, "denoise": MiniMaxH3DenoiseStep,
        "after": MiniMaxH3AfterDenoiseStep, "decode": MiniMaxH3VideoDecodeStep,
    }  # fmt: skip
    pipeline = SequentialPipelineBlocks.from_blocks_dict({name: cls() for name, cls in blocks.items()}).init_pipeline()
    pipeline.update_components(
        transformer=MiniMaxH3Transformer3DModel.from_pretrained(folder, subfolder="transformer"),
        vae=AutoencoderKLMiniMaxH3.from_pretrained(folder, subfolder="vae"),
        scheduler=MiniMaxH3Scheduler.from_pretrained(folder, subfolder="scheduler"),
        audio_scheduler=MiniMaxH3Scheduler(3.0),
    )
    cpu = torch.device("cpu")
    encoder = load_encoder("minimax_h3", EncoderSettings(folder, cpu, torch.float32, torch.float32))
    ids = torch.tensor([encoder.tokenizer(PROMPT, add_special_tokens=False).input_ids])
    with torch.no_grad():
        states = encoder.layers(input_ids=ids).last_hidden_state
    return pipeline(
        prompt_embeds=states, text_token_tags=torch.ones(states.shape[1]), num_frames=frames, height=64, width=96,
        generator=torch.Generator().manual_seed(7), num_inference_steps=4, output_type="np",
        output=["latents", "videos"],
    )  # fmt: skip


def test_dense_is_the_stock_pipeline_without_sound_and_released_is_not(folder, monkeypatch):
    monkeypatch.setattr(before_denoise, "audio_latent_num_frames", lambda frames: 0)
    made = stock(folder)
    expected, frames = made["latents"], made["videos"]
    got = latent(folder, **CHANGES, pattern="dense")
    close(got.latent, expected)
    vae = AutoencoderKLMiniMaxH3.from_pretrained(folder, subfolder="vae")
    assert np.abs(np.concatenate(list(decode_frames(vae, got.latent, tiled=True))) - 255 * frames[0]).max() <= 2
    assert got.latent.shape == (1, 4, 37, 4, 6) and len(got.seconds) == 3 and got.dense == [True] * 3
    sparse = latent(folder, **CHANGES, **SPARSE)
    assert (sparse.latent - expected).abs().max() > 1e-3
    assert sparse.dense == [True, False, False]


def test_clips_may_be_longer_than_the_pipelines_and_a_lora_changes_them(folder, tmp_path):
    with pytest.raises(ValueError, match=r"MiniMax-H3 generates between 5.0 and 15.0 seconds"):
        stock(folder, frames=379)
    lora = save_lora(
        folder, tmp_path / "pytorch_lora_weights.safetensors", header=HEADER, format_name="diffusers",
        family="hunyuan15",  # whose layers have the same names
    )  # fmt: skip
    changes = {**CHANGES, "frames": 379}
    plain = latent(folder, **changes, **SPARSE).latent
    tuned = latent(folder, **changes, lora=lora, dense_steps=1, block=None).latent
    assert plain.shape == tuned.shape == (1, 4, 112, 4, 6) and (plain - tuned).abs().max() > 1e-3


def test_a_merged_pipeline_comes_whole_and_generates_what_its_lora_did(folder, tmp_path):
    lora = save_lora(
        folder, tmp_path / "pytorch_lora_weights.safetensors", header=HEADER, format_name="diffusers",
        family="hunyuan15",
    )  # fmt: skip
    base, merged = folder / "transformer", tmp_path / "merged"
    merge(base, merged, [(read_lora(lora, stand_in(base)), 1.0)], None, header=HEADER)
    assert {path.name for path in merged.iterdir()} == {path.name for path in folder.iterdir()}
    changes = {**CHANGES, "frames": 39, "dense_steps": 1, "block": None}
    close(latent(merged, **changes).latent, latent(folder, **changes, lora=lora).latent)


def test_the_command_writes_the_frames_of_the_stock_decoder(folder, tmp_path):
    out = tmp_path / "clip.mp4"
    changes = {**CHANGES, "frames": 39}
    main(words(folder, **changes, **SPARSE, out=out, offload="layer"))
    made = generator(folder, **changes, **SPARSE)
    found = made.denoise(made.todo[0], made.prompts[0], made.attention).latent
    frames = np.concatenate(list(decode_frames(made.pipeline.vae, found, tiled=True)))
    (clip,) = read_clips(out, fps=24, frames=39, sizes=[(64, 96)])
    assert clip.frames.shape == frames.shape == (39, 64, 96, 3)
    light = [video.mean(axis=3).ravel() for video in (clip.frames, frames)]  # of noise the codec keeps little colour
    assert np.corrcoef(light)[0, 1] > 0.8


def test_two_processes_make_the_clip_of_one(folder):
    changes = {**CHANGES, "frames": 39, **SPARSE}
    expected = latent(folder, **changes).latent.numpy()
    for rank in run_ranks(2, sample_ranks.clip, folder, {**changes, "sequence": 2}):
        np.testing.assert_allclose(rank["latent"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": 3}, "guidance is 3, but minimax_h3 is distilled for guidance: leave it out"),
        ({"negative": "the bar"}, "negative is set, but guidance 1 is off"),
        ({"model.text_tokens": 31}, r"a prompt has 32 tokens, expected at most model.text_tokens, 31: shorten what"),
        ({"frames": 120}, r"frames is 120, expected 17 x k \+ 5 .*: use 107 or 124"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("train.sample.pipeline.load_part", None)
    with pytest.raises(UserError, match=message):
        main(words(folder, **{**CHANGES, **changes}, out=tmp_path / "clip.mp4"))


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_an_index_that_lacks_a_part_is_refused(folder, tmp_path, part):
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = copy / "modular_model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8"))
    del parts[part]
    index.write_text(json.dumps(parts), encoding="utf-8")
    with pytest.raises(UserError, match=f"modular_model_index.json: names no {part}, expected one: download it again"):
        main(words(copy, **{**CHANGES, "frames": 22}, out=tmp_path / "clip.mp4"))


def test_of_many_prompts_one_that_is_too_long_is_found_before_any_is_encoded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("train.sample.pipeline.load_part", None)
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\nfar {'far ' * 12}away\n", encoding="utf-8")
    with pytest.raises(UserError, match="a prompt has 56 tokens, expected at most .*, 48: shorten what"):
        main(words(folder, **{**CHANGES, "prompt": None}, prompts=file, out=tmp_path / "clips"))


def test_of_the_hub_only_its_own_parts_are_fetched(folder, monkeypatch):
    """Beside them lie the weights for references and those of the authors' own scripts."""
    asked = {}
    monkeypatch.setattr("train.models.folders.snapshot_download", lambda name, **given: asked.update(given) or folder)
    model = parse_settings(words("hub:MiniMaxAI/MiniMax-H3", **CHANGES))[1]
    assert pipeline_folder(model) == str(folder)
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    others = ["transformer_ref/config.json", "audio_vae/config.json", "FL2VA/transformer/config.json"]
    for fetch in (pipeline_folder, lambda model: transformer_folder(model, whole=True)):
        fetch(model)
        found = set(filter_repo_objects([*names, *others], allow_patterns=asked.pop("allow_patterns")))
        assert found == set(names)


def test_a_family_that_has_no_pipeline_is_refused(folder, monkeypatch):
    monkeypatch.setattr(MiniMaxH3Adapter, "generates", classmethod(lambda cls: False))
    with pytest.raises(
        UserError, match="model.family is minimax_h3, which cannot be generated with here: expected one"
    ):
        pipeline_folder(parse_settings(words(folder, **CHANGES))[1])
    with pytest.raises(UserError, match="has a MiniMaxH3Transformer3DModel, expected one of the families hunyuan"):
        pipeline_class(str(folder), image=False)


def test_the_modular_pipeline_is_not_extended(folder):
    pipeline = MiniMaxH3Blocks().init_pipeline()
    pipeline.update_components(transformer=MiniMaxH3Transformer3DModel.from_pretrained(folder, subfolder="transformer"))
    with pytest.raises(UserError, match="MiniMaxH3ModularPipeline is of the family minimax_h3, which cannot be exten"):
        extend(pipeline, model="minimax_h3")
    with pytest.raises(UserError, match="image is set, but .* is text-to-video"):
        pipeline_class(str(folder), image=True)
