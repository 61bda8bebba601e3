"""Two experts (Wan2.2-A14B): which of them a step trains; runs of both and of one, from a folder to their LoRAs."""

import csv
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from radial import Dense
from tests.helpers.attention import step_attention
from tests.helpers.tiny import run_config, save_model, words
from train.assemble import build_module
from train.errors import UserError
from train.export.run import export_run
from train.flow import SigmaSchedule, StepDraw, expert_range
from train.measures.euler import generate
from train.models.loading import describe_model, load_adapter
from train.preflight import preflight
from train.run import RunFolder, resume, train
from train.shards import training_shards
from train.storage.checkpoints import last_checkpoint, load_state, load_weights

BOUNDARY = 0.9


def folder_of(tmp):
    folder = tmp / "two"
    if not folder.exists():
        save_model(folder / "transformer")
        save_model(folder / "transformer_2", seed=1)
        (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": BOUNDARY}), encoding="utf-8")
    return folder


def two(tmp, expert="both", **changes):
    """Settings of a run of tiny experts."""
    model = {"path": folder_of(tmp), "subfolder": "transformer", "boundary": BOUNDARY, "expert": expert}
    return {**{f"model__{key}": value for key, value in model.items()}, **changes}


def run(config):
    folder = RunFolder.create(config)
    train(config, folder)
    return folder.path


def column(folder, name):
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row[name]]


def drawn(config, steps):
    """Whether the high expert runs, for each optimizer step."""
    schedule = SigmaSchedule(config.shift())
    return [expert_range(config.seed, step, schedule, BOUNDARY)[0] == BOUNDARY for step in range(steps)]


@pytest.mark.parametrize(("shift", "boundary"), [(12.0, 0.875), (5.0, 0.9)])
@pytest.mark.parametrize("dense_sigma", [None, 0.95, 0.8])
def test_experts_have_their_true_shares_and_together_follow_the_schedule(shift, boundary, dense_sigma):
    schedule, steps = SigmaSchedule(shift), 4000
    share, high, levels = schedule.share_above(boundary), 0, []
    for step in range(steps):
        within = expert_range(3, step, schedule, boundary)
        high += within[0] > 0
        draw = StepDraw.of(3, step, schedule, dense_sigma, within)
        level = torch.tensor(draw.sigma(3, step, "sample", schedule))
        assert (level >= boundary).item() == (within[0] > 0)
        assert dense_sigma is None or draw.dense == (level >= dense_sigma).item()
        levels.append(level.item())
    assert high / steps == pytest.approx(share, abs=4 * (share * (1 - share) / steps) ** 0.5)
    for quantile in (0.1, 0.3, 0.5, 0.9):
        below = sum(level < schedule.at_quantile(quantile) for level in levels) / steps
        assert below == pytest.approx(quantile, abs=0.03)


