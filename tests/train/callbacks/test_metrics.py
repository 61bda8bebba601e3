"""The figures of a run: the same keys everywhere, and the numbers that they claim to be."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.shards.stream import read_samples
from radial import LatentTime
from tests.helpers.faults import Run, losses, only_run
from tests.helpers.tiny import run_config, words
from train.assemble import build_module
from train.callbacks.checkpoints import best_checkpoint
from train.callbacks.metrics import lora_norms
from train.callbacks.validation import lengths_of
from train.config.compose import compose_run, finish
from train.loggers.csv_file import read_metrics
from train.measures.levels import validation_levels
from train.models.loading import load_adapter
from train.run import resume, train
from train.shards import training_shards
from train.step.clip_recipe import clip_recipe
from train.step.module import LengthExtensionModule
from train.storage.checkpoints import checkpoints_of, load_weights
from train.storage.run_folder import RunFolder


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run that logs everywhere, with a validation and a checkpoint at every second step."""
    tmp_path = tmp_path_factory.mktemp("run")
    changes = {"trainer__steps": 8, "validation__every": 2, "validation__clips": 3, "log__norms_every": 4}
    config = run_config(tmp_path, **changes, log__tensorboard=True, log__wandb="offline", trainer__keep=1)
    sent = {}
    with pytest.MonkeyPatch.context() as patch:
        import wandb

        real = wandb.Run.log

        def log(self, data, *arguments, **options):
            sent.update(data)
            return real(self, data, *arguments, **options)

        patch.setattr(wandb.Run, "log", log)
        folder = RunFolder.create(config)
        train(config, folder)
    return config, folder.path, sent


def test_every_log_has_the_same_keys_and_numbers(logged):
    _, folder, sent = logged
    rows = read_metrics(folder / "metrics.csv")
    keys = rows[0].keys() - {"step"}
    assert {"loss", "grad_norm", "lr", "sigma", "skipped", "tokens_per_second", "memory_gib", "data_wait"} < keys
    assert {
        "loss_frames/8",
        "lora_norm/blocks_00",
        "validation/loss",
        "validation/4_frames/sigma_0.8571",
    } < keys  # the median
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) - {"epoch", "hp_metric"} == keys
    assert sent.keys() - {"epoch", "trainer/global_step"} == keys
    for key in ("loss", "lr", "validation/loss"):
        written = [float(row[key]) for row in rows if row[key]]
        assert [event.value for event in events.Scalars(key)] == pytest.approx(written, rel=1e-6)
    assert {"config/text_summary", "environment/text_summary", "plan/text_summary"} <= set(events.Tags()["tensors"])
    assert events.Tags()["images"] == ["mask"]
    about = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert about["packages"]["torch"] == torch.__version__ and len(about["git"] or "0" * 40) >= 40


class Watch(Callback):
    """The norm of the gradients of each step, by the step's number."""

    def __init__(self):
        self.norms = {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms[trainer.global_step] = torch.nn.utils.get_total_norm(gradients).item()


def test_a_rows_figures_belong_to_the_step_beside_it(tmp_path, monkeypatch):
    seen, step = {}, LengthExtensionModule.training_step

    def watched(module, batch, index):
        loss = step(module, batch, index)
        seen.setdefault(module.trainer.global_step, []).append(loss.item())
        return loss

    monkeypatch.setattr(LengthExtensionModule, "training_step", watched)
    config = run_config(tmp_path, trainer__steps=4, optim__accumulate=2)
    folder, watch = RunFolder.create(config), Watch()
    train(config, folder, extra_callbacks=[watch])
    rows = {int(row["step"]): row for row in read_metrics(folder.path / "metrics.csv")}
    assert sorted(rows) == [0, 1, 2, 3] and [len(losses) for losses in seen.values()] == [2] * 4
    for number, row in rows.items():
        assert float(row["loss"]) == pytest.approx(sum(seen[number]) / 2, rel=1e-5)
        assert float(row["grad_norm"]) == pytest.approx(watch.norms[number], rel=1e-5)


def test_figures_between_the_rows_are_not_lost(tmp_path):
    """Rows at every third step, validations at every second, norms at every fourth; resumed in between."""
    changes = {"validation__every": 2, "validation__clips": 1, "log__every": 3, "log__norms_every": 4}
    config = run_config(tmp_path, trainer__steps=8, trainer__keep=9, log__tensorboard=True, **changes)
    folder = RunFolder.create(config).path
    train(config, RunFolder(folder))
    rows = read_metrics(folder / "metrics.csv")
    steps = {key: [int(row["step"]) + 1 for row in rows if row[key]] for key in rows[0]}
    assert steps["loss"] == [2, 3, 4, 6, 8]
    assert steps["validation/loss"] == [2, 4, 6, 8] and steps["lora_norm/blocks_00"] == [4, 8]
    assert steps["loss_frames/8"] == [3, 6, 8]
    for step in (6, 8):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:06d}")
    resume(folder, config)
    again = read_metrics(folder / "metrics.csv")
    names = [key for key in rows[0] if key.startswith(("loss", "validation", "lora_norm"))]
    assert [[row[key] for key in names] for row in again] == [[row[key] for key in names] for row in rows]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step + 1 for event in events.Scalars("loss")] == [2, 3, 4, 6, 8]


