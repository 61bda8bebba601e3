"""Evaluating runs of Wan's folders as diffusers has them: text encoders, VAE, pictures; clips against its pipeline."""

import json
import re

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from tests.helpers.videos import frames_of
from tests.helpers.wan_runs import config_of, make_shards, model_folder
from train.evaluate.run import run_evaluation
from train.evaluate.settings import Job, Settings
from train.measures import euler
from train.models.families.wan import WanAdapter
from train.run import train
from train.storage.run_folder import RunFolder

PROMPT, SIZE, STEPS, GUIDANCE = "a red ball, moving", (32, 48), 2, 3.0
LENGTHS = {"model__native_frames": 5, "model__longer": "{2x: 9}"}


def trained(root, conf, variant, image):
    """The folder of a run of one step, and that of its model."""
    folder = model_folder(root, variant)
    shards = make_shards(root / "shards", folder, variant, image)
    given = {"trainer__steps": 1, "report__clips": 0, "attention__dense_steps": 0, **LENGTHS}
    config = config_of(root, conf, folder, shards, SIZE, validation__shards=shards, **given)
    run = RunFolder.create(config)
    train(config, run)
    return run.path, folder


def evaluate(run, root, **changes):
    (root / "prompts.txt").write_text(f"{PROMPT}\n", encoding="utf-8")
    given = {"held_out": 2, "lengths": "2", "steps": STEPS, "guidance": GUIDANCE, "against": "dense"}
    job = Job.of(Settings(run=run, **{**given, "prompts": root / "prompts.txt", "out": root / "out", **changes}))
    run_evaluation(job)
    return json.loads((job.out / "results.json").read_text(encoding="utf-8"))


def test_clips_of_the_dense_control_are_those_of_diffusers_pipeline(tmp_path, monkeypatch):
    run, folder = trained(tmp_path, "wan_2x", "t2v", image=False)
    made = []

    def generate(adapter, noise, *given, label, **named):
        latent = original(adapter, noise, *given, label=label, **named)
        made.append((label, noise, named["shift"], latent))
        return latent

    original = euler.generate
    monkeypatch.setattr("train.evaluate.clips.generate", generate)
    results = evaluate(run, tmp_path)
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["base, dense", "tuned, released"]
    (label, noise, shift, latent), (_, same, _, tuned) = made
    assert label.startswith("base, dense") and torch.equal(noise, same) and not torch.equal(latent, tuned)

    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    # the pipeline asks for a number of steps; which noise levels those are is held by tests/train/models
    levels, set_timesteps = WanAdapter.noise_levels(STEPS, shift), pipeline.scheduler.set_timesteps
    pipeline.scheduler.set_timesteps = lambda _, device: set_timesteps(sigmas=levels, device=device)
    stock = pipeline(
        PROMPT, "", height=SIZE[0], width=SIZE[1], num_frames=9, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=noise, output_type="latent", max_sequence_length=512,
    ).frames  # fmt: skip
    torch.testing.assert_close(latent, stock, rtol=1e-3, atol=1e-3)
    (video,) = (tmp_path / "out" / "clips" / "base-dense-2x").glob("*.mp4")
    assert frames_of(video).shape == (9, *SIZE, 3)


def test_a_model_that_starts_from_a_picture_takes_those_of_held_out_clips(tmp_path):
    run, _ = trained(tmp_path, "wan_i2v_2x", "i2v", image=True)
    results = evaluate(run, tmp_path, prompts=None, clips=1)
    assert [row["name"] for row in results["rows"]] == ["base, dense", "tuned, released"]
    assert len(list((tmp_path / "out" / "clips").glob("*/*.mp4"))) == 2
    evaluate(run, tmp_path, out=tmp_path / "other")
    text = (tmp_path / "other" / "results.md").read_text(encoding="utf-8")
    assert re.search("clips are not generated: .*condition", text), text
