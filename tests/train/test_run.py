"""Whole runs on real shards and a real checkpoint, cut down to seconds: training, freezing, resuming, logging."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from lightning.pytorch.callbacks import Callback

from data.errors import DataError
from data.shards.order import BatchOrder
from data.shards.stream import LatentStream
from launch import local
from tests.helpers.tiny import run_config, words
from tests.helpers.videos import frames_of
from train.__main__ import main
from train.assemble import build_module
from train.callbacks.progress import Progress
from train.config.compose import read_config
from train.errors import UserError
from train.models.loading import load_adapter
from train.preflight import preflight
from train.run import resume, train
from train.shards import training_shards
from train.storage.checkpoints import (
    FolderCheckpointIO,
    last_checkpoint,
    last_good_checkpoint,
    load_state,
    load_weights,
    remove_leftovers,
)
from train.storage.run_folder import RunFolder

# The run of tests/helpers/tiny.py: what the first steps gave when this was written (torch 2.13, x86-64)
GOLDEN = [1.90173, 2.10216, 1.99403, 1.97354]


def losses(folder: Path) -> dict[int, float]:
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(stream) if row["loss"]}


def run(config) -> Path:
    folder = RunFolder.create(config)
    train(config, folder)
    return folder.path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("run"))
    return config, run(config)


def test_a_run_leaves_everything_in_its_folder(finished):
    _, folder = finished
    for name in ("config.yaml", "metrics.csv", "loss.png", "mask.png", "checkpoints/step-000004/weights.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    for name in ("peft/adapter_model", "diffusers/pytorch_lora_weights", "comfyui/shapes_4x", "kohya/shapes_4x"):
        assert (folder / "export" / f"{name}.safetensors").is_file()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert read_config(folder).trainer.steps == 4
    assert "<div>state<b>done</b>" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_manual_names_all_that_lies_in_a_run_s_folder(finished):
    manual = (Path(__file__).parents[2] / "train" / "README.md").read_text(encoding="utf-8")
    table = manual[manual.index("## The run folder") : manual.index("## Resuming")]
    named = {name.strip("/").removesuffix("/step-*") for name in re.findall(r"`([\w./*-]+)`", table)}
    assert {path.name for path in finished[1].iterdir() if not path.name.startswith(".")} <= named


def test_the_loss_curve_is_the_golden_one(finished):
    _, folder = finished
    assert list(losses(folder).values()) == pytest.approx(GOLDEN, rel=2e-3)


def test_a_checkpoint_holds_the_lora_alone(finished):
    _, folder = finished
    weights = load_weights(last_checkpoint(folder))
    assert len(weights) == 2 * 4 * 3
    assert all(".attn1." in name and ".lora_" in name and t.dtype == torch.float32 for name, t in weights.items())
    state = load_state(last_checkpoint(folder))
    assert state["position"] == 4
    moments = [t for entry in state["optimizer_states"][0]["state"].values() for t in entry.values()]
    assert sum(t.numel() for t in moments if t.dim()) == 2 * sum(t.numel() for t in weights.values())


def test_frozen_weights_are_bit_identical_after_training(tmp_path):
    config = run_config(tmp_path, optim__lr=1e-2)
    before = WanTransformer3DModel.from_pretrained(config.model.path).state_dict()
    kept = {}

    class Keep(Callback):
        def on_train_end(self, trainer, module):
            kept.update({k: v.clone() for k, v in module.transformer.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.assemble.Progress", lambda figures: Keep())
        run(config)
    frozen = {name.replace(".base_layer", ""): t for name, t in kept.items() if "lora_" not in name}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], before[name]) for name in before)
    assert any(t.abs().max() > 0 for name, t in kept.items() if "lora_B" in name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact(tmp_path, accumulate):
    """Interrupted after 2 of 4 steps and resumed: losses, weights and optimizer state bit for bit."""
    config = run_config(tmp_path, optim__accumulate=accumulate, attention__dense_sigma=0.8, data__workers=1)
    whole = run(config)
    folder = RunFolder.create(config)
    shutil.copytree(whole / "checkpoints" / "step-000002", folder.path / "checkpoints" / "step-000002")
    shutil.copy(whole / "metrics.csv", folder.path / "metrics.csv")
    resume(folder.path, config)
    assert losses(folder.path) == losses(whole)
    for load in (load_weights, lambda path: load_state(path)["optimizer_states"][0]["state"]):
        a, b = (load(path / "checkpoints" / "step-000004") for path in (whole, folder.path))
        assert a.keys() == b.keys()
        for key in a:
            left, right = (x[key] if isinstance(x[key], dict) else {"": x[key]} for x in (a, b))
            assert left.keys() == right.keys()
            assert all(torch.equal(left[part], right[part]) for part in left)
    for file in (folder.path / "checkpoints" / "step-000002").iterdir():
        assert file.read_bytes() == (whole / "checkpoints" / "step-000002" / file.name).read_bytes()


def test_resume_of_a_finished_run_only_reports_and_exports(finished):
    config, folder = finished
    before = losses(folder)
    shutil.rmtree(folder / "export")
    resume(folder, config)
    assert losses(folder) == before
    assert (folder / "export" / "comfyui").is_dir()


def test_the_result_does_not_depend_on_loader_workers(finished, tmp_path):
    config, folder = finished
    other = run(replace(config, runs=str(tmp_path), data=replace(config.data, workers=2)))
    assert losses(other) == losses(folder)


def test_the_line_of_progress(capsys):
    figures = SimpleNamespace(row={})
    progress = Progress(figures)
    trainer = SimpleNamespace(global_step=0, max_steps=300, is_global_zero=True)
    progress.on_train_start(trainer, None)
    pace = {"step_seconds": 12.3, "tokens_per_second": 23700.0, "mfu": 0.41, "memory_gib": 68.0, "hours_left": 8.1}
    for step in range(1, 301):
        figures.row = {"loss": math.nan if step == 2 else 2.0 - step / 300, **(pace if step == 1 else {})}
        figures.row["skipped"] = float(step >= 2)
        trainer.global_step = step
        progress.on_train_batch_end(trainer, None)
        progress.on_train_batch_end(trainer, None)  # a micro-batch
    told = capsys.readouterr().out.splitlines()  # no terminal: the first step, the last, and one each half minute
    assert told[0] == (
        "step 1/300  loss 1.9967 (1.9967 steady)  12.30 s/step  23.7k tokens/s  MFU 41%  68.0 GiB  8.1 h left"
    )
    assert told[-1].startswith("step 300/300  loss 1.0000 (1.0300 falling)  12.30 s/step")
    assert told[-1].endswith("8.1 h left  1 skipped") and len(told) == 2


def test_the_line_of_progress_fits_the_terminal(capsys, monkeypatch):
    progress = Progress(SimpleNamespace(row={}))
    trainer = SimpleNamespace(global_step=119, max_steps=2500, is_global_zero=True)
    progress.on_train_start(trainer, None)
    pace = {"step_seconds": 12.3, "tokens_per_second": 23700.0, "mfu": 0.41, "memory_gib": 68.0, "hours_left": 8.1}
    progress.figures.row = {"loss": 2.0, **pace}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for columns in (200, 80, 60, 20):
        monkeypatch.setattr("shutil.get_terminal_size", lambda *_, size=columns: os.terminal_size((size, 24)))
        trainer.global_step += 1
        progress.on_train_batch_end(trainer, None)
    assert capsys.readouterr().out.split("\r\x1b[K")[1:] == [
        "step 120/2500  loss 2.0000 (2.0000 steady)  12.30 s/step  23.7k tokens/s  MFU 41%  68.0 GiB  8.1 h left",
        "step 121/2500  loss 2.0000 (2.0000 steady)  12.30 s/step  MFU 41%  8.1 h left",
        "step 122/2500  loss 2.0000 (2.0000 steady)  8.1 h left",
        "step 123/2500",
    ]


def test_the_log_tells_how_the_run_ended_and_no_small_talk(finished):
    _, folder = finished
    text = (folder / "log.txt").read_text(encoding="utf-8")
    assert "train.storage.run_folder: the run is done" in text and " INFO lightning" not in text


def test_accumulation_equals_a_larger_batch(tmp_path):
    """Two micro-batches of one clip step like one batch of the same two clips."""
    small = run_config(tmp_path, optim__accumulate=2, trainer__steps=1, optim__clip=1e9)
    module = build_module(small, load_adapter(small.model, torch.float32, small.seed), training_shards(small))
    manifest = training_shards(small)
    order = BatchOrder(manifest.shapes(), seed=0, global_batch=1, shuffle_window=small.data.shuffle_window)
    batches = list(LatentStream(manifest, order, num_steps=2))
    module.log = lambda *a, **k: None
    for batch in batches:
        module.training_step(batch, 0).backward()
    gradients = [p.grad / 2 for p in module.transformer.parameters() if p.grad is not None]
    run(small)
    folder = last_checkpoint(next((tmp_path / "runs" / "shapes_4x").iterdir()))
    state = load_state(folder)["optimizer_states"][0]["state"]
    first = [state[index]["exp_avg"] for index in sorted(state)]
    for moment, gradient in zip(first, gradients, strict=True):
        torch.testing.assert_close(moment, 0.1 * gradient, rtol=1e-4, atol=1e-7)


def test_wandb_works_offline(tmp_path):
    command = [sys.executable, "-m", "train", *words(tmp_path, log__wandb="offline", trainer__steps=2)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    folder = next((tmp_path / "runs" / "shapes_4x").iterdir())
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert "1,024 tokens" in plan["table"]
    assert (plan["memory_gib"] is None) == (not torch.cuda.is_available())


def samples_after(step: int) -> dict[str, object]:
    """Settings that generate clips of three prompts after the last step: two ranks cannot split them evenly."""
    return {
        "trainer__steps": step,
        "validation__samples_every": step,
        "validation__samples_steps": 2,
        "validation__prompts": "['a red ball, moving', 'the bar', 'a disc']",
    }


def same_samples(one: Path, two: Path) -> None:
    files = sorted((one / "samples").rglob("*.mp4"))
    assert len(files) == 3
    assert sorted((two / "samples").rglob("*.mp4")) == [two / file.relative_to(one) for file in files]
    for file in files:
        first, second = frames_of(file).astype(int), frames_of(two / file.relative_to(one)).astype(int)
        assert abs(first - second).mean() < 0.5 < first.std()


def test_two_processes_train_like_one(tmp_path):
    """DDP over gloo with one clip each equals one process with both clips: the same steps, weights and samples."""
    results = []
    for name, change in (("one", {"data__batch_size": 2}), ("two", {"trainer__devices": 2})):
        change |= samples_after(2)
        command = words(tmp_path, runs=tmp_path / name, **change)
        done = subprocess.run([sys.executable, "-m", "train", *command], capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        folders = list((tmp_path / name / "shapes_4x").iterdir())
        assert len(folders) == 1
        state = load_state(last_checkpoint(folders[0]))["optimizer_states"][0]["state"]
        results.append((losses(folders[0]), {index: entry["exp_avg"] for index, entry in state.items()}))
    (one_loss, one), (two_loss, two) = results
    assert one_loss == pytest.approx(two_loss, rel=1e-5)
    same_samples(*(next((tmp_path / name / "shapes_4x").iterdir()) for name in ("one", "two")))
    for index in one:  # the first moment, linear in the gradients: Adam's steps would hide a wrong scale
        torch.testing.assert_close(one[index], two[index], rtol=1e-3, atol=1e-3 * one[index].abs().max().item())


@pytest.mark.slow
def test_two_processes_that_share_each_clip_train_like_one(tmp_path):
    """Sequence parallelism with a token count that two ranks cannot split evenly; the report runs in the group."""
    odd = {"clip__frames": 5, "clip__height": 20, "clip__width": 20, "attention__block": 16, **samples_after(3)}
    assert run_config(tmp_path, **odd).grid().tokens == 125
    one = run(run_config(tmp_path, **odd))
    shared = {**odd, "trainer__devices": 2, "parallel__sequence": 2, "runs": tmp_path / "two"}
    shared |= {"report__clips": 32, "report__short_frames": 0, "parallel__activations": "auto"}
    done = subprocess.run(
        [sys.executable, "-m", "train", *words(tmp_path, **shared)], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out clips") == 1
    (two,) = (tmp_path / "two" / "shapes_4x").iterdir()
    assert (two / "report.json").exists()
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    same_samples(one, two)
    first, second = (load_state(last_checkpoint(folder))["optimizer_states"][0]["state"] for folder in (one, two))
    for index in first:
        expected, got = first[index]["exp_avg"], second[index]["exp_avg"]
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_failing_write_leaves_the_last_checkpoint(finished, tmp_path, monkeypatch):
    _, folder = finished
    checkpoint = FolderCheckpointIO().load_checkpoint(last_checkpoint(folder))
    good = tmp_path / "step-000004"
    FolderCheckpointIO().save_checkpoint(checkpoint, good)
    before = {p.name: p.read_bytes() for p in good.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.storage.checkpoints.save_file", full)
    plugin = FolderCheckpointIO()
    plugin.save_checkpoint(checkpoint, good)
    assert plugin.problem == f"{good} could not be written: [Errno 28] No space left on device"
    assert {p.name: p.read_bytes() for p in good.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["step-000004"]


def test_a_checkpoint_that_was_being_replaced_is_put_back(finished, tmp_path):
    """Killed between the two renames of writing a step again."""
    _, folder = finished
    saved = shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    (saved / "step-000004").rename(saved / ".step-000004.0a1b2c3d.old")
    for name in (".step-000002.0a1b2c3d.old", ".step-000004.0a1b2c3d.tmp", "step-000002.bak"):
        shutil.copytree(saved / "step-000002", saved / name)
    remove_leftovers(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["step-000002", "step-000002.bak", "step-000004"]
    assert last_good_checkpoint(tmp_path) == (saved / "step-000004", [])


@pytest.mark.slow
def test_torchrun_trains_in_one_folder(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    command = [*torchrun, "-m", "train", *words(tmp_path, trainer__devices=2)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "shapes_4x").iterdir()
    assert len(losses(folder)) == 4


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_run_goes_on_from_before_a_truncated_checkpoint_and_names_it(finished, tmp_path, name, capsys):
    config, folder = finished
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = broken / "checkpoints" / "step-000004" / name
    file.write_bytes(file.read_bytes()[:50])
    resume(broken, config)
    said = capsys.readouterr().out
    assert f"warning: {file} is no readable part" in said and "going on from step-000002" in said
    assert losses(broken) == losses(folder)
    for step in (broken / "checkpoints").iterdir():
        (step / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"step-000004/{name} is no readable .*step-000002/{name} is no readable"):
        resume(broken, config)


def test_a_checkpoint_of_another_rank_is_refused(finished, tmp_path):
    config, folder = finished
    assert config.lora is not None
    other = replace(config, lora=replace(config.lora, rank=8), trainer=replace(config.trainer, steps=6))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with pytest.raises(UserError, match=r"has shape .* expected .*: check lora.rank"):
        resume(copy, other)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lora.rank=8", "check lora.rank"),
        ("lora.targets=.*to_q", "8 unknown tensors"),
        ("lora.dora=true", "missing and 0 unknown tensors .* or with other lora.targets, lora.text or lora.dora"),
    ],
)
def test_a_refused_setting_of_a_resume_changes_nothing(finished, tmp_path, setting, said):
    _, folder = finished
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = (copy / "config.yaml").read_text(encoding="utf-8")
    for command in (main, local.main):
        with pytest.raises(UserError, match=said):
            command([f"resume={copy}", setting, "trainer.keep=7", "override=true"])
        assert (copy / "config.yaml").read_text(encoding="utf-8") == before


def test_resume_of_no_run_is_one_line():
    done = subprocess.run([sys.executable, "-m", "train", "resume=/nowhere"], capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert done.stderr.startswith("error: /nowhere has no config.yaml")
    assert done.stderr.count("\n") == 1


def test_shards_of_another_size_are_refused(finished):
    config, _ = finished
    shards = training_shards(config).folder
    wrong = replace(config, data=replace(config.data, shards=str(shards)), clip=replace(config.clip, frames=16))
    with pytest.raises(UserError, match=r"has latents of .*\(8, 32, 64\), but clip is \(16, 32, 64\)"):
        run(wrong)
    # held-out clips too, before anything is loaded
    synthetic = replace(config, clip=replace(config.clip, frames=16))
    for changed, held_out, message in (
        (synthetic, str(shards), r"validation.shards: .* has latents of .*\(8, 32, 64\), but clip is \(16, 32, 64\)"),
        (config, str(shards.parent / "nowhere"), "nowhere"),
        (replace(config, data=replace(config.data, shards=str(shards))), None, "validation.shards is not set: give"),
    ):
        with pytest.raises((UserError, DataError), match=message):
            preflight(replace(changed, validation=replace(config.validation, every=2, shards=held_out)))


def test_shards_of_another_encoder_are_refused(finished, tmp_path):
    config, _ = finished
    shards = shutil.copytree(training_shards(config).folder, tmp_path / "shards")
    manifest = shards / "manifest.json"
    manifest.write_text(
        manifest.read_text(encoding="utf-8").replace("pixels-v1+tiny-text", "wan:vae-12+text"), encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"was made with wan:vae-12\+text-\S+, expected pixels-v1\+tiny-text-"):
        preflight(replace(config, data=replace(config.data, shards=str(shards))))
