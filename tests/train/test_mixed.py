"""Shards of clips of several lengths and sizes: one shape a step, each with its own mask, exactly resumable."""

import csv
import shutil
from dataclasses import replace

import pytest
import torch

from data.shards.batch import collate
from data.shards.manifest import Manifest
from data.shards.stream import read_samples
from data.shards.writer import ShardWriter
from data.synth.clips import synthesize
from tests.helpers.faults import losses
from tests.helpers.tiny import run_config
from train.assemble import build_module
from train.config.schema import ClipConfig
from train.errors import UserError
from train.flow import StepDraw
from train.models.loading import load_adapter
from train.preflight import preflight
from train.run import resume, train
from train.step.clip_recipe import clip_recipe
from train.storage.run_folder import RunFolder

SHAPES = {"long": (8, 32, 64), "short": (4, 32, 64), "tall": (4, 64, 32)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    parts = [synthesize(root / name, 4, *shape, seed=5) for name, shape in SHAPES.items()]
    about = {key: getattr(parts[0], key) for key in ("fps", "encoder", "latent", "text", "arguments")}
    with ShardWriter(root / "all", max_samples=5, empty_prompt=parts[0].load_empty_prompt(), **about) as writer:
        for name, part in zip(SHAPES, parts, strict=True):
            for sample in read_samples(part):
                writer.write(replace(sample, key=f"{name}-{sample.key}"))
    return root / "all"


def config_of(tmp_path, shards, **changes):
    given = {"trainer__steps": 9, "trainer__checkpoint_every": 3, "data__batch_size": 2, "validation__every": 0}
    return run_config(tmp_path, data__shards=shards, data__synthetic_clips=0, **{**given, **changes})


def run(config):
    preflight(config)
    folder = RunFolder.create(config)
    train(config, folder)
    return folder.path


def test_each_step_has_one_shape_and_a_resumed_run_the_same_steps(tmp_path, shards):
    config = config_of(tmp_path, shards)
    whole = run(config)
    with (whole / "metrics.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["loss"]]
    lengths = [[frames for frames in (4, 8) if row[f"loss_frames/{frames}"]] for row in rows]
    assert len(rows) == 9 and all(len(one) == 1 for one in lengths) and [4] in lengths and [8] in lengths
    again = shutil.copytree(whole, tmp_path / "runs" / "shapes_4x" / "again")
    shutil.rmtree(again / "checkpoints" / "step-000009")
    resume(again, config)
    assert losses(again) == losses(whole)


def test_each_clip_has_the_noise_levels_of_its_own_size(tmp_path, shards):
    own = {"objective__shift": "null", "objective__shift_with_length": "true", "attention__dense_steps": 9}
    config = config_of(tmp_path, shards, **own, model__steps=20)
    manifest = Manifest.load(shards)
    module = build_module(config, load_adapter(config.model, torch.float32, 0), manifest)
    sides = set()
    for step, sample in enumerate(read_samples(manifest)):
        module.training_step(collate([sample], step), 0)
        frames, height, width = sample.latent.shape[1:]
        levels = clip_recipe(config, ClipConfig(frames, height, width))
        assert levels.schedule.shift == pytest.approx(3 * (frames / 16) ** 0.5)
        draw = StepDraw.of(config.seed, step, levels.schedule, levels.attention.dense_sigma)
        assert [seen.sigma for seen in module.seen][-1] == pytest.approx(
            draw.sigma(config.seed, step, sample.key, levels.schedule), abs=1e-6
        )
        assert module.current_attention.all_dense == draw.dense
        sides.add((frames, draw.dense))
    assert sides == {(frames, dense) for frames in (4, 8) for dense in (True, False)}


def test_the_clip_is_the_largest_of_them(tmp_path, shards):
    with pytest.raises(
        UserError, match=r"has latents of .*\(8, 32, 64\), but clip is \(4, 32, 64\), expected the larg"
    ):
        preflight(config_of(tmp_path, shards, clip__frames=4))