def test_buckets_add_up_to_the_loss(logged):
    _, folder, _ = logged
    for row in read_metrics(folder / "metrics.csv"):
        buckets = [float(value) for key, value in row.items() if key.startswith("loss_sigma/") and value]
        assert buckets == [float(row["loss"])] == [float(row["loss_frames/8"])]  # a step is one sample here
        (name,) = [key for key, value in row.items() if key.startswith("loss_sigma/") and value]
        low, high = map(float, name.split("/")[1].split("-"))
        assert low <= float(row["sigma"]) <= high


def test_the_norm_of_a_layer_is_that_of_its_whole_update(logged):
    config, folder, _ = logged
    assert config.lora is not None
    weights = load_weights(folder / "checkpoints" / "step-000008")
    row = read_metrics(folder / "metrics.csv")[-1]
    scale = config.lora.alpha / config.lora.rank
    for layer in range(3):
        names = [name for name in weights if f"blocks.{layer}." in name and ".lora_A." in name]
        deltas = [weights[name.replace("lora_A", "lora_B")] @ weights[name] for name in names]
        whole = scale * math.sqrt(sum(float(delta.square().sum()) for delta in deltas))
        assert len(names) == 4
        assert float(row[f"lora_norm/blocks_{layer:02d}"]) == pytest.approx(whole, rel=1e-5)


def test_the_best_checkpoint_stays_beside_the_newest(logged):
    _, folder, _ = logged
    rows = {int(row["step"]) + 1: float(row["validation/loss"])
            for row in read_metrics(folder / "metrics.csv") if row["validation/loss"]}  # fmt: skip
    assert sorted(rows) == [2, 4, 6, 8]
    best = best_checkpoint(folder / "checkpoints")
    assert best is not None and best[1] == min(rows.values())
    assert rows[int(best[0].name[5:])] == best[1]
    assert set(checkpoints_of(folder / "checkpoints")) == {best[0], folder / "checkpoints" / "step-000008"}


def test_the_best_of_other_validation_clips_is_none(tmp_path):
    """A run that goes on with more clips begins its search anew: their loss is no smaller or larger than the old."""
    given = {"validation__every": 1, "trainer__checkpoint_every": 1, "trainer__keep": 1}
    folder = RunFolder.create(run_config(tmp_path, **given)).path
    best = folder / "checkpoints" / "best.json"
    for steps, clips, expected in ((1, 1, "step-000001"), (2, 1, "step-000001"), (3, 2, "step-000003")):
        resume(folder, run_config(tmp_path, **given, trainer__steps=steps, validation__clips=clips))
        noted = json.loads(best.read_text(encoding="utf-8"))
        assert noted["checkpoint"] == expected
        best.write_text(json.dumps({**noted, "loss": 0.0}), encoding="utf-8")  # nothing to come is better


def test_the_best_is_none_of_what_a_run_went_back_from(tmp_path):
    """From step 3 back to step 1, of whose loss nothing to come is better, and on by other steps."""
    given = {"validation__every": 1, "validation__clips": 1, "trainer__checkpoint_every": 1, "trainer__keep": 3}
    folder = RunFolder.create(run_config(tmp_path, **given)).path / "checkpoints"
    resume(folder.parent, run_config(tmp_path, **given, trainer__steps=3))
    for step in (2, 3):
        shutil.rmtree(folder / f"step-{step:06d}")
    (folder / "best.json").write_text(json.dumps({"checkpoint": "step-000003", "loss": 0.0}), encoding="utf-8")
    resume(folder.parent, run_config(tmp_path, **given, trainer__steps=3, optim__lr=1e-2))
    rows = read_metrics(folder.parent / "metrics.csv")[1:]
    found = {folder / f"step-{int(row['step']) + 1:06d}": float(row["validation/loss"]) for row in rows}
    best = best_checkpoint(folder)
    assert best is not None and best == min(found.items(), key=lambda each: each[1])


def test_validation_disturbs_nothing(logged, tmp_path):
    config, folder, _ = logged
    plain = replace(config, runs=str(tmp_path), validation=replace(config.validation, every=0))
    plain = replace(plain, log=replace(plain.log, wandb="disabled", tensorboard=False))
    other = RunFolder.create(plain)
    train(plain, other)
    assert losses(other.path) == losses(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"conf": "wan_4x"}, [0.357, 0.682, 0.833, 0.921, 0.978]),  # shift 5
        ({"conf": "wan_4x", "objective.shift": "1"}, [0.1, 0.3, 0.5, 0.7, 0.9]),
        ({"conf": "wan_4x", "validation.sigmas": "[0.7, 0.2]"}, [0.2, 0.7]),
    ],
)
def test_validation_is_at_quantiles_of_the_runs_own_noise_levels(changes, expected):
    levels = validation_levels(finish(compose_run(changes)))
    assert list(levels) == pytest.approx(expected, abs=5e-4)
    assert list(levels.values()) == pytest.approx([1 / len(expected)] * len(expected))


