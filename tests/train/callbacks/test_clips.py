"""Clips of fixed prompts while training: they are there, they are the LoRA's, and training does not notice them."""

from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from tests.helpers.faults import losses
from tests.helpers.tiny import run_config
from tests.helpers.videos import frames_of
from tests.helpers.wan_runs import FRAMES, config_of, make_shards, model_folder
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.measures.decoding import encoder_for
from train.measures.euler import sampled_with
from train.preflight import preflight
from train.run import train
from train.storage.run_folder import RunFolder

PROMPTS = "['a red ball, moving', 'the bar']"


def run(config):
    preflight(config)
    folder = RunFolder.create(config)
    train(config, folder)
    return folder.path


def test_training_does_not_notice_them(tmp_path):
    plain = run_config(tmp_path, trainer__steps=4, trainer__checkpoint_every=2)
    changes = {"validation__samples_every": 2, "validation__prompts": PROMPTS, "validation__samples_steps": 3}
    config = run_config(tmp_path, trainer__steps=4, trainer__checkpoint_every=2, log__wandb="offline", **changes)
    folder = run(config)
    assert losses(folder) == losses(run(plain))
    found = sorted(file.relative_to(folder / "samples").as_posix() for file in (folder / "samples").rglob("*.mp4"))
    clips = ["00-a-red-ball-moving.mp4", "01-the-bar.mp4"]
    assert found == [f"step-{step:06d}/{clip}" for step in (2, 4) for clip in clips]
    first, second, other = (frames_of(folder / "samples" / found[i]) for i in (0, 2, 1))
    assert first.shape == (config.clip.frames, config.clip.height, config.clip.width, 3)
    assert (first != other).any()
    # the same noise and prompt: what differs is what two steps of training have changed
    assert np.abs(first.astype(int) - second).mean() < np.abs(first.astype(int) - other).mean()
    assert len(list(folder.glob("wandb/offline-run-*/files/media/videos/samples/*.mp4"))) == 4
    assert "samples/step-000004/01-the-bar.mp4" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("conf", "variant", "image", "size"),
    [("wan_i2v_2x", "i2v", True, (32, 48)), ("wan22_5b_4x", "5b", False, (64, 96))],
)
def test_models_that_take_a_first_frame_start_from_it(tmp_path, conf, variant, image, size):
    folder = model_folder(tmp_path, variant)
    shards = make_shards(tmp_path / "shards", folder, variant, image)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)).save(tmp_path / "first.png")
    given = {
        "trainer__steps": 1,
        "validation__samples_every": 1,
        "validation__samples_steps": 2,
        "validation__prompts": "[a red ball]",
        "validation__images": f"['{tmp_path / 'first.png'}']",
    }
    path = run(config_of(tmp_path, conf, folder, shards, size, **given))
    assert frames_of(path / "samples/step-000001/00-a-red-ball.mp4").shape == (FRAMES, *size, 3)
    if image:
        with pytest.raises(UserError, match="the model starts from a picture: give one for each prompt"):
            preflight(config_of(tmp_path, conf, folder, shards, size, **{**given, "validation__images": "[]"}))


def test_a_disk_that_is_full_leaves_the_gpu_to_training(tmp_path, monkeypatch, capsys):
    moved = []

    def watched(*arguments, **options):
        encoder = encoder_for(*arguments, **options)
        if options.get("vae_only"):
            to = encoder.vae.to
            encoder.vae.to = lambda where: moved.append(str(where)) or to(where)
        return encoder

    class Full:
        def add(self, frames):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.callbacks.clips.encoder_for", watched)
    monkeypatch.setattr("train.callbacks.clips.video_file", lambda *_: nullcontext(Full()))
    folder = model_folder(tmp_path, "5b")
    shards = make_shards(tmp_path / "shards", folder, "5b", False)
    given = {"samples_every": 1, "samples_steps": 1, "prompts": "[a red ball]"}
    given = {"trainer__steps": 1, **{f"validation__{key}": value for key, value in given.items()}}
    run(config_of(tmp_path, "wan22_5b_4x", folder, shards, (64, 96), **given))
    assert "00-a-red-ball.mp4 is not written" in capsys.readouterr().out
    assert moved and moved[-1] == "cpu" and len(moved) == 2


def test_mistakes_are_told_before_anything_is_loaded(tmp_path):
    for changes, message in (
        ({"prompts": "[]"}, "validation.samples_every needs prompts"),
        ({"prompts": PROMPTS, "images": "[first.png]"}, "validation.images has 1 pictures, expected one for each of"),
        ({"prompts": "[a]", "images": "[first.png]"}, "validation.images: first.png is no file"),
    ):
        given = {f"validation__{key}": value for key, value in changes.items()}
        with pytest.raises(UserError, match=message):
            preflight(run_config(tmp_path, validation__samples_every=1, **given))
    with pytest.raises(UserError, match="validation.samples_steps is 0, expected at least 1"):
        run_config(tmp_path, validation__samples_steps=0)
    assert finish(compose_run({"conf": "wan_4x", "validation": "samples"})).validation.samples_every == 250


def test_clips_are_made_as_the_models_own_unless_the_run_says_how():
    def of(**changes):
        words = {"conf": "wan22_2x", "model.path": "x", "data.shards": "y", **changes}
        return sampled_with(finish(compose_run({key.replace("__", "."): str(value) for key, value in words.items()})))

    model = finish(compose_run({"conf": "wan22_2x", "model.path": "x", "data.shards": "y"})).model
    assert model.guidance[0] != model.guidance[1]
    assert of() == (model.steps, *model.guidance)
    assert of(model__expert="low") == (model.steps, model.guidance[1], model.guidance[1])
    assert of(model__expert="high") == (model.steps, model.guidance[0], model.guidance[0])
    assert of(validation__samples_steps=7, validation__samples_guidance=2.5) == (7, 2.5, 2.5)