def test_rounding_never_crosses_the_boundary():
    schedule = SigmaSchedule(5.0)
    for within, quantile in (((0.0, 0.9), 1.0), ((0.9, 1.0), 0.0)):
        low, high = (1 - schedule.share_above(bound) for bound in within)
        at = high if quantile else low
        edge = StepDraw(False, at, at, within)
        level = torch.tensor([edge.sigma(0, 0, "x", schedule)])
        assert (level >= 0.9).item() == (within[0] == 0.9)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of both experts with two micro-batches a step, every step kept."""
    config = run_config(
        tmp_path_factory.mktemp("both"),
        **two(tmp_path_factory.mktemp("model"), objective__shift=12, optim__accumulate=2),
        trainer__steps=6,
        trainer__checkpoint_every=1,
        trainer__keep=6,
        attention__dense_sigma=0.98,
    )
    return config, run(config)


def test_a_step_trains_one_expert_and_leaves_the_other_alone(finished):
    config, folder = finished
    high = drawn(config, 6)
    assert set(high) == {True, False}
    before = None
    for step in range(1, 7):
        weights = load_weights(folder / "checkpoints" / f"step-{step:06d}")
        assert {name.split(".")[0] for name in weights} == {"transformer", "transformer_2"}
        if before is not None:
            moved = {name.split(".")[0] for name in weights if not torch.equal(weights[name], before[name])}
            assert moved == {"transformer" if high[step - 1] else "transformer_2"}
        before = weights
    sigma = column(folder, "sigma")
    assert len(sigma) == 6 and [level >= BOUNDARY for level in sigma] == high
    state = load_state(folder / "checkpoints" / "step-000006")["optimizer_states"][0]["state"]
    counts = [state[index]["step"].item() for index in sorted(state)]
    assert counts == [sum(high)] * 24 + [6 - sum(high)] * 24


def test_resume_is_exact(finished, tmp_path):
    config, whole = finished
    config = replace(config, runs=str(tmp_path))
    folder = RunFolder.create(config)
    shutil.copytree(whole / "checkpoints" / "step-000003", folder.path / "checkpoints" / "step-000003")
    shutil.copy(whole / "metrics.csv", folder.path / "metrics.csv")
    resume(folder.path, config)
    assert column(folder.path, "loss") == column(whole, "loss")
    for name in ("weights", "optimizer"):
        file = f"checkpoints/step-000006/{name}.safetensors"
        assert (folder.path / file).read_bytes() == (whole / file).read_bytes()


def test_both_loras_load_into_the_pipeline_and_the_merged_one_is_the_same(finished):
    """As users load them; the pipeline is diffusers' own, and its switch between experts too."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    config, folder = finished
    lines = export_run(folder, out=folder / "out", merged=True)
    assert len([line for line in lines if "WanPipeline.load_lora_weights: 24 tensors, all equal" in line]) >= 2
    names = {path.name for path in (folder / "out").rglob("comfyui/*")}
    assert names == {"shapes_4x_high_noise.safetensors", "shapes_4x_low_noise.safetensors"}

    def pipeline(root):
        parts = {n: WanTransformer3DModel.from_pretrained(root / n) for n in ("transformer", "transformer_2")}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)
        made = WanPipeline(None, None, None, scheduler, **parts, boundary_ratio=BOUNDARY)
        made.set_progress_bar_config(disable=True)
        return made

    def latent(made):
        words = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(1, 3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        settings = {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 1.0, "output_type": "latent"}
        return made(prompt_embeds=words, num_inference_steps=12, latents=noise, **settings).frames

    base = pipeline(Path(config.model.path))
    plain = latent(base)
    base.load_lora_weights(folder / "out" / "high_noise" / "diffusers")
    high_only = latent(base)
    base.load_lora_weights(folder / "out" / "low_noise" / "diffusers", load_into_transformer_2=True)
    adapted = latent(base)
    assert (high_only - plain).abs().max() > 1e-4
    assert (adapted - high_only).abs().max() > 1e-4
    torch.testing.assert_close(latent(pipeline(folder / "out" / "merged")), adapted, rtol=0, atol=1e-4)
    assert (folder / "out" / "merged" / "model_index.json").is_file()
    style = next((folder / "out" / "low_noise" / "peft").glob("*.safetensors"))
    export_run(folder, out=folder / "styled", formats=["peft"], merged=True, add_2=[(style, 0.5)])
    for name, changes in (("transformer", False), ("transformer_2", True)):
        before, after = (
            WanTransformer3DModel.from_pretrained(folder / out / "merged" / name).blocks[0].attn1.to_q.weight
            for out in ("out", "styled")
        )
        tensors = load_file(style)
        a, b = (tensors[f"base_model.model.blocks.0.attn1.to_q.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(after - before, 0.5 * changes * b @ a, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="its expert for low noise levels; add is the high one's"):
        export_run(folder, out=folder / "swapped", formats=["peft"], merged=True, add=[(style, 0.5)])


def test_a_run_starts_from_the_loras_of_both(finished, tmp_path):
    config, folder = finished
    kinds = [f"{kind}_noise" for kind in ("high", "low")]
    files = [str(folder / "export" / kind / "comfyui" / f"shapes_4x_{kind}.safetensors") for kind in kinds]
    again = replace(config, lora=replace(config.lora, init=",".join(files)), runs=str(tmp_path))
    preflight(again)
    module = build_module(again, load_adapter(again.model, torch.float32, 0), training_shards(again))
    last = load_weights(last_checkpoint(folder))
    for name, parameter in module.trained_weights().items():
        torch.testing.assert_close(parameter, last[name], rtol=1e-5, atol=1e-7)
    one = replace(again, lora=replace(config.lora, init=files[0]))
    with pytest.raises(UserError, match="expected a file for each expert: high.safetensors,low.safetensors"):
        build_module(one, load_adapter(one.model, torch.float32, 0), training_shards(one))


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    losses, moments = [], []
    for name, change in (("one", {"data__batch_size": 2}), ("two", {"trainer__devices": 2})):
        command = words(tmp_path, **two(tmp_path, objective__shift=12), runs=tmp_path / name, **change)
        done = subprocess.run([sys.executable, "-m", "train", *command], capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        (folder,) = (tmp_path / name / "shapes_4x").iterdir()
        losses.append(column(folder, "loss"))
        moments.append(load_state(last_checkpoint(folder))["optimizer_states"][0]["state"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert moments[0].keys() == moments[1].keys()
    for index, entry in moments[0].items():
        expected = entry["exp_avg"]
        got = moments[1][index]["exp_avg"]
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        assert entry["step"] == moments[1][index]["step"]


def test_prompts_clips_are_both_experts(tmp_path):
    given = {"samples_every": 1, "samples_steps": 2, "prompts": "[a red ball]"}
    config = run_config(
        tmp_path, **two(tmp_path), trainer__steps=1, **{f"validation__{key}": value for key, value in given.items()}
    )
    assert (run(config) / "samples/step-000001/00-a-red-ball.mp4").stat().st_size > 0


def test_each_expert_has_its_own_weight_of_guidance(tmp_path):
    adapter = load_adapter(run_config(tmp_path, **two(tmp_path)).model, torch.float32, 0)
    noise = torch.randn(1, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    given, empty = (adapter.random_conditions(noise) for _ in range(2))
    attention = step_attention(Dense(), adapter.grid(noise), block=16)
    got = generate(
        adapter, noise, given, empty, lambda _: attention, steps=4, shift=5.0, guidance=4.0, guidance_low=1.5
    )
    x, levels = noise.clone(), [*adapter.noise_levels(4, 5.0), 0.0]
    assert levels[1] > BOUNDARY > levels[2]
    adapter.set_attention(attention)
    with torch.no_grad():
        for level, after in itertools.pairwise(levels):
            sigma = torch.tensor([level], dtype=torch.float32)
            with_text, without = (adapter.velocity(x, sigma, of) for of in (given, empty))
            weight = 4.0 if level > BOUNDARY else 1.5
            x = x + (after - level) * (without + weight * (with_text - without))
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_one_expert_a_run(tmp_path, expert):
    config = run_config(tmp_path, **two(tmp_path, expert, objective__shift=12))
    preflight(config)
    folder = run(config)
    assert all((level >= BOUNDARY) == (expert == "high") for level in column(folder, "sigma"))
    weights = load_weights(last_checkpoint(folder))
    assert len(weights) == 24 and all(name.startswith("blocks.") for name in weights)
    adapter = load_adapter(config.model, torch.float32, 0)
    place = folder_of(tmp_path) / ("transformer" if expert == "high" else "transformer_2")
    own = load_file(place / "diffusion_pytorch_model.safetensors")
    assert torch.equal(adapter.transformer.proj_out.weight, own["proj_out.weight"])
    with pytest.raises(UserError, match=r"is an expert for noise levels .*: sample with model.expert=both"):
        generate(adapter, torch.zeros(1, 3, 2, 8, 8), None, None, None, steps=2, shift=1.0, guidance=1.0)


def test_what_does_not_fit_is_said(tmp_path):
    config = run_config(tmp_path, **two(tmp_path))
    preflight(config)
    assert describe_model(config.model).boundary == BOUNDARY

    def refused(message, **changes):
        with pytest.raises(UserError, match=message):
            preflight(run_config(tmp_path, **{**two(tmp_path), **changes}))

    refused("model.boundary is 0.875, .*model_index.json says 0.9: choose the model=", model__boundary=0.875)
    refused("model.expert is middle?|model.expert is 'middle', expected one of", model__expert="middle")
    refused("model.expert is both and model.boundary None: a model of two experts has both", model__boundary="null")
    refused("model.expert is None and model.boundary 0.9", model__expert="null")
    refused(
        "report.clips needs both experts, model.expert is low",
        model__expert="low",
        report__clips=32,
        report__short_frames=0,
    )
    levels = {"validation__every": 1, "validation__sigmas": "[0.5]"}
    refused("validation.sigmas .* no noise level of model.expert=high, 0.9 to 1", model__expert="high", **levels)
    refused("parallel.strategy is zero2, .* set parallel=ddp, or train them in two runs", parallel__strategy="zero2")
    shutil.rmtree(folder_of(tmp_path) / "transformer_2")
    for expert in ("both", "low"):
        refused("has no transformer_2/config.json", model__expert=expert)
    preflight(run_config(tmp_path, **two(tmp_path, "high")))


@pytest.mark.parametrize(("expert", "mean"), [("high", -4), ("low", 6)])
def test_an_expert_whose_noise_levels_are_never_drawn_is_refused(tmp_path, expert, mean):
    objective = {"objective__density": "logit_normal", "objective__mean": mean, "objective__std": 0.3}
    with pytest.raises(UserError, match=f"model.expert={expert} trains noise levels .*objective.mean={mean} "):
        preflight(run_config(tmp_path, **two(tmp_path, expert, objective__shift=3, **objective)))
