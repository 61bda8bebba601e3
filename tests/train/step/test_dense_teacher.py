"""The dense teacher at native length: its loss and gradients by hand, and runs that train with it."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn import functional as F

from data.shards.batch import collate
from data.shards.stream import read_samples
from radial import Dense, Released, VideoGrid, build_layout
from tests.helpers.families import shards
from tests.helpers.faults import Run, equal_checkpoints, losses, only_run, run
from tests.helpers.oracles import masked_softmax
from tests.helpers.tiny import ARCHITECTURE, run_config, save_model, words
from train.assemble import build_module
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.flow import noise_like
from train.loggers.csv_file import read_metrics
from train.lora.layers import inject_lora, lora_parameters
from train.models.families import ADAPTERS
from train.models.loading import load_adapter
from train.run import resume
from train.shards import training_shards
from train.storage.checkpoints import last_checkpoint, load_state, load_weights

NATIVE, WEIGHT = 4, 0.7
HEAD_DIM = ARCHITECTURE["attention_head_dim"]
CHANGES = {"model__native_frames": NATIVE, "objective__dense_teacher": WEIGHT, "parallel__activations": "full",
           "optim__lr": 2e-2, "optim__warmup": 0}  # fmt: skip


def drawn(transformer):
    """LoRA weights away from their start, the same for every model; B starts at zero, and A would get no gradient."""
    torch.manual_seed(4)
    parameters = lora_parameters(transformer)
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape).to(parameter) * 0.1
    return parameters


def step_of(config):
    """A training step of two clips of a run: its module after the backward, and the batch."""
    manifest = training_shards(config)
    module = build_module(config, load_adapter(config.model, torch.float32, 0), manifest)
    drawn(module.transformer)
    clips = list(read_samples(manifest))[:2]
    batch = collate([replace(clip, latent=clip.latent.float()) for clip in clips], 0)
    loss = module.training_step(batch, 0)
    loss.backward()
    return module, batch, loss.detach()


def by_hand(config, module, batch, dense):
    """In float64: the two losses and the gradients of flow loss + weight x difference, with all that a step keeps."""
    student = load_adapter(config.model, torch.float32, 0)
    inject_lora(student.transformer, config.lora.rank, config.lora.alpha, student.lora_targets, seed=0)
    parameters = drawn(student.transformer)
    student.transformer.double()
    sigma = torch.tensor([seen.sigma for seen in module.seen])
    noise = torch.stack(
        [noise_like(x, config.seed, 0, key) for x, key in zip(batch.latent, batch.keys, strict=True)]
    ).double()
    level = sigma.double().view(-1, 1, 1, 1, 1)
    x, conditions = (1 - level) * batch.latent.double() + level * noise, module.objective.drawn(batch)

    def velocity(latent):
        grid = VideoGrid(latent.shape[2], latent.shape[3] // 4, latent.shape[4] // 4)
        for number, layer in enumerate(student.layers()):
            pattern = Dense() if dense or number < config.attention.dense_layers else Released()
            layout = build_layout(pattern, grid, config.attention.block)
            exact = partial(masked_softmax, layout=layout, text_lengths=None, scale=HEAD_DIM**-0.5)
            student.self_attention(layer).processor.attend = exact
        text = conditions.text["text"].tokens.double()
        text = F.pad(text, (0, 0, 0, config.model.text_tokens - text.shape[1]))
        return student.transformer(latent, 1000 * sigma.double(), text, return_dict=False)[0], text

    flow = (velocity(x)[0] - (noise - batch.latent.double())).square().mean()
    window = x[:, :, :NATIVE]
    taught, text = velocity(window)
    stock = WanTransformer3DModel.from_pretrained(config.model.path).double()
    with torch.no_grad():
        target = stock(window, 1000 * sigma.double(), text, return_dict=False)[0]
    difference = (taught - target).square().mean()
    found = torch.autograd.grad(flow + WEIGHT * difference, list(parameters.values()))
    return flow.item(), difference.item(), dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize(("policy", "frames", "changes"), [
    ("none", 8, {}), ("full", 8, {}), ("selective", 8, {"attention__dense_layers": 1}),
    ("full", 8, {"parallel__offload_weights": "true"}), ("full", NATIVE, {}),
    ("full", 8, {"attention__dense_sigma": 0.01}),
])  # fmt: skip
def test_loss_and_gradients_are_those_by_hand(tmp_path, policy, frames, changes):
    """Of clips twice as long as the native ones, whose positions are squeezed, and of native ones."""
    given = {**CHANGES, "parallel__activations": policy, "objective__caption_dropout": 0, **changes}
    config = run_config(tmp_path, clip__frames=frames, rope="interpolate", **given)
    module, batch, loss = step_of(config)
    flow, difference, gradients = by_hand(config, module, batch, "attention__dense_sigma" in changes)
    assert loss.item() == pytest.approx(flow + WEIGHT * difference, rel=1e-5)
    assert torch.stack([seen.loss for seen in module.seen]).mean().item() == pytest.approx(flow, rel=1e-5)
    assert torch.stack([seen.teacher_loss for seen in module.seen]).mean().item() == pytest.approx(difference, rel=1e-4)
    assert difference > 1e-5
    for name, parameter in lora_parameters(module.transformer).items():
        expected = gradients[name]
        torch.testing.assert_close(
            parameter.grad.double(), expected.double(), rtol=1e-3, atol=1e-4 * expected.abs().max().item(), msg=name
        )


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run of four steps with a teacher, a checkpoint at every second."""
    config = run_config(tmp_path_factory.mktemp("taught"), **CHANGES)
    return config, run(config)


