"""Ranks that die, hang or break, for real: the run ends, says which and why, and resumes exactly."""

import os
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from tests.helpers import watching_ranks
from tests.helpers.faults import Run, at_step, damage, gone, losses, only_run, poisoned, run
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import run_config, words
from tests.helpers.two_ranks import STEPS, same_as, start_two
from train.callbacks.watchdog import Watchdog, patience, relieve_observer
from train.config.compose import compose_run, finish
from train.parallel.control_group import ControlGroup
from train.planning import GIB, GPUS, Machine
from train.shards import training_shards
from train.storage.checkpoints import checkpoints_of, load_state, load_weights
from train.storage.run_folder import get_state, set_state


def test_lightnings_observer_of_the_ranks_is_relieved():
    main = subprocess.Popen(["sleep", "60"])
    child = subprocess.Popen(["false"])
    child.wait()
    observer = _ChildProcessObserver(main.pid, [child], sleep_period=1)
    observer.start()
    try:
        relieve_observer()
        observer.join(10)
        assert not observer.is_alive() and main.poll() is None
    finally:
        main.kill()
        main.wait()


def test_a_run_is_as_patient_as_its_longest_step(tmp_path, monkeypatch):
    """40 dense layers of Wan 4x take 13.9 s each on an H200, forward and backward: more than trainer.timeout in all."""
    monkeypatch.setattr("train.planning.budget.this_machine", lambda *_: Machine(GPUS["h200"], 1, 1, 128 * GIB))
    config = finish(compose_run({"conf": "wan_4x"}))
    assert 0.8 < patience(config) / (3 * 40 * 13.9) < 1.25
    shorter = {"clip.frames": "81", "attention.dense_steps": "0"}
    assert patience(finish(compose_run({"conf": "wan_4x", **shorter}))) == config.trainer.timeout
    monkeypatch.undo()
    assert patience(run_config(tmp_path, trainer__timeout=7)) == 7


