"""What a resume changes, it changes from its first step on, under every strategy; what it cannot change, it refuses."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from data.shards.order import BatchOrder
from tests.helpers import HELPERS
from tests.helpers.faults import Run, equal_checkpoints, losses, run
from tests.helpers.tiny import run_config
from train.__main__ import main
from train.assemble import loader
from train.config.changes import change_config
from train.config.compose import read_config
from train.config.global_batch import clips_a_step
from train.errors import UserError
from train.loggers.csv_file import read_metrics
from train.lora.layers import inject_lora, lora_parameters
from train.models.loading import describe_model
from train.planning import Budget, plan_table
from train.run import resume
from train.shards import training_shards
from train.step.module import LengthExtensionModule
from train.storage.checkpoints import load_state, load_weights
from train.storage.run_folder import get_state, write_config
from train.storage.stored_plan import stored_plan

ON_CPU = HELPERS / "zero_on_cpu.py"
CHANGES = {
    "adamw": {"optim.lr": "3e-3", "optim.weight_decay": "20", "optim.betas": "[0.5, 0.8]", "optim.warmup": "1"},
    "decay": {"optim.decay": "constant", "optim.warmup": "0"},
    "lora_plus": {"optim.lora_plus": "16", "optim.weight_decay": "1"},
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
    lr = optim.lr * lr_factor(optim, 2, config.trainer.steps)
    for number, name in enumerate(in_order(config)):
        weight, moments, later = weights[name], one["state"][number], other["state"][number]
        gradient = (later["exp_avg"] - was[0] * moments["exp_avg"]).double() / (1 - was[0])
        b1, b2 = optim.betas
        first = b1 * moments["exp_avg"].double() + (1 - b1) * gradient
        second = b2 * moments["exp_avg_sq"].double() + (1 - b2) * gradient.square()
        rate = lr * (optim.lora_plus if "lora_B" in name else 1)
        step = first / (1 - b1**3) / ((second / (1 - b2**3)).sqrt() + 1e-8)
        expected[name] = weight.double() * (1 - rate * optim.weight_decay) - rate * step
    return expected, lr


def check_first_step(whole, folder, config):
    expected, rate = one_step(whole, config)
    got, start = (load_weights(folder / "checkpoints" / f"step-00000{step}") for step in (3, 2))
    for name, weight in expected.items():
        moved = (weight - start[name].double()).abs().max()
        assert moved > 0
        assert (got[name].double() - weight).abs().max() < 2e-3 * moved, name
    row, ratio = read_metrics(folder / "metrics.csv")[2], config.optim.lora_plus
    assert float(row["lr"]) == pytest.approx(rate, rel=1e-12)
    assert ratio == 1 or float(row["lr_b"]) == pytest.approx(ratio * rate, rel=1e-12)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_resume_changes_acts_from_its_first_step_on(whole, tmp_path, change):
    folder = copy_until(whole, 2, tmp_path)
    config = change_config(whole[0], {**CHANGES[change]}, override=True)
    write_config(config, folder)
    resume(folder, config)
    check_first_step(whole, folder, config)


def test_a_run_with_two_learning_rates_goes_on_exactly_and_back_to_one(whole, tmp_path):
    """The checkpoint of a run with LoRA+ has the optimizer's state in another order than that of a run without."""
    config = replace(whole[0], runs=str(tmp_path), optim=replace(whole[0].optim, lora_plus=16.0))
    undisturbed = run(config)
    folder = copy_until((config, undisturbed), 2, tmp_path)
    resume(folder, config)
    ends = (path / "checkpoints" / "step-000004" for path in (folder, undisturbed))
    assert equal_checkpoints(*ends)

    states = [load_state(path / "checkpoints" / "step-000001") for path in (undisturbed, whole[1])]
    shuffled, plain = (state["optimizer_states"][0]["state"] for state in states)
    names = in_order(config)
    in_groups = [n for n in names if "lora_A" in n] + [n for n in names if "lora_B" in n]
    for number, name in enumerate(in_groups):  # the first step's gradients are those of the run without LoRA+
        assert torch.equal(shuffled[number]["exp_avg"], plain[names.index(name)]["exp_avg"])

    shutil.rmtree(folder)
    folder = copy_until((config, undisturbed), 1, tmp_path)
    back = change_config(config, {"optim.lora_plus": "1", "optim.lr": "1e-30"}, override=True)
    resume(folder, back)
    state = load_state(folder / "checkpoints" / "step-000002")["optimizer_states"][0]
    assert len(state["param_groups"]) == 1
    second = load_state(undisturbed / "checkpoints" / "step-000002")["optimizer_states"][0]["state"]
    for number, name in enumerate(in_groups):
        assert torch.equal(state["state"][names.index(name)]["exp_avg"], second[number]["exp_avg"])