def taught_losses(folder):
    return [float(row["teacher_loss"]) for row in read_metrics(folder / "metrics.csv")]


def test_a_weight_that_counts_for_nothing_changes_nothing(taught, tmp_path):
    """Bit for bit, while all that a teacher needs runs: it leaves no trace in what else a step computes."""
    config, folder = taught
    found = []
    for weight in (0.0, 1e-30):
        objective = replace(config.objective, dense_teacher=weight)
        found.append(run(replace(config, runs=str(tmp_path / str(weight)), objective=objective)))
    assert equal_checkpoints(*(path / "checkpoints" / "step-000004" for path in found))
    assert losses(found[0]) == losses(found[1]) != losses(folder)
    assert "teacher_loss" not in read_metrics(found[0] / "metrics.csv")[0]
    assert len(taught_losses(found[1])) == 4


def test_it_draws_the_model_to_the_teacher(taught, tmp_path):
    """With little else to learn than the teacher's velocity, the differences fall."""
    config, _ = taught
    found = []
    for weight in (1e4, 1e-30):
        changes = {"trainer": replace(config.trainer, steps=8)}
        changes["objective"] = replace(config.objective, dense_teacher=weight)
        found.append(taught_losses(run(replace(config, runs=str(tmp_path / str(weight)), **changes))))
    held, free = found
    assert held[0] == free[0]
    assert sum(held[4:]) < 0.5 * sum(free[4:])


def test_a_resume_goes_on_exactly(taught, tmp_path):
    config, whole = taught
    folder = shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    resume(folder, config)
    assert equal_checkpoints(*(path / "checkpoints" / "step-000004" for path in (folder, whole)))
    assert taught_losses(folder) == taught_losses(whole)


