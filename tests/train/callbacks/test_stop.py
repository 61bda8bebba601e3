"""What ends or stops a run from within or without: a full memory, signals, ranks that die or hang, for real."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from radial.cli import command as commands
from tests.helpers import HELPERS
from tests.helpers.faults import (
    Run,
    at_step,
    damage,
    equal_checkpoints,
    gone,
    losses,
    only_run,
    poisoned,
    run,
)
from tests.helpers.slurm import wait_until
from tests.helpers.tiny import run_config, words
from train.callbacks.stop import StopSignals
from train.callbacks.watchdog import Watchdog, patience, relieve_observer
from train.config.compose import compose_run, finish
from train.errors import EXIT_CODES, REQUEUE, STOP, UserError
from train.flow import noise_like
from train.loggers.services import wandb_closed
from train.parallel.control_group import ControlGroup
from train.planning import GIB, GPUS, Machine
from train.planning.full_memory import cheapest, is_out_of_memory, out_of_memory
from train.run import resume
from train.shards import training_shards
from train.storage.checkpoints import checkpoints_of, load_state, load_weights
from train.storage.run_folder import get_state, set_state

STEPS = 30
"""Of the runs of two processes: room for five kills in a row."""


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


def test_a_signal_while_the_ranks_agree_counts_for_the_next_step(tmp_path):
    class Late(ControlGroup):
        def any(self, flags):
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop.asked:
                time.sleep(0.01)
            return flags

    stop = StopSignals(tmp_path, 1, Late())
    trainer = SimpleNamespace(global_step=1, should_stop=False)
    with stop.listening():
        stop.on_train_batch_end(trainer, None)
        assert (stop.asked, stop.agreed, trainer.should_stop) == (REQUEUE, 0, False)
        trainer.global_step = 2
        stop.on_train_batch_end(trainer, None)
    assert (stop.agreed, trainer.should_stop) == (REQUEUE, True)


@pytest.mark.parametrize("where", ["clips", "validation"])
def test_a_signal_in_the_middle_of_what_takes_long_is_not_kept_waiting(tmp_path, monkeypatch, where):
    given = {
        "clips": {"samples_every": 2, "samples_steps": 3, "prompts": "[a, b, c]"},
        "validation": {"every": 2, "clips": 3},
    }
    config = run_config(tmp_path, **{f"validation__{key}": value for key, value in given[where].items()})
    plain = run(run_config(tmp_path, runs=tmp_path / "plain"))
    asked = []

    def ask(*words):
        (folder,) = (tmp_path / "runs" / "shapes_4x").iterdir()
        asked.append(checkpoints_of(folder / "checkpoints"))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return noise_like(*words)

    with monkeypatch.context() as patch:
        module = {"clips": "train.callbacks.clips", "validation": "train.evaluation.losses"}[where]
        patch.setattr(f"{module}.noise_like", ask)
        with pytest.raises(SystemExit) as end:
            run(config)
    folder = only_run(tmp_path / "runs")
    assert end.value.code == 75 and get_state(folder)[0] == "requeue"
    (saved,) = asked
    assert len(saved) == (where == "clips")  # a checkpoint waits for its validation, and not for clips
    assert [path.name for path in checkpoints_of(folder / "checkpoints")] == ["step-000002"]
    assert not list(folder.rglob("*.mp4")) and not (folder / "checkpoints" / "best.json").exists()
    resume(folder, config)
    assert losses(folder) == losses(plain)


@pytest.mark.parametrize(("micro_batch", "saved"), [(0, []), (4, ["step-000001"])], ids=["first step", "second step"])
def test_a_stop_between_accumulated_micro_batches_loses_nothing(tmp_path, monkeypatch, micro_batch, saved):
    given = {"optim__accumulate": 3, "trainer__steps": 3, "trainer__checkpoint_every": 100}
    plain = run(run_config(tmp_path, runs=tmp_path / "plain", **given))
    config = run_config(tmp_path, **given)

    class Signal(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, *_):
            assert batch.step <= micro_batch
            if batch.step == micro_batch:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)

    with monkeypatch.context() as patch:
        patch.setattr("train.assemble.Progress", lambda figures: Signal())
        with pytest.raises(SystemExit) as end:
            run(config)
    folder = only_run(tmp_path / "runs")
    assert end.value.code == 75 and [path.name for path in checkpoints_of(folder / "checkpoints")] == saved
    assert get_state(folder)[1].endswith("goes on from step-000001" if saved else "as there is no checkpoint yet")
    assert not saved or load_state(folder / "checkpoints" / saved[0])["position"] == 3
    resume(folder, config)
    assert losses(folder) == losses(plain)
    assert equal_checkpoints(*(path / "checkpoints" / "step-000003" for path in (folder, plain)))


REPORT = {"trainer__steps": 2, "report__clips": 12, "report__short_frames": 0, "report__sampling_steps": 3}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """An undisturbed run of two steps with a table and an animation."""
    return run(run_config(tmp_path_factory.mktemp("reported"), **REPORT))


def interrupting(what, at, signal_number):
    """``what`` that asks the run to stop at its call number ``at``, and a list that grows with each call."""
    calls = []

    def called(*arguments, **named):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal_number)
            time.sleep(0.2)
        return what(*arguments, **named)

    return called, calls


@pytest.mark.parametrize(
    ("name", "at", "left", "code"),
    [
        ("train.evaluation.losses.noise_like", 15, 36, 75),  # the third clip of the second of four rows: three are left
        ("train.report.held_out.generate", 2, 2, 130),  # the second of three clips
        ("train.export.run.verify", 2, 4, 75),  # the second of four formats
    ],
    ids=["table", "animation", "export"],
)
def test_a_signal_after_training_leaves_what_is_not_finished_to_the_resume(
    reported, tmp_path, monkeypatch, name, at, left, code
):
    config = run_config(tmp_path, **REPORT)
    module, _, function = name.rpartition(".")
    real = getattr(sys.modules[module], function)
    number = signal.SIGINT if code == 130 else signal.SIGTERM
    with monkeypatch.context() as patch:
        called, calls = interrupting(real, at, number)
        patch.setattr(name, called)
        with pytest.raises(SystemExit) as end:
            run(config)
    folder = only_run(tmp_path / "runs")
    assert end.value.code == code and len(calls) == at
    assert get_state(folder)[0] == ("stopped" if code == 130 else "requeue")
    assert (folder / "export").exists() == ("export" not in name)
    assert not (folder / "clips.gif").exists() and not list(folder.glob("**/*.tmp*"))
    called, calls = interrupting(real, 0, number)
    monkeypatch.setattr(name, called)
    resume(folder, config)
    assert len(calls) == left
    assert get_state(folder)[0] == "done" and not (folder / ".unfinished").exists()
    for file in ("report.json", "clips.gif"):
        assert (folder / file).read_bytes() == (reported / file).read_bytes(), file
    one, other = (load_file(path / "export" / "comfyui" / "shapes_4x.safetensors") for path in (folder, reported))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [1, 2])
def test_so_it_does_where_ranks_work_together(tmp_path, sharing):
    """The signal reaches the first rank alone, which tells the one that shares its clips."""
    given = {**REPORT, "trainer__devices": 2, "parallel__sequence": sharing, "report__clips": 200}
    process = Run(*words(tmp_path, **given))
    process.wait_for(lambda: bool(list(tmp_path.glob("runs/shapes_4x/*/.unfinished/*.safetensors"))))
    os.kill(process.process.pid, signal.SIGTERM)
    text = process.end(240)
    assert process.process.returncode == 75 and "Traceback" not in text, text
    folder = only_run(tmp_path / "runs")
    assert get_state(folder)[0] == "requeue" and not (folder / "report.json").exists()
    text = Run(f"resume={folder}").end(240)
    assert get_state(folder)[0] == "done" and not re.search(r"(?m)^base, dense:", text), text
    assert (folder / "report.json").exists() and not (folder / ".unfinished").exists()


def test_an_interrupt_before_a_run_listens_is_a_line(capsys):
    def command(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        commands.run(command, lambda words: "", [])
    assert end.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"


def test_an_interrupt_that_arrives_twice_within_a_moment_is_one_wish(tmp_path, monkeypatch):
    """torchrun passes on what the terminal has sent to its ranks already; SLURM signals a step twice."""
    ended, asked_the_time, now = [], [], [100.0]
    clock = SimpleNamespace(monotonic=lambda: asked_the_time.append(now[0]) or now[0])
    monkeypatch.setattr("train.callbacks.stop.end_now", ended.append)
    monkeypatch.setattr("train.callbacks.stop.time", clock)
    stop = StopSignals(tmp_path, 1, ControlGroup())
    with stop.listening():
        for later, times in ((0.0, 1), (0.1, 3), (0.7, 5)):
            assert not ended
            now[0] = 100 + later
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda times=times: len(asked_the_time) == times)
            assert stop.asked == STOP
    assert ended == [130]


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(tmp_path):
    """Rank 1 is frozen, so that the step of the first interrupt never ends: rank 0 waits for it outside of Python."""
    process, folder = start_two(tmp_path, 3)
    frozen = process.ranks()[1]
    os.kill(frozen, signal.SIGSTOP)
    time.sleep(2)
    os.kill(process.process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.process.poll() is None
    os.kill(process.process.pid, signal.SIGINT)
    text = process.end(240)
    assert process.process.returncode == 130
    assert "SIGINT: saving a checkpoint and stopping; again: at once" in text and "Traceback" not in text
    assert get_state(folder)[0] == "stopped"
    assert gone(frozen)


def test_a_run_is_as_patient_as_its_longest_step(tmp_path, monkeypatch):
    """40 dense blocks of Wan 4x take 13.9 s each on an H200, forward and backward: more than trainer.timeout in all."""
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


def test_more_gpus_are_a_remedy_and_fewer_are_none(monkeypatch):
    machine = Machine(GPUS["h200"], 8, 1, 8 * 128 * GIB)
    monkeypatch.setattr("train.planning.budget.this_machine", lambda *_: machine)
    found = cheapest(finish(compose_run({"conf": "wan_4x", "trainer.devices": "8", "optim.accumulate": "1"})))
    counts = [int(number) for remedy in found for number in re.findall(r"^(\d+) GPUs of this kind", remedy)]
    assert found and all(count > 8 for count in counts)


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


@pytest.mark.parametrize(("code", "told"), [(EXIT_CODES[REQUEUE], 0), (2, 1), (None, 0)])
def test_weights_and_biases_takes_a_requeue_for_no_failure(monkeypatch, code, told):
    ended = []
    wandb = SimpleNamespace(run=True, finish=lambda exit_code: ended.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with suppress(SystemExit), wandb_closed():
        if code is not None:
            raise SystemExit(code)
    assert ended == [told]


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


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """An undisturbed run of two processes."""
    tmp_path = tmp_path_factory.mktemp("two")
    text = Run(*words(tmp_path, trainer__devices=2, trainer__steps=STEPS)).end()
    folder = only_run(tmp_path / "runs")
    assert len(losses(folder)) == STEPS, text
    return folder


def start_two(tmp_path, step, **changes):
    """A run of two processes that has made so many steps; its folder."""
    process = Run(*words(tmp_path, trainer__devices=2, trainer__steps=STEPS, **changes))
    process.wait_for(lambda: any(len(losses(f)) >= step for f in tmp_path.glob("runs/shapes_4x/*")))
    return process, only_run(tmp_path / "runs")


def same_as(folder, whole):
    """The run, resumed until its end, has the losses and the state of the undisturbed one, bit for bit."""
    text = Run(f"resume={folder}").end()
    assert losses(folder) == losses(whole), text
    assert equal_checkpoints(folder / "checkpoints" / f"step-{STEPS:06d}", whole / "checkpoints" / f"step-{STEPS:06d}")


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


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_in_order(two_ranks, tmp_path):
    process, folder = start_two(tmp_path, 4)
    os.kill(process.ranks()[1], signal.SIGTERM)
    text = process.end(240)
    assert process.process.returncode == 75, text
    assert get_state(folder)[0] == "requeue"
    (last,) = checkpoints_of(folder / "checkpoints")[-1:]
    assert load_state(last)["global_step"] == len(losses(folder))
    same_as(folder, two_ranks)