@pytest.mark.slow
@pytest.mark.parametrize("change", ["adamw", "lora_plus"])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_so_it_does_under_every_strategy(whole, tmp_path, strategy, change):
    folder = copy_until(whole, 2, tmp_path)
    layout = {"parallel.strategy": strategy, "trainer.devices": "2", "data.batch_size": "1"}
    changes = {**CHANGES[change], **layout}
    settings = [f"{key}={value}" for key, value in changes.items()]
    process = Run(f"resume={folder}", *settings, "override=true", script=ON_CPU)
    text = process.end()
    assert process.process.returncode == 0, text
    check_first_step(whole, folder, change_config(whole[0], changes, override=True))


def test_a_row_has_the_learning_rate_of_its_own_step(whole):
    config, folder = whole
    rates = [float(row["lr"]) for row in read_metrics(folder / "metrics.csv")]
    assert rates == pytest.approx([config.optim.lr * (step + 1) / 6 for step in range(4)], rel=1e-12)


# ---- other numbers of clips at once


@pytest.fixture
def trained_on(monkeypatch):
    """Grows by (optimizer steps before, keys) of each micro-batch that is trained on."""
    seen, step = [], LengthExtensionModule.training_step

    def watched(module, batch, index):
        seen.append((module.trainer.global_step, batch.keys))
        return step(module, batch, index)

    monkeypatch.setattr(LengthExtensionModule, "training_step", watched)
    return seen


def keys_in_order(config, count):
    """The first clips that a run trains on."""
    shards = training_shards(config)
    window = config.data.shuffle_window
    order = BatchOrder(shards.shapes(), seed=config.seed, global_batch=1, shuffle_window=window)
    return [shards.samples[order.batch(step)[1][0]].key for step in range(count)]


@pytest.mark.parametrize(
    ("accumulate", "batch"), [(1, 4), (4, 1), pytest.param(1, 3, marks=pytest.mark.slow), (3, 2), (1, 2)]
)
def test_other_micro_batches_go_on_with_the_next_clip(whole, tmp_path, trained_on, accumulate, batch):
    """Two steps of 2 x 2 clips, then two of others: each step has its clips, and none is left out or comes twice."""
    folder = copy_until(whole, 2, tmp_path)
    changes = {"optim.accumulate": str(accumulate), "data.batch_size": str(batch)}
    config = change_config(whole[0], changes, override=True)
    resume(folder, config)
    assert [step for step, _ in trained_on] == [2] * accumulate + [3] * accumulate
    assert [key for _, keys in trained_on for key in keys] == keys_in_order(config, 8 + 2 * accumulate * batch)[8:]
    state = load_state(folder / "checkpoints" / "step-000004")
    assert state["position"] == 4 + 2 * accumulate
    assert state["taken"] == [[[3, 8, 32, 64], 8 + 2 * accumulate * batch]]
    assert state["optimizer_states"][0]["state"][0]["step"] == 4


def test_a_step_keeps_its_clips_unless_it_is_overridden(whole):
    config, _ = whole
    for changes, now, remedy in (
        ({"trainer.devices": "2"}, 8, {"optim.accumulate": "1"}),
        ({"trainer.devices": "4"}, 16, {"data.batch_size": "1", "optim.accumulate": "1"}),
        ({"data.batch_size": "1"}, 2, {"optim.accumulate": "4"}),
        ({"optim.accumulate": "3"}, 6, {"optim.accumulate": "2"}),
        ({"trainer.devices": "3"}, 12, None),
    ):
        with pytest.raises(UserError, match=f"a step would have {now} clips over all GPUs, it had 4: ") as error:
            change_config(config, changes)
        found = re.search(r": set (.*) to keep them, or add override=true", str(error.value))
        assert (found and dict(word.split("=") for word in found[1].split())) == remedy
        if remedy is not None:
            assert clips_a_step(change_config(config, changes | remedy)) == 4
        assert clips_a_step(change_config(config, {**changes}, override=True)) == now


@pytest.mark.parametrize(("missing", "step"), [(1, 4), (2, 3), (4, 3)])
def test_data_that_end_before_the_training_are_an_error(whole, tmp_path, monkeypatch, missing, step):
    def cut(*arguments):
        stream = loader(*arguments)
        stream.num_steps -= missing
        return stream

    monkeypatch.setattr("train.run.loader", cut)
    folder = copy_until(whole, 2, tmp_path)
    with pytest.raises(UserError, match=f"the data end in step {step} of trainer.steps=4: "):
        resume(folder, whole[0])
    assert get_state(folder)[0] == "failed"
    monkeypatch.undo()
    resume(folder, whole[0])
    assert losses(folder) == losses(whole[1])


def test_a_resume_plans_what_it_changes(whole, tmp_path):
    """The report sets the plan beside what is measured, which is no plan of other settings."""
    folder = copy_until(whole, 2, tmp_path)
    before = stored_plan(folder)["table"]
    main([f"resume={folder}", "data.batch_size=1", "optim.accumulate=4"])
    assert stored_plan(folder)["table"] == plan_table(Budget.here(read_config(folder))) != before


