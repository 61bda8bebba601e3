"""A memory that is full, before, in and after training: the run ends with its reason and the cheapest remedies."""

import re

import pytest
import torch
import torch.distributed as dist

from tests.helpers import HELPERS
from tests.helpers.faults import Run, gone, only_run, run
from tests.helpers.tiny import run_config, words
from train.callbacks.watchdog import Watchdog
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.parallel.control_group import ControlGroup
from train.planning import GIB, GPUS, Machine
from train.planning.full_memory import cheapest, is_out_of_memory, out_of_memory
from train.storage.run_folder import get_state


def test_a_full_gpu_is_told_with_the_cheapest_remedies(tmp_path, monkeypatch):
    config = run_config(tmp_path)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.99 GiB. GPU 0 has ...")

    monkeypatch.setattr("train.models.families.wan.WanAdapter.velocity", full)
    with pytest.raises(UserError, match=r"rank 0: out of memory.*Cheapest first: .*parallel.activations"):
        run(config)


@pytest.mark.parametrize("where", ["train.assemble.load_adapter", "train.run.write_report"])
def test_a_full_gpu_before_and_after_training_is_told_too(tmp_path, monkeypatch, where):
    def full(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(where, full)
    with pytest.raises(UserError, match=r"^rank 0: out of memory: CUDA error: out of memory. Cheapest first: "):
        run(run_config(tmp_path, trainer__steps=1))
    folder = only_run(tmp_path / "runs")
    assert get_state(folder)[0] == "failed"
    assert "train.storage.run_folder: the run is failed: rank 0: out of memory: CUDA" in (folder / "log.txt").read_text(
        encoding="utf-8"
    )


def test_what_nccl_says_of_a_full_memory_and_of_a_lost_rank_is_told_apart(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(Watchdog, "end", lambda dog, why, speak: ended.append(why))
    monkeypatch.setattr("train.callbacks.watchdog.time.sleep", lambda seconds: None)
    dog = Watchdog(tmp_path, 5, ControlGroup())
    head = "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.27.3\n"
    full = dist.DistBackendError(f"{head}Last error:\nCuda failure 2 'out of memory'")
    assert is_out_of_memory(full)
    assert "rank 1: out of memory: Cuda failure 2 'out of memory'. Ch" in out_of_memory(run_config(tmp_path), full, 1)
    for error in (
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
        RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1"),
        dist.DistBackendError(head),
        RuntimeError("a mistake of ours"),
    ):
        assert not is_out_of_memory(error)
        dog.explain(error)
    assert [why.split(":")[0] for why in ended] == [
        *["rank 0 has lost another rank"] * 2,
        "rank 0 cannot reach the others",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["load", "step", "report"])
def test_a_full_gpu_of_another_rank_ends_the_run_with_its_reason(tmp_path, where):
    # a report is of all ranks that share a clip
    given = {"trainer__devices": 2, "parallel__sequence": 2, "report__clips": 32, "report__short_frames": 0}
    script = HELPERS / "full_memory.py"
    process = Run(*words(tmp_path, **given), environment={"FULL_AT": where}, script=script)
    text = process.end(240)
    assert process.process.returncode == 2, text
    assert text.count("error: ") == 1 and "error: rank 1: out of memory: " in text and "Traceback" not in text, text
    word, why = get_state(only_run(tmp_path / "runs"))
    assert word == "failed" and "Cheapest first" in why
    assert all(gone(pid) for pid in process.ranks()[1:])


def test_three_remedies_of_the_plan_for_a_large_model(monkeypatch):
    machine = Machine(GPUS["a100"], 1, 1, 128 * GIB)
    monkeypatch.setattr("train.planning.budget.this_machine", lambda *_: machine)
    found = cheapest(finish(compose_run({"conf": "wan_4x", "parallel.activations": "auto"})))
    assert len(set(found)) == 3
    assert not any("gpu=a100:" in remedy for remedy in found)


def test_more_gpus_are_a_remedy_and_fewer_are_none(monkeypatch):
    machine = Machine(GPUS["h200"], 8, 1, 8 * 128 * GIB)
    monkeypatch.setattr("train.planning.budget.this_machine", lambda *_: machine)
    found = cheapest(finish(compose_run({"conf": "wan_4x", "trainer.devices": "8", "optim.accumulate": "1"})))
    counts = [int(number) for remedy in found for number in re.findall(r"^(\d+) GPUs of this kind", remedy)]
    assert found and all(count > 8 for count in counts)
