"""What goes wrong in a day of training, done for real: the run says it, and goes on or resumes with nothing lost."""

import errno
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import Callback

from data.errors import DataError
from data.shards.manifest import Manifest
from tests.helpers.faults import (
    Run,
    at_step,
    damage,
    equal_checkpoints,
    fill,
    losses,
    only_run,
    poisoned,
    run,
    save_by_the_clock,
    small_disk,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import run_config, words
from train.__main__ import main
from train.callbacks.checkpoints import StepCheckpoints, best_checkpoint
from train.callbacks.throughput import Throughput
from train.config.changes import change_config
from train.errors import UserError
from train.loggers.csv_file import read_metrics
from train.parallel.control_group import ControlGroup
from train.run import resume
from train.shards import training_shards
from train.storage.checkpoints import checkpoints_of, load_state, load_weights
from train.storage.run_folder import get_state, held


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run of 6 steps, a checkpoint at every second."""
    config = run_config(tmp_path_factory.mktemp("run"), trainer__steps=6)
    return config, run(config)


# ---- the disk


def test_a_full_disk_costs_a_checkpoint_and_no_step(tmp_path, monkeypatch, capsys):
    """A tmpfs without a free byte from step 1 to the middle of step 5: the checkpoints of steps 2 and 4 do not fit,
    and there is room again when half a step's gradient is there, from where none could go on."""
    config = run_config(tmp_path, trainer__steps=6, optim__accumulate=2)
    whole = run(config)
    shutil.copytree(Path(config.runs) / "synthetic", tmp_path / "synthetic")
    with small_disk(tmp_path / "disk", 24) as _:
        (tmp_path / "disk" / "runs").mkdir()
        (tmp_path / "disk" / "runs" / "synthetic").symlink_to(tmp_path / "synthetic")
        config = replace(config, runs=str(tmp_path / "disk" / "runs"))

        class Fault(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, *_):
                if batch.step == 1:
                    fill(tmp_path / "disk")
                if batch.step == 8:
                    (tmp_path / "disk" / "filler").unlink()

        folder = run(config, Fault())
        said = capsys.readouterr().out
        assert said.count("metrics.csv does not take the figures") == 1
        assert [said.count(f"step-{step:06d} could not be written") for step in (2, 4)] == [1, 1]
        assert "No space left on device" in said and "Training goes on and tries again in 2 steps or 10 minutes" in said
        assert losses(folder) == losses(whole)
        assert [path.name for path in checkpoints_of(folder / "checkpoints")] == ["step-000006"]
        assert not list((folder / "checkpoints").glob(".*"))
        assert equal_checkpoints(folder / "checkpoints" / "step-000006", whole / "checkpoints" / "step-000006")


def test_a_disk_that_stays_full_keeps_the_last_checkpoint_and_says_so(finished, tmp_path, monkeypatch):
    config, whole = finished
    shutil.copytree(Path(config.runs) / "synthetic", tmp_path / "synthetic")
    with small_disk(tmp_path / "disk", 24) as _:
        (tmp_path / "disk" / "runs").mkdir()
        (tmp_path / "disk" / "runs" / "synthetic").symlink_to(tmp_path / "synthetic")
        config = replace(config, runs=str(tmp_path / "disk" / "runs"))
        with pytest.raises(UserError, match=r"step-000006 could not be written: .*No space left.*Make room and resume"):
            run(config, at_step(3, lambda: fill(tmp_path / "disk")))
        folder = only_run(tmp_path / "disk" / "runs")
        assert [path.name for path in checkpoints_of(folder / "checkpoints")] == ["step-000002"]
        with pytest.raises(UserError, match=r"No space left on device.*make room"):
            resume(folder, config)
        assert get_state(folder)[0] == "failed"
        (tmp_path / "disk" / "filler").unlink()
        resume(folder, config)
        assert losses(folder) == losses(whole)


def test_a_folder_that_cannot_be_written_is_named(finished, tmp_path):
    _, whole = finished
    with small_disk(tmp_path / "disk", 24) as remount:
        folder = shutil.copytree(whole, tmp_path / "disk" / "run")
        remount("ro")
        done = subprocess.run(
            [sys.executable, "-m", "train", f"resume={folder}"], capture_output=True, encoding="utf-8"
        )
        remount("rw")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {folder} cannot be written (Read-only file system): make it writable, or copy it elsewhere and resume "
        "the copy\n"
    )


def test_a_second_run_in_the_same_folder_is_refused(finished):
    _, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name not in (".lock",)}
    with held(folder):
        done = subprocess.run(
            [sys.executable, "-m", "train", f"resume={folder}"], capture_output=True, encoding="utf-8"
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder} is in use by process {os.getpid()} on ")
    assert done.stderr.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name not in (".lock",)}


def test_ranks_save_by_the_clock_of_the_first_and_from_one_step(tmp_path):
    for saved, refused in run_ranks(2, save_by_the_clock, tmp_path):
        assert saved == [3, 5, 6]
        assert refused.startswith(
            "the ranks go on from different checkpoints: rank 0 after step 0, rank 1 after step 1."
        )