@pytest.mark.parametrize("expert", ["both", "high", "low"])
def test_each_expert_is_validated_at_quantiles_of_its_own_noise_levels(expert):
    config = finish(compose_run({"conf": "wan22_2x", "model.expert": expert}))
    schedule, boundary = clip_recipe(config).schedule, config.model.boundary
    levels = validation_levels(config)
    assert sum(levels.values()) == pytest.approx(1) and list(levels) == sorted(levels)
    high = {sigma: share for sigma, share in levels.items() if sigma >= boundary}
    low = {sigma: share for sigma, share in levels.items() if sigma < boundary}
    above = schedule.share_above(boundary)
    assert (len(high), len(low)) == {"both": (5, 5), "high": (5, 0), "low": (0, 5)}[expert]
    if expert == "both":
        assert sum(high.values()) == pytest.approx(above)
    quantiles = [0.1, 0.3, 0.5, 0.7, 0.9]
    if high:
        assert [1 - schedule.share_above(sigma) / above for sigma in high] == pytest.approx(quantiles)
    if low:
        assert [(1 - schedule.share_above(sigma)) / (1 - above) for sigma in low] == pytest.approx(quantiles)


def test_validation_runs_each_level_as_training_does_and_weighs_it(tmp_path, monkeypatch):
    """Levels of the dense side run dense; the mean has each level's share."""
    seen, attention_at = [], LengthExtensionModule.attention_at

    def noted(module, latent, sigma, pattern=None):
        attention = attention_at(module, latent, sigma, pattern)
        seen.append((sigma, attention.all_dense))
        return attention

    monkeypatch.setattr(LengthExtensionModule, "attention_at", noted)
    monkeypatch.setattr("train.measures.levels.QUANTILES", (0.2, 0.9))
    given = {"objective__shift": 3, "attention__dense_sigma": 0.85, "trainer__steps": 1}
    config = run_config(tmp_path, **given, validation__every=1, validation__clips=1)
    folder = RunFolder.create(config)
    train(config, folder)
    assert [dense for _, dense in seen] == [False, True] * 3
    assert sorted({sigma for sigma, _ in seen}) == pytest.approx([3 * 0.2 / 1.4, 2.7 / 2.8])
    row = read_metrics(folder.path / "metrics.csv")[0]
    low, high = (float(row[f"validation/8_frames/sigma_{level}"]) for level in ("0.4286", "0.9643"))
    assert low != high and float(row["validation/loss"]) == pytest.approx((low + high) / 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "two"),
    [({}, {"parallel__sequence": 2}), ({"data__batch_size": 2}, {})],
    ids=["a clip is shared", "three clips on two ranks"],
)
def test_two_processes_validate_like_one(tmp_path, one, two):
    given = {"trainer__steps": 4, "validation__every": 4, "validation__clips": 3, "log__norms_every": 4}
    folder = RunFolder.create(run_config(tmp_path, **given, **one))
    train(run_config(tmp_path, **given, **one), folder)
    two = {**given, **two, "trainer__devices": 2, "runs": tmp_path / "two"}
    text = Run(*words(tmp_path, **two)).end()
    (row,) = [row for row in read_metrics(only_run(tmp_path / "two") / "metrics.csv") if row["validation/loss"]]
    last = read_metrics(folder.path / "metrics.csv")[-1]
    for key in last:
        if key.startswith(("validation/", "lora_norm/", "loss")) and last[key]:
            assert float(row[key]) == pytest.approx(float(last[key]), rel=1e-4), (key, text)


def test_lengths_are_the_clip_its_half_and_its_quarter():
    assert lengths_of(321, LatentTime(4)) == [21, 41, 81]  # Wan's 81, 161 and 321 frames
    assert lengths_of(16, LatentTime(1)) == [4, 8, 16]
    assert lengths_of(1, LatentTime(4)) == [1]


def test_lengths_are_those_that_clips_in_chunks_may_have():
    time = LatentTime(4, (17, 5))
    lengths = lengths_of(1433, time)
    assert lengths == [107, 212, 422]
    for length in lengths:
        time.check(time.frames(length))


def test_no_norms_without_a_lora(tmp_path):
    config = replace(run_config(tmp_path), lora=None)
    shards = training_shards(config)
    module = build_module(config, load_adapter(config.model, torch.float32, config.seed), shards)
    assert lora_norms(module) == {}
    assert len(list(read_samples(shards, 1))) == 1