@pytest.mark.parametrize("changes", [
    {"parallel__sequence": 2}, pytest.param({"data__batch_size": 1}, marks=pytest.mark.slow)
])  # fmt: skip
def test_two_processes_train_like_one(tmp_path, changes):
    """Sharing each clip, whose tokens and whose window's two ranks cannot split evenly, or with a clip each."""
    given = {**CHANGES, "clip__frames": 5, "model__native_frames": 3, "clip__height": 20, "clip__width": 20,
             "attention__block": 16, "data__batch_size": 2}  # fmt: skip
    one = run(run_config(tmp_path, **given))
    process = Run(*words(tmp_path, **{**given, **changes}, trainer__devices=2, runs=tmp_path / "two"))
    text = process.end()
    assert process.process.returncode == 0, text
    two = only_run(tmp_path / "two")
    assert taught_losses(two) == pytest.approx(taught_losses(one), rel=1e-4)
    first, second = (load_state(last_checkpoint(folder))["optimizer_states"][0]["state"] for folder in (one, two))
    for index in first:
        expected, got = first[index]["exp_avg"], second[index]["exp_avg"]
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("changes", [
    {"parallel__offload_weights": "true"},
    {"parallel__activations": "selective", "parallel__offload_activations": "true"},
    pytest.param({"trainer__compile": "true"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_it_is_the_same_however_memory_is_saved(taught, tmp_path, changes):
    config, folder = taught
    again = run(run_config(tmp_path, **{**CHANGES, "model__path": config.model.path, **changes}))
    assert taught_losses(again) == pytest.approx(taught_losses(folder), rel=1e-4)
    for one, other in zip(*(load_weights(last_checkpoint(path)).values() for path in (again, folder)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_the_expert_of_the_step_has_its_own_teacher(tmp_path):
    """Of two experts each is held to itself: their differences are those of a LoRA that does nothing yet."""
    for name, seed in (("transformer", 0), ("transformer_2", 1)):
        save_model(tmp_path / "two" / name, seed)
    (tmp_path / "two" / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.9}), encoding="utf-8")
    model = {"path": tmp_path / "two", "subfolder": "transformer", "boundary": 0.9, "expert": "both"}
    changes = {**CHANGES, **{f"model__{key}": value for key, value in model.items()}, "objective__shift": 12}
    changes["optim__lr"] = 1e-12
    folder = run(run_config(tmp_path, **changes, trainer__steps=6))
    rows = read_metrics(folder / "metrics.csv")
    assert {float(row["sigma"]) >= 0.9 for row in rows} == {True, False}
    assert 0 < max(taught_losses(folder)) < 1e-3


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in sorted(ADAPTERS) if family != "hunyuan"]


@pytest.mark.parametrize("family", ["hunyuan", *SLOW])
def test_layers_that_run_again_do_so_in_the_attention_of_their_forward(tmp_path, family):
    found = []
    for policy in ("none", "full"):
        settings = shards(family, tmp_path / policy, (4, 4, 5)) | {"parallel.activations": policy}
        more = {"model.native_frames": "2", "objective.dense_teacher": "1", "trainer.precision": "fp32"}
        found.append(run(finish(compose_run({**settings, **more}))))
    assert taught_losses(found[0]) == pytest.approx(taught_losses(found[1]), rel=1e-4)
    one, other = (load_state(last_checkpoint(path))["optimizer_states"][0]["state"] for path in found)
    for index, entry in one.items():
        expected = entry["exp_avg"]
        torch.testing.assert_close(
            other[index]["exp_avg"], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
        )


def test_what_the_weight_needs_is_asked_for():
    run_of = {"objective.dense_teacher": "0.5"}
    assert finish(compose_run({**run_of, "attention": "dense"})).objective.dense_teacher == 0.5
    with pytest.raises(UserError, match="dense_teacher is 0.5, but lora is null: it needs the frozen model"):
        finish(compose_run({**run_of, "lora": "null"}))
    with pytest.raises(UserError, match=r"dense_teacher is 0.5, which needs model.native_frames, it is not set"):
        finish(compose_run({**run_of, "model.native_frames": "null", "rope": "default"}))
    with pytest.raises(UserError, match=r"objective.dense_teacher is -1.0"):
        finish(compose_run({"objective.dense_teacher": "-1"}))