def test_the_best_checkpoint_is_one_whose_loss_is_a_number(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    figures = SimpleNamespace(row={})
    saves = StepCheckpoints(tmp_path, 1, 0, 1, ControlGroup(), figures, Throughput())
    trainer = SimpleNamespace(print=print, callbacks=[], strategy=SimpleNamespace(remove_checkpoint=shutil.rmtree))
    found = []
    for step, loss in enumerate((math.nan, 2.0, 1.0, 3.0)):
        figures.row = {"validation/loss": loss}
        newest = tmp_path / f"step-{step:06d}"
        newest.mkdir()
        with monkeypatch.context() as patch:
            if step == 2:
                patch.setattr("train.callbacks.checkpoints.write_utf8", full)
            saves.tidy(trainer, newest)
        found.append(best_checkpoint(tmp_path))
    assert found == [None, *[(tmp_path / "step-000001", 2.0)] * 3]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000001", "step-000003"]
    assert "step-000002 is the best, but best.json could not be written" in capsys.readouterr().out
    # a loss at other noise levels is no smaller or larger than these
    figures.row = {"validation/loss": 9.0, "validation/8_frames/sigma_0.9": 9.0}
    (tmp_path / "step-000004").mkdir()
    saves.tidy(trainer, tmp_path / "step-000004")
    assert best_checkpoint(tmp_path) == (tmp_path / "step-000004", 9.0)


# ---- numbers that are not finite


def test_what_is_kept_is_never_only_damaged(tmp_path):
    """A run that went back to step 200, past a damaged checkpoint of step 300, keeps its newest one."""
    for step in (200, 250, 300):
        (tmp_path / f"step-{step:06d}").mkdir()
    removed = []
    trainer = SimpleNamespace(strategy=SimpleNamespace(remove_checkpoint=lambda path: removed.append(path.name)))
    checkpoints = StepCheckpoints(tmp_path, 50, 0, 1, ControlGroup(), SimpleNamespace(row={}), Throughput())
    checkpoints.tidy(trainer, tmp_path / "step-000250")
    assert removed == ["step-000200"]


def test_a_step_that_is_not_finite_changes_nothing_and_names_its_sample(tmp_path, capsys):
    config = poisoned(
        run_config(tmp_path, trainer__steps=12, trainer__checkpoint_every=1, trainer__keep=20), tmp_path, 5
    )
    folder = run(config)
    said = capsys.readouterr().out
    assert re.search(r"the loss of sample clip-000005 is (inf|nan); skipped \(1 of at most 20\)", said)
    (bad,) = [step for step, loss in losses(folder) if not math.isfinite(float(loss))]
    before, after = (load_weights(folder / "checkpoints" / f"step-{step:06d}") for step in (bad, bad + 1))
    assert all(torch.equal(before[key], after[key]) for key in before)
    one, other = (load_state(folder / "checkpoints" / f"step-{s:06d}")["optimizer_states"][0] for s in (bad, bad + 1))
    assert all(
        torch.equal(one["state"][n][key], other["state"][n][key]) for n in one["state"] for key in one["state"][n]
    )
    last = load_weights(folder / "checkpoints" / "step-000012")
    assert all(torch.isfinite(tensor).all() for tensor in last.values())
    assert not all(torch.equal(after[key], last[key]) for key in last)
    # what was skipped is counted on after a resume
    shutil.rmtree(folder / "checkpoints" / "step-000012")
    resume(folder, config)
    skipped = [float(row["skipped"]) for row in read_metrics(folder / "metrics.csv")]
    assert skipped == [float(step >= bad) for step in range(12)]


def test_too_many_steps_that_are_not_finite_end_the_run(tmp_path):
    config = poisoned(run_config(tmp_path, trainer__steps=12, trainer__max_skipped=0), tmp_path, 5)
    with pytest.raises(
        UserError, match=r"was the 1st whose .* trainer.max_skipped=0; the last: the loss of sample clip-0"
    ):
        run(config)
    folder = only_run(tmp_path / "runs")
    assert get_state(folder)[0] == "failed"


@pytest.mark.slow
def test_all_ranks_skip_what_one_finds(tmp_path):
    config = run_config(tmp_path)
    shards = poisoned(config, tmp_path, 5).data.shards
    given = {"trainer__devices": 2, "trainer__steps": 6, "data__shards": shards, "data__synthetic_clips": 0}
    text = Run(*words(tmp_path, **given)).end()
    folder = only_run(tmp_path / "runs")
    assert len(re.findall(r"the loss of sample clip-000005 is (?:inf|nan); skipped \(1 of at most", text)) == 1, text
    values = [float(loss) for _, loss in losses(folder)]
    assert len(values) == 6 and sum(not math.isfinite(value) for value in values) == 1


# ---- data


def test_a_shard_that_is_damaged_while_it_is_read(tmp_path, capsys):
    config = run_config(tmp_path, trainer__steps=12, data__workers=1)
    shards = training_shards(config).folder
    copy = shutil.copytree(shards, tmp_path / "shards")
    key = damage(copy, 7)
    config = replace(config, data=replace(config.data, shards=str(copy), synthetic_clips=0))
    folder = run(config)
    assert len(losses(folder)) == 12
    log = (folder / "log.txt").read_text(encoding="utf-8")
    assert log.count(f"sample {key}: no entry of a tar") == 1 and "; skipped" in log
    strict = replace(config, data=replace(config.data, max_bad=0))
    with pytest.raises(DataError) as error:
        run(strict)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("at most 0 are skipped; python -m data.check lists them all)")


# ---- Weights & Biases


@pytest.fixture
def unreachable(monkeypatch):
    wandb.teardown()  # its service keeps the environment of the process's first run
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("train.loggers.services.PATIENCE", 3)
    yield
    wandb.teardown()


def test_without_a_connection_weights_and_biases_is_logged_offline(finished, tmp_path, unreachable, capsys):
    _, whole = finished
    folder = run(run_config(tmp_path, trainer__steps=6, log__wandb="online"))
    said = capsys.readouterr().out
    assert said.count("warning: Weights & Biases does not answer") == 1 and "wandb sync" in said
    assert losses(folder) == losses(whole)
    number = (folder / "wandb_id").read_text(encoding="utf-8").strip()
    assert list(folder.glob(f"wandb/offline-run-*-{number}/*.wandb"))


def test_a_resumed_run_goes_on_in_the_same_run_of_weights_and_biases(tmp_path):
    config = run_config(tmp_path, log__wandb="offline", trainer__steps=4)
    folder = run(config)
    number = (folder / "wandb_id").read_text(encoding="utf-8")
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    resume(folder, config)
    assert (folder / "wandb_id").read_text(encoding="utf-8") == number
    assert len(list(folder.glob(f"wandb/offline-run-*-{number.strip()}"))) == 2


def test_the_death_of_weights_and_biases_is_told_and_survived(finished, tmp_path, monkeypatch, capsys):
    _, whole = finished
    killed = []

    def kill():
        service = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
        killed.extend(child.pid for child in service)
        for child in service:
            child.kill()
            child.wait()

    folder = run(run_config(tmp_path, trainer__steps=6, log__wandb="offline"), at_step(2, kill))
    said = capsys.readouterr().out
    assert killed
    assert said.count("warning: Weights & Biases does not take the figures") == 1
    assert losses(folder) == losses(whole)


# ---- other people's files


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_with_a_pickle_is_refused_and_nothing_of_it_runs(finished, tmp_path, name):
    config, whole = finished
    folder = shutil.copytree(whole, tmp_path / "run")
    for step in checkpoints_of(folder / "checkpoints"):
        (step / name).write_bytes(pickle.dumps(Evil(tmp_path / "written")))
    with pytest.raises(UserError, match=f"{name} is no readable part of a checkpoint"):
        resume(folder, config)
    assert not (tmp_path / "written").exists()


def test_a_tar_that_points_outside_of_its_folder_writes_nothing(tmp_path):
    config = run_config(tmp_path)
    shards = shutil.copytree(training_shards(config).folder, tmp_path / "shards" / "inner")
    tar = shards / Manifest.load(shards).shards[0].file
    with tarfile.open(tar) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive.getmembers()]
    key = members[0][0].name.split(".")[0]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member, content in members:
            if member.name.startswith(key):
                member.name = member.name.replace(key, "../" + key[3:], 1)
            archive.addfile(member, __import__("io").BytesIO(content))
    outside = set((tmp_path / "shards").iterdir()) | set(tmp_path.iterdir())
    config = replace(config, trainer=replace(config.trainer, steps=12))
    run(replace(config, data=replace(config.data, shards=str(shards), synthetic_clips=0)))
    assert set((tmp_path / "shards").iterdir()) | set(tmp_path.iterdir()) == outside


def test_a_changed_setting_is_shown_and_wants_a_word(finished, capsys):
    config, folder = finished
    before = (folder / "config.yaml").read_text(encoding="utf-8")
    main([f"resume={folder}", "--cfg", "job", "trainer.steps=9", "override=true"])
    assert "\n  steps: 9\n" in capsys.readouterr().out
    assert (folder / "config.yaml").read_text(encoding="utf-8") == before
    done = subprocess.run(
        [sys.executable, "-m", "train", f"resume={folder}", "optim.lr=1e-5", "trainer.keep=5"],
        capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "error: optim.lr was 0.002, now 1e-05: this changes what the run computes. Add override=true to go on with it, "
        "or start a new run\n"
    )
    assert change_config(config, {"optim.lr": "1e-5"}, override=True).optim.lr == 1e-5
    assert json.dumps(config.optim.lr) == "0.002"