def test_a_watchdog_that_breaks_ends_the_run(tmp_path, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr("train.callbacks.watchdog.end_now", codes.append)
    dog = Watchdog(tmp_path, 5, ControlGroup())
    monkeypatch.setattr(dog, "look_at_family", lambda: {}[1])
    dog.watch()
    assert codes == [1]
    assert "error: the watchdog of rank 0 broke: KeyError(1)" in capsys.readouterr().err
    set_state(tmp_path, "failed", "sample x is damaged")
    dog.end("rank 0 was killed", speak=True)
    assert codes == [1, 2] and get_state(tmp_path) == ("failed", "sample x is damaged")
    assert capsys.readouterr().err == ""


def test_the_rank_that_finds_first_that_all_stand_still_says_so_for_good(tmp_path):
    """Ranks come seconds apart to where they hang: the first to give up ends before the others would have spoken."""
    set_state(tmp_path, "running")
    first, second = run_ranks(2, watching_ranks.stand_still, tmp_path)
    assert first["codes"] == second["codes"] == [1]
    assert second["found"] == first["last"] and first["last"][0] == "died"
    assert "no step for 1 s (trainer.timeout): every rank hangs in reading data after step 3" in first["last"][1]


def test_ranks_that_wait_for_one_that_works_alone_do_not_hang(tmp_path):
    """The first rank encodes prompts, or decodes a clip, for longer than trainer.timeout in all."""
    set_state(tmp_path, "running")
    assert run_ranks(2, watching_ranks.wait_for_the_first, tmp_path) == [[], []]
    assert get_state(tmp_path)[0] == "running"


@pytest.mark.slow
def test_a_mistake_of_one_rank_or_of_all_is_said_once(tmp_path):
    """A damaged sample, which one of the ranks reads; and a sample too large, for which all end."""
    config = run_config(tmp_path)
    copy = shutil.copytree(training_shards(config).folder, tmp_path / "shards")
    damage(copy, 7)
    alone = {"data__shards": copy, "data__max_bad": 0, "trainer__steps": 12}
    all_alike = {"data__shards": poisoned(config, tmp_path, 5).data.shards, "trainer__max_skipped": 0}
    for number, (given, reason) in enumerate([(alone, "at most 0 are skipped"), (all_alike, "trainer.max_skipped=0")]):
        runs = tmp_path / f"runs{number}"
        process = Run(*words(tmp_path, runs=runs, trainer__devices=2, data__synthetic_clips=0, **given))
        text = process.end()
        assert process.process.returncode == 2, text
        assert text.count("error: ") == 1 and text.count(reason) == 1 and "Traceback" not in text, text
        word, why = get_state(only_run(runs))
        assert word == "failed" and reason in why


def test_a_run_that_breaks_says_so_to_who_asks(tmp_path, monkeypatch):
    def breaks():
        raise ZeroDivisionError("a mistake of ours")

    with pytest.raises(ZeroDivisionError):
        run(run_config(tmp_path), at_step(2, breaks))
    assert get_state(only_run(tmp_path / "runs")) == ("died", "rank 0: a mistake of ours")
    watchdogs = [thread for thread in threading.enumerate() if thread.name == "watchdog"]
    for thread in watchdogs:
        thread.join(5)
    assert not any(thread.is_alive() for thread in watchdogs)  # else it would end this process in a while


@pytest.mark.slow
def test_data_that_never_comes_ends_the_run_with_where_it_hangs(tmp_path):
    shards = training_shards(run_config(tmp_path)).folder
    pipe = f"pipe:case {{}} in *.tar) sleep 1000;; *) cat {shards}/{{}};; esac"
    process = Run(*words(tmp_path, data__shards=pipe, data__synthetic_clips=0, trainer__timeout=5))
    text = process.end(240)
    assert process.process.returncode == 1
    assert "error: no step for 5 s (trainer.timeout): the run hangs in reading data after step 0; stacks: " in text
    folder = only_run(tmp_path / "runs")
    assert "most recent call first" in (folder / "stack-rank-0.txt").read_text(encoding="utf-8")
    assert get_state(folder)[0] == "died"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_the_run_resumes_exactly(two_ranks, tmp_path, rank):
    process, folder = start_two(tmp_path, 5)
    os.kill(process.ranks()[rank], signal.SIGKILL)
    text = process.end(240)
    end = time.monotonic() + 20
    while process.ranks()[1:] and time.monotonic() < end:
        time.sleep(0.2)
    assert "Traceback" not in text and "TCPStore" not in text, text
    assert ("error: rank 0 was killed" if rank == 0 else "error: rank 1 (process ") in text, text
    assert f"python -m train resume={folder} goes on from step-" in text
    same_as(folder, two_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_is_named_with_its_last_step(two_ranks, tmp_path, rank):
    process, folder = start_two(tmp_path, 3, trainer__timeout=6)
    frozen = process.ranks()[rank]
    os.kill(frozen, signal.SIGSTOP)
    text = process.end(240)
    assert f"rank {rank}" in text and "gives no sign of life" in text, text
    assert gone(frozen)
    same_as(folder, two_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_again_and_again_a_run_resumes_exactly(two_ranks, tmp_path, seed):
    """kill -9 of a rank or of all, five times at random moments: many fall into the writing of a checkpoint.

    Each start leads to a kill some steps later, so that a run which was killed and resumed is killed again.
    """
    generator = torch.Generator().manual_seed(seed)
    start = words(tmp_path, trainer__devices=2, trainer__steps=STEPS, trainer__checkpoint_every=1, trainer__keep=STEPS)
    for kill in range(5):
        before = sum(len(losses(f)) for f in tmp_path.glob("runs/shapes_4x/*"))
        step = before + 1 + int(3 * torch.rand(1, generator=generator))
        process = Run(*start)
        process.wait_for(lambda step=step: any(len(losses(f)) >= step for f in tmp_path.glob("runs/shapes_4x/*")))
        time.sleep(0.3 * float(torch.rand(1, generator=generator)))
        if (seed + kill) % 3 == 0:
            process.kill()
        else:
            os.kill(process.ranks()[kill % 2], signal.SIGKILL)
        text = process.end(240)
        folder = only_run(tmp_path / "runs")
        assert process.process.returncode and get_state(folder)[0] in ("running", "died"), text
        for path in checkpoints_of(folder / "checkpoints"):
            load_state(path), load_weights(path)
        start = [f"resume={folder}"]
    same_as(folder, two_ranks)
