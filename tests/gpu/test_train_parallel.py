"""Sequence parallelism over NCCL, and Lightning with DeepSpeed, on real GPUs: the numbers of one GPU."""

import csv
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny import words

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
pair = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
four = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
SHARED = {"data__batch_size": 2, "optim__accumulate": 2, "trainer__steps": 3, "trainer__precision": "fp32"}
COMPILED = {"trainer__compile": True, "parallel__activations": "selective"}


def train(*command):
    """The command, which has to end: ranks that wait for each other at their exits once did not."""
    return subprocess.run([sys.executable, "-m", "train", *command], capture_output=True, encoding="utf-8", timeout=900)


def run(tmp_path, name, **changes):
    """(loss, gradient norm) of each step, and the trained weights."""
    command = words(tmp_path, runs=tmp_path / name, **{**SHARED, **changes})
    done = train(*command)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / name / "shapes_4x").iterdir()
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        rows = [(float(r["loss"]), float(r["grad_norm"])) for r in csv.DictReader(stream) if r["loss"]]
    return rows, load_file(folder / "checkpoints" / "step-000003" / "weights.safetensors"), folder


def same(got, expected, tolerance):
    assert len(got) == len(expected) == 3
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=tolerance)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_zero_on_one_gpu(tmp_path, strategy):
    expected, weights, _ = run(tmp_path, "plain")
    got, spread, _ = run(tmp_path, strategy, parallel__strategy=strategy)
    same(got, expected, 1e-3)
    assert spread.keys() == weights.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__strategy": "zero2", "parallel__offload_optimizer": True},
        {"parallel__strategy": "zero3", "parallel__offload_optimizer": True, "parallel__offload_parameters": True},
        {"parallel__activations": "full", "parallel__offload_activations": True, "parallel__ffn_chunk": 100},
        {"parallel__offload_activations": True, **COMPILED},
        {"parallel__offload_weights": True},
        {"parallel__offload_weights": True, "parallel__activations": "full", "parallel__offload_activations": True},
        {"parallel__offload_weights": True, "parallel__strategy": "zero2"},
        {"parallel__offload_weights": True, **COMPILED},
        {"parallel__offload_weights": True, "parallel__offload_activations": True, **COMPILED},
        {"parallel__offload_weights": True, "trainer__compile": True},
        COMPILED,
        {"parallel__strategy": "zero3", **COMPILED},
    ],
)
def test_offload_and_memory_policies(tmp_path, changes):
    clip = {"clip__frames": 32}  # what a layer keeps is 2 MiB: smaller tensors are not worth moving
    expected, _, _ = run(tmp_path, "plain", **clip)
    got, _, _ = run(tmp_path, "changed", **clip, **changes)
    same(got, expected, 1e-3)


@pair
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2"])
def test_two_gpus_stream_the_weights_of_one_machine(tmp_path, strategy):
    streams = {"parallel__offload_weights": True, "parallel__sequence": 2, **COMPILED}
    expected, _, _ = run(tmp_path, "one", data__batch_size=4)
    got, _, _ = run(tmp_path, "two", data__batch_size=4, trainer__devices=2, parallel__strategy=strategy, **streams)
    same(got, expected, 1e-3)


@pytest.mark.parametrize("changes", [{}, {"parallel__offload_weights": True}, COMPILED])
def test_weights_stored_in_float8_train(tmp_path, changes):
    expected, _, _ = run(tmp_path, "plain", trainer__precision="bf16")
    got, _, _ = run(tmp_path, "stored", trainer__precision="bf16", model__storage="fp8", **changes)
    same(got, expected, 0.2)
    assert got != expected


@pair
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_compiled_layers_on_two_gpus(tmp_path, strategy):
    expected, _, _ = run(tmp_path, "one", data__batch_size=4)
    got, _, _ = run(tmp_path, "two", trainer__devices=2, parallel__strategy=strategy, **COMPILED)
    same(got, expected, 1e-3)


@pair
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_two_gpus_that_share_each_clip(tmp_path, strategy, precision, tolerance):
    # one dtype on both sides; a token count that two ranks cannot split evenly
    odd = {"clip__frames": 5, "clip__height": 20, "clip__width": 20, "attention__block": 64}
    expected, _, _ = run(tmp_path, "one", **odd, trainer__precision=precision)
    shared = {**odd, "parallel__sequence": 2, "trainer__devices": 2, "parallel__strategy": strategy}
    got, _, folder = run(tmp_path, "two", **shared, trainer__precision=precision)
    same(got, expected, tolerance)
    resumed = [f"resume={folder}", "trainer.devices=1", "parallel.sequence=1", "parallel.strategy=ddp"]
    done = train(*resumed)
    assert done.returncode == 0, done.stderr  # a finished run exports and reports in any layout


@four
@pytest.mark.parametrize(("strategy", "compiled"), [("ddp", {}), ("zero2", {}), ("zero3", COMPILED)])
def test_four_gpus_in_pairs_that_share_each_clip(tmp_path, strategy, compiled):
    expected, _, _ = run(tmp_path, "one", data__batch_size=4)
    shared = {"parallel__sequence": 2, "trainer__devices": 4, "parallel__strategy": strategy}
    got, _, _ = run(tmp_path, "four", **shared, **compiled)
    same(got, expected, 1e-3)
