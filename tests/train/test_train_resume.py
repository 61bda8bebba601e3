"""What a resume changes, it changes from its first step on, under every strategy; what it cannot change, it refuses."""

import shutil
from pathlib import Path

import pytest
import torch
from faults import Run, run
from tiny import run_config

from train.checkpoint import load_state, load_weights
from train.compose import change_config
from train.folder import write_config
from train.lora import inject_lora, lora_parameters
from train.metrics import read_metrics
from train.models import describe_model
from train.run import resume

ON_CPU = Path(__file__).parent / "zero_on_cpu.py"
CHANGES = {
    "adamw": {"optim.lr": "3e-3", "optim.weight_decay": "20", "optim.betas": "[0.5, 0.8]", "optim.warmup": "1"},
    "decay": {"optim.decay": "cosine", "optim.warmup": "0"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of two micro-batches a step, every step kept."""
    changes = {"trainer__steps": 4, "trainer__checkpoint_every": 1, "trainer__keep": 9}
    config = run_config(tmp_path_factory.mktemp("run"), **changes, optim__accumulate=2, data__batch_size=2)
    return config, run(config)


def copy_until(whole, step, runs):
    """A run folder like ``whole``, as it was after a step."""
    _, folder = whole
    path = Path(runs) / "copy"
    shutil.copytree(folder, path)
    for saved in (path / "checkpoints").glob("step-*"):
        if int(saved.name[5:]) > step:
            shutil.rmtree(saved)
    return path


def lr_factor(optim, step, steps):
    """README: a linear warm-up, then constant or a cosine to the last step."""
    if step < optim.warmup:
        return (step + 1) / (optim.warmup + 1)
    done = torch.tensor((step - optim.warmup) / max(1, steps - optim.warmup), dtype=torch.float64)
    return 1.0 if optim.decay == "constant" else float((1 + torch.cos(torch.pi * done)) / 2)


def in_order(config):
    """The trained parameters' names in the optimizer's order."""
    adapter = describe_model(config.model)
    inject_lora(adapter.transformer, config.lora.rank, config.lora.alpha, adapter.targets(text=False), 0)
    return list(lora_parameters(adapter.transformer))


def one_step(whole, config):
    """Weights that AdamW's definition makes of step 2's, with the gradient of the undisturbed run's third step."""
    _, folder = whole
    old, before, after = (folder / "checkpoints" / f"step-00000{step}" for step in (2, 2, 3))
    weights = load_weights(old)
    one, other = (load_state(path)["optimizer_states"][0] for path in (before, after))
    was = one["param_groups"][0]["betas"]
    optim, expected = config.optim, {}
    rate = optim.lr * lr_factor(optim, 2, config.trainer.steps)
    for number, name in enumerate(in_order(config)):
        weight, moments, later = weights[name], one["state"][number], other["state"][number]
        gradient = (later["exp_avg"] - was[0] * moments["exp_avg"]).double() / (1 - was[0])
        b1, b2 = optim.betas
        first = b1 * moments["exp_avg"].double() + (1 - b1) * gradient
        second = b2 * moments["exp_avg_sq"].double() + (1 - b2) * gradient.square()
        step = first / (1 - b1**3) / ((second / (1 - b2**3)).sqrt() + 1e-8)
        expected[name] = weight.double() * (1 - rate * optim.weight_decay) - rate * step
    return expected, rate


def check_first_step(whole, folder, config):
    expected, rate = one_step(whole, config)
    got, start = (load_weights(folder / "checkpoints" / f"step-00000{step}") for step in (3, 2))
    for name, weight in expected.items():
        moved = (weight - start[name].double()).abs().max()
        assert moved > 0
        assert (got[name].double() - weight).abs().max() < 2e-3 * moved, name
    row = read_metrics(folder / "metrics.csv")[2]
    assert float(row["lr"]) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_resume_changes_acts_from_its_first_step_on(whole, tmp_path, change):
    folder = copy_until(whole, 2, tmp_path)
    config = change_config(whole[0], {**CHANGES[change], "override": "true"})
    write_config(config, folder)
    resume(folder, config)
    check_first_step(whole, folder, config)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_so_it_does_under_every_strategy(whole, tmp_path, strategy):
    folder = copy_until(whole, 2, tmp_path)
    layout = {"parallel.strategy": strategy, "trainer.devices": "2", "data.batch_size": "1", "override": "true"}
    changes = {**CHANGES["adamw"], **layout}
    process = Run(f"resume={folder}", *(f"{key}={value}" for key, value in changes.items()), script=ON_CPU)
    text = process.end()
    assert process.process.returncode == 0, text
    check_first_step(whole, folder, change_config(whole[0], changes))


def test_a_row_has_the_learning_rate_of_its_own_step(whole):
    config, folder = whole
    rates = [float(row["lr"]) for row in read_metrics(folder / "metrics.csv")]
    assert rates == pytest.approx([config.optim.lr * (step + 1) / 6 for step in range(4)], rel=1e-12)
