"""ZeRO's numbers and checkpoints, with DeepSpeed on the CPU in real processes; on GPUs in tests/gpu."""

import csv
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import HELPERS, zero_ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import run_config
from train.config.schema import ParallelConfig
from train.export.run import export_run
from train.run import resume, train
from train.storage.checkpoints import load_state, load_weights
from train.storage.run_folder import RunFolder


def same(a, b):
    """Two checkpoints hold the same weights, moments and step; Adam's steps magnify rounding, the moments do not."""
    got, expected = load_weights(a), load_weights(b)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-4)
    got, expected = (load_state(folder)["optimizer_states"][0] for folder in (a, b))
    assert got["state"].keys() == expected["state"].keys()
    assert got["param_groups"] == expected["param_groups"]
    for index, entry in expected["state"].items():
        assert got["state"][index].keys() == entry.keys()
        assert got["state"][index]["step"] == entry["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            peak = entry[key].abs().max().item()
            assert peak > 0
            torch.testing.assert_close(got["state"][index][key], entry[key], rtol=1e-3, atol=1e-4 * peak)


@pytest.mark.parametrize(
    ("stage", "world", "size", "offload", "ratio"),
    [
        (2, 2, 2, False, 1),
        (3, 3, 1, False, 1),
        (2, 2, 1, False, 8),
        pytest.param(1, 2, 1, False, 1, marks=pytest.mark.slow),
        pytest.param(1, 4, 2, False, 8, marks=pytest.mark.slow),
        pytest.param(2, 4, 1, False, 1, marks=pytest.mark.slow),
        pytest.param(3, 2, 2, False, 8, marks=pytest.mark.slow),
        pytest.param(3, 4, 2, False, 1, marks=pytest.mark.slow),
        pytest.param(2, 2, 1, True, 8, marks=pytest.mark.slow),
        pytest.param(3, 2, 2, True, 1, marks=pytest.mark.slow),
    ],
)
def test_steps_and_checkpoints_are_the_single_processs(tmp_path, stage, world, size, offload, ratio):
    """Two steps; then the second one again from the single process's checkpoint; then a third, without ZeRO, from ours.

    Three ranks do not divide the parameters evenly, and sequence parallelism is inside the world that ZeRO shards over.
    The LoRA is on the text's layers too, which see the same tokens on every rank of a group. With a ratio, A and B have
    learning rates of their own.
    """
    samples = world // size
    expected = zero_ranks.plain(3, samples, tmp_path / "plain", ratio=ratio)
    for losses in run_ranks(world, zero_ranks.zero, stage, size, 2, samples, tmp_path / "zero", None, offload, ratio):
        assert losses == pytest.approx(expected[:2], rel=1e-5)
    same(tmp_path / "zero", tmp_path / "plain" / "step-2")

    start = tmp_path / "plain" / "step-1"
    resumed = tmp_path / "resumed"
    for losses in run_ranks(world, zero_ranks.zero, stage, size, 1, samples, resumed, start, offload, ratio):
        assert losses == pytest.approx(expected[1:2], rel=1e-5)
    same(resumed, tmp_path / "plain" / "step-2")

    on = zero_ranks.plain(1, samples, tmp_path / "on", tmp_path / "zero", ratio)
    assert on == pytest.approx(expected[2:], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activations", "offload", "attentions"),
    [("none", False, 1), ("full", False, 2), ("selective", False, 1), ("selective", True, 1)],
)
def test_layers_are_compiled_within_zero3s_gathering(tmp_path, activations, offload, attentions):
    """Each layer is one graph; what a policy keeps, it keeps all the same, and no gathered weights."""
    parallel = ParallelConfig(strategy="zero3", activations=activations, offload_activations=offload)
    expected = zero_ranks.plain(3, 2, tmp_path / "plain")
    for rank in run_ranks(2, zero_ranks.zero3_compiled, parallel, tmp_path / "zero"):
        assert rank["losses"] == pytest.approx(expected, rel=1e-4)
        assert rank["graphs"] == 1
        assert rank["attentions"] == 3 * 3 * attentions  # steps, layers
    same(tmp_path / "zero", tmp_path / "plain" / "step-3")


def curve(folder):
    """(step, loss, gradient norm) of each step in a run's log."""
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["loss"]]
    return [(int(row["step"]), float(row["loss"]), float(row["grad_norm"])) for row in rows]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["parallel.strategy=zero3", "trainer.devices=2", "data.batch_size=1"], marks=pytest.mark.slow),
        pytest.param(
            [
                "parallel.strategy=zero3",
                "trainer.devices=2",
                "data.batch_size=1",
                "parallel.activations=selective",
                "trainer.compile=true",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(["parallel.strategy=zero1", "trainer.devices=2", "data.batch_size=1"], marks=pytest.mark.slow),
        pytest.param(
            ["parallel.strategy=zero2", "trainer.devices=4", "data.batch_size=1", "parallel.sequence=2"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_goes_on_with_zero_and_back(tmp_path, settings):
    """One process takes two steps, ZeRO through Lightning the next two, one process the last two."""
    config = run_config(tmp_path, data__batch_size=2, optim__accumulate=2, trainer__steps=6, trainer__keep=3)
    folder = RunFolder.create(config)
    train(config, folder)
    other = RunFolder.create(config)
    keep(folder.path, other.path, 2)
    script = HELPERS / "zero_on_cpu.py"
    done = subprocess.run(
        [sys.executable, str(script), f"resume={other.path}", *settings], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in curve(other.path)] == [0, 1, 2, 3, 4, 5]
    for got, expected in zip(curve(other.path), curve(folder.path), strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    same(other.path / "checkpoints" / "step-000006", folder.path / "checkpoints" / "step-000006")

    # what ZeRO's ranks saved, one process exports
    got, expected = (exported(run.path, tmp_path / f"export-{n}") for n, run in enumerate((other, folder)))
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-4)

    back = RunFolder.create(config)
    keep(other.path, back.path, 4)
    resume(back.path, config)
    for got, expected in zip(curve(back.path), curve(folder.path), strict=True):
        assert got == pytest.approx(expected, rel=1e-4)


def exported(run, out):
    export_run(run, out=out, formats=["peft"], merged=True)
    files = [*out.glob("peft/*.safetensors"), *out.glob("merged/**/*.safetensors")]
    assert len(files) == 2
    return {f"{file.parent.name}/{name}": x for file in files for name, x in load_file(file).items()}


def keep(run, copy, step):
    shutil.copytree(run / "checkpoints" / f"step-{step:06d}", copy / "checkpoints" / f"step-{step:06d}")
    shutil.copy(run / "metrics.csv", copy / "metrics.csv")
