"""The moving average of the LoRA: its values, what uses it, and runs that go on with it."""

import shutil
from dataclasses import replace

import pytest
import torch

from tests.helpers import HELPERS
from tests.helpers.faults import Run, equal_checkpoints, losses, only_run, run
from tests.helpers.tiny import run_config, words
from train.export.run import export_run
from train.loggers.csv_file import read_metrics
from train.lora.reading import read_lora
from train.models.loading import load_adapter
from train.run import resume
from train.storage.checkpoints import load_state, load_weights
from train.storage.run_folder import get_state

DECAY = 0.4
CHANGES = {"trainer__steps": 4, "trainer__checkpoint_every": 1, "trainer__keep": 9, "optim__lr": 2e-2,
           "optim__warmup": 0, "data__batch_size": 2, "validation__every": 4, "validation__clips": 2}  # fmt: skip


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run of four steps with an average, every step kept."""
    config = run_config(tmp_path_factory.mktemp("averaged"), **CHANGES, optim__ema=DECAY)
    return config, run(config)


@pytest.fixture(scope="module")
def plain(averaged, tmp_path_factory):
    """The same run without an average."""
    config, _ = averaged
    runs = str(tmp_path_factory.mktemp("plain"))
    return run(replace(config, runs=runs, optim=replace(config.optim, ema=None)))


def checkpoint(folder, step):
    return folder / "checkpoints" / f"step-{step:06d}"


def test_it_is_the_recurrence_over_the_weights_of_every_step(averaged, plain):
    """In float64, from the weights of a run without it: after step 1 the start still counts 2 in 11."""
    _, folder = averaged
    average = None
    for step in range(1, 5):
        weights = {name: tensor.double() for name, tensor in load_weights(checkpoint(plain, step)).items()}
        current = load_state(checkpoint(folder, step))["current_weights"]
        assert all(torch.equal(current[name].double(), weight) for name, weight in weights.items())
        got = load_weights(checkpoint(folder, step))
        if average is not None:
            decay = min(DECAY, (1 + step) / (10 + step))
            average = {name: decay * average[name] + (1 - decay) * weight for name, weight in weights.items()}
            assert got.keys() == average.keys()
            for name, expected in average.items():
                assert got[name].dtype == torch.float32
                torch.testing.assert_close(got[name].double(), expected, rtol=1e-5, atol=1e-7)
        else:  # B starts at zero
            for name, weight in weights.items():
                if ".lora_B." in name:
                    torch.testing.assert_close(got[name].double(), 9 / 11 * weight, rtol=1e-5, atol=1e-7)
            average = {name: tensor.double() for name, tensor in got.items()}
    assert any((got[name] - current[name]).abs().max() > 1e-3 for name in got)


def test_training_is_the_same_with_it_and_without(averaged, plain):
    assert losses(averaged[1]) == losses(plain)


def test_a_resume_goes_on_exactly(averaged, tmp_path):
    config, whole = averaged
    folder = shutil.copytree(whole, tmp_path / "copy")
    for step in (3, 4):
        shutil.rmtree(checkpoint(folder, step))
    resume(folder, config)
    assert equal_checkpoints(checkpoint(folder, 4), checkpoint(whole, 4))
    figures = [read_metrics(path / "metrics.csv")[-1]["validation/loss"] for path in (folder, whole)]
    assert figures[0] == figures[1]


def test_without_it_a_resume_goes_on_from_the_weights(averaged, plain, tmp_path):
    config, whole = averaged
    folder = shutil.copytree(whole, tmp_path / "copy")
    for step in (3, 4):
        shutil.rmtree(checkpoint(folder, step))
    resume(folder, replace(config, optim=replace(config.optim, ema=None)))
    assert equal_checkpoints(checkpoint(folder, 4), checkpoint(plain, 4))


@pytest.mark.parametrize("was", ["averaged", "plain"])
def test_a_finished_run_reports_what_it_exports_whatever_a_resume_changes(averaged, plain, tmp_path, monkeypatch, was):
    config, whole = averaged
    folder = shutil.copytree({"averaged": whole, "plain": plain}[was], tmp_path / "copy")
    reported = {}
    monkeypatch.setattr("train.run.write_report", lambda _, module, *rest: reported.update(module.trained_weights()))
    resume(folder, replace(config, optim=replace(config.optim, ema=None if was == "averaged" else DECAY)))
    assert get_state(folder)[0] == "done"
    saved = load_weights(checkpoint(folder, 4))
    assert reported.keys() == saved.keys()
    assert all(torch.equal(reported[name], tensor) for name, tensor in saved.items())


def test_validation_and_exports_use_it(averaged, plain, tmp_path):
    """A run that starts from the export, and learns next to nothing, has the loss that the average was said to have."""
    config, folder = averaged
    export_run(folder, out=tmp_path / "export", formats=["peft"])
    lora = read_lora(tmp_path / "export" / "peft", load_adapter(config.model, torch.float32, 0).transformer)
    for name, (down, up) in lora.pairs.items():
        saved = load_weights(checkpoint(folder, 4))
        product = config.lora.alpha / config.lora.rank * saved[f"{name}.lora_B.weight"] @ saved[f"{name}.lora_A.weight"]
        torch.testing.assert_close(up @ down, product)
    start = replace(config.lora, init=str(tmp_path / "export" / "peft"))
    again = replace(config, runs=str(tmp_path), lora=start, optim=replace(config.optim, ema=None, lr=1e-12))
    steps = replace(again.trainer, steps=1)
    measured = run(replace(again, trainer=steps, validation=replace(again.validation, every=1)))
    loss, said, of_weights = (
        float(read_metrics(path / "metrics.csv")[-1]["validation/loss"]) for path in (measured, folder, plain)
    )
    assert said == pytest.approx(loss, rel=1e-5)
    assert said != pytest.approx(of_weights, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_it_is_the_same_under_every_strategy(averaged, tmp_path, strategy):
    config, whole = averaged
    given = {**CHANGES, "optim__ema": DECAY, "model__path": config.model.path, "data__batch_size": 1}
    layout = {"parallel__strategy": strategy, "trainer__devices": 2}
    process = Run(*words(tmp_path, **given, **layout), script=HELPERS / "zero_on_cpu.py")
    text = process.end()
    assert process.process.returncode == 0, text
    folder = only_run(tmp_path / "runs")
    for step in (1, 4):
        one, other = (load_weights(checkpoint(path, step)) for path in (folder, whole))
        for name, expected in other.items():
            torch.testing.assert_close(one[name], expected, rtol=1e-2, atol=1e-4)
    said, expected = (float(read_metrics(p / "metrics.csv")[-1]["validation/loss"]) for p in (folder, whole))
    assert said == pytest.approx(expected, rel=1e-3)
