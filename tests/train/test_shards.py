"""Several folders as the data of one run, clips cut when they are read, and a split by video."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.errors import DataError
from data.shards.manifest import Manifest
from data.shards.origins import key_of
from data.shards.stream import read_samples
from data.shards.writer import ShardWriter
from data.synth.clips import synthesize
from launch.mounts import folders_of
from tests.helpers.faults import losses
from tests.helpers.tiny import run_config
from train.errors import UserError
from train.preflight import preflight
from train.run import resume, train
from train.shards import training_shards, validation_shards
from train.storage.run_folder import RunFolder


def filmed(part: Manifest, folder: Path, clips: int) -> Path:
    """The clips as of videos, several of each."""
    about = {key: getattr(part, key) for key in ("fps", "encoder", "latent", "text", "arguments")}
    with ShardWriter(folder, max_samples=5, empty_prompt=part.load_empty_prompt(), **about) as writer:
        for number, sample in enumerate(read_samples(part)):
            row, clip = divmod(number, clips)
            meta = {**sample.meta, "source": f"{row}.mp4"}
            writer.write(replace(sample, key=key_of(row, clip), meta=meta))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    long = filmed(synthesize(root / "a-synth", 24, 8, seed=5), root / "a", 2)
    return long, filmed(synthesize(root / "b-synth", 6, 4, seed=6), root / "b", 3)


def config_of(tmp_path, places, **changes):
    given = {"trainer__steps": 6, "data__batch_size": 2, "validation__every": 0, "data__synthetic_clips": 0}
    return run_config(tmp_path, data__shards=f"[{', '.join(map(str, places))}]", **{**given, **changes})


def test_a_run_takes_several_folders(tmp_path, folders):
    config = config_of(tmp_path, folders, data__weights="[1, 2]")
    preflight(config)
    shards = training_shards(config)
    assert config.data.places == list(map(str, folders))
    assert Counter(shards.weights) == {1.0: 5, 2.0: 2} and len(shards.samples) == 30
    assert set(folders) <= set(folders_of(config)[0])
    assert training_shards(config_of(tmp_path, folders[:1])) == Manifest.load(folders[0])


def test_longer_shards_serve_shorter_runs(tmp_path, folders):
    config = config_of(tmp_path, folders, data__frames=4, clip__frames=4)
    preflight(config)
    shards = training_shards(config)
    assert {sample.shape[1] for sample in shards.samples} == {4}
    for stored, found in zip(read_samples(folders[0]), read_samples(shards, 24), strict=True):
        assert torch.equal(found.latent, stored.latent[:, :4])
    with pytest.raises(UserError, match="clip is"):
        preflight(config_of(tmp_path, folders, data__frames=4))


def test_no_video_is_on_both_sides(tmp_path, folders):
    config = config_of(tmp_path, folders, data__holdout=4, validation__every=2, validation__clips=4)
    preflight(config)
    held, kept = validation_shards(config), training_shards(config)
    sources = [{sample.meta["source"] for sample in read_samples(each)} for each in (held, kept)]
    assert not sources[0] & sources[1]
    assert {sample.shape[1] for sample in held.samples} == {8} and len(held.samples) >= 2
    assert len(held.samples) + len(kept.samples) <= 30
    for words, message in (
        ({"data__holdout": 20}, "20 samples cannot|10 samples cannot be held out"),
        ({"data__holdout": 4, "validation__shards": str(folders[1])}, "expected one of them"),
        ({"data__holdout": 4.5}, "expected a whole number of samples, or a share below 1"),
        ({"data__weights": "[1]"}, r"data\.weights has 1 numbers, expected one for each of 2 data\.shards"),
        ({"data__weights": "[1, 0]"}, "numbers above 0"),
    ):
        with pytest.raises((UserError, DataError), match=message):
            training_shards(config_of(tmp_path, folders, **words))
    with pytest.raises(UserError, match=r"data\.frames is 4, but data\.shards is not set"):
        run_config(tmp_path, data__frames=4)


@pytest.mark.slow
def test_a_mixture_goes_on_exactly(tmp_path, folders):
    changes = {"data__weights": "[1, 0.5]", "data__holdout": 4, "validation__every": 3, "validation__clips": 2}
    config = config_of(tmp_path, folders, trainer__checkpoint_every=2, trainer__keep=9, **changes)
    preflight(config)
    folder = RunFolder.create(config)
    train(config, folder)
    copy = tmp_path / "copy"
    shutil.copytree(folder.path, copy)
    for saved in (copy / "checkpoints").glob("step-*"):
        if int(saved.name[5:]) > 2:
            shutil.rmtree(saved)
    resume(copy, config)
    assert losses(copy) == losses(folder.path) and len(losses(copy)) == 6