def without_clips(folder):
    """Makes a run folder's checkpoints those of a version that counted micro-batches alone."""
    for state in (folder / "checkpoints").glob("*/state.json"):
        pairs = json.loads(state.read_text(encoding="utf-8"))["$dict"]
        assert "taken" in dict(pairs)
        state.write_text(json.dumps({"$dict": [pair for pair in pairs if pair[0] != "taken"]}), encoding="utf-8")


def test_a_checkpoint_that_counts_micro_batches_goes_on_as_it_was(whole, tmp_path):
    config, undisturbed = whole
    folder = copy_until(whole, 2, tmp_path)
    without_clips(folder)
    with pytest.raises(UserError, match=r"clips at once, they took 2: the newest checkpoint is of a version"):
        main([f"resume={folder}", "data.batch_size=4", "optim.accumulate=1"])
    with pytest.raises(UserError, match=r"would take 4 clips at once, they took 2: the newest checkpoint is of a"):
        main([f"resume={folder}", "trainer.devices=2", "optim.accumulate=1"])
    resume(folder, config)
    assert losses(folder) == losses(undisturbed)
    ends = (path / "checkpoints" / "step-000004" for path in (folder, undisturbed))
    assert equal_checkpoints(*ends)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("conf=wan_4x", "conf was shapes_4x, now wan_4x: a run keeps its run file"),
        ("trainer.steps=1", "trainer.steps is 1, but the run has made 2: give at least as many"),
        ("lora.init=some.safetensors", "lora.init is some.safetensors, but the run has trained its LoRA for 2 steps"),
        ("lora.alpha=4", "lora.alpha is 4, but the run has trained its LoRA with 8, and it would act at another"),
        ("lora.rslora=true", "lora.rslora is True, but the run has trained its LoRA with False"),
    ],
)
def test_what_a_checkpoint_cannot_follow_is_refused(whole, tmp_path, setting, said):
    folder = copy_until(whole, 2, tmp_path)
    before = (folder / "config.yaml").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=said):
        main([f"resume={folder}", setting, "override=true"])
    assert (folder / "config.yaml").read_text(encoding="utf-8") == before


# ---- what a run reads


@pytest.fixture
def on_shards(whole, tmp_path):
    """A run of two steps of four on shards and from a LoRA of its own; and where these lie."""
    shards = shutil.copytree(training_shards(whole[0]).folder, tmp_path / "shards")
    model = shutil.copytree(whole[0].model.path, tmp_path / "base")
    start = tmp_path / "start.safetensors"
    shutil.copy(whole[1] / "export" / "comfyui" / "shapes_4x.safetensors", start)
    changes = {"data__shards": shards, "data__synthetic_clips": 0, "model__path": model, "lora__init": start}
    folder = run(run_config(tmp_path, **changes, trainer__steps=1, optim__lr=1e-4))
    return folder, {"shards": shards, "weights": model, "lora": start}


def replaced(what, place):
    """Puts another file where a run's input lies: of the same names, shapes and sizes."""
    if what == "shards":
        manifest = place / "manifest.json"
        text = manifest.read_text(encoding="utf-8")
        digest = re.search(r'"sha256": "([0-9a-f]{64})"', text)[1]
        manifest.write_text(text.replace(digest, "0" * 64), encoding="utf-8")
        return
    (file,) = [place] if place.is_file() else place.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        about, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    last = max(tensors)
    save_file(tensors | {last: tensors[last] + 1}, file, about)


@pytest.mark.parametrize(("what", "key"), [("shards", "data.shards"), ("weights", "model.path"), ("lora", "lora.init")])
def test_replaced_inputs_are_refused_unless_overridden(on_shards, what, key):
    folder, places = on_shards
    if what == "lora":  # with a checkpoint it is read no more
        shutil.rmtree(folder / "checkpoints" / "step-000001")
    places["shards"].rename(places["shards"].with_name("moved"))
    (places["shards"]).symlink_to("moved")
    goes_on = [f"resume={folder}", "trainer.steps=2"]
    assert set(json.loads((folder / "inputs.json").read_text(encoding="utf-8"))) == {"shards", "weights", "lora"}
    replaced(what, places[what])
    before = (folder / "config.yaml").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=rf"^{key} was .* now .*: it was replaced since the run was started"):
        resume(folder, read_config(folder))
    with pytest.raises(UserError, match=rf"{key} was .* now .*: it was replaced .* add override=true"):
        main([f"resume={folder}"])
    assert (folder / "config.yaml").read_text(encoding="utf-8") == before
    main([*goes_on, "override=true"])
    assert get_state(folder)[0] == "done" and len(losses(folder)) == 2
    main([f"resume={folder}"])  # what was accepted is the run's


def test_inputs_that_no_version_has_noted_are_noted(on_shards):
    folder, places = on_shards
    noted = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    (folder / "inputs.json").unlink()
    places["lora"].unlink()
    main([f"resume={folder}"])
    del noted["lora"]
    assert json.loads((folder / "inputs.json").read_text(encoding="utf-8")) == noted
