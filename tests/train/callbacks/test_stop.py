"""Signals, for real: a run stops in order wherever they reach it, and goes on with nothing lost."""

import os
import re
import signal
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

import train.run
from radial.cli import command as commands
from tests.helpers.faults import Run, at_step, equal_checkpoints, gone, losses, only_run, run
from tests.helpers.slurm import wait_until
from tests.helpers.tiny import run_config, words
from tests.helpers.two_ranks import same_as, start_two
from train.callbacks.stop import StopSignals
from train.errors import EXIT_CODES, REQUEUE, STOP
from train.flow import noise_like
from train.loggers.services import wandb_closed
from train.parallel.control_group import ControlGroup
from train.run import resume
from train.storage.checkpoints import checkpoints_of, load_state
from train.storage.run_folder import TIME_UP, get_state, set_state


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


def test_the_signal_before_the_end_of_the_time_is_told_from_a_preemption(tmp_path):
    # the last start forgets what the one before noted
    for number, rank, noted in ((signal.SIGUSR1, 1, False), (signal.SIGUSR1, 0, True), (signal.SIGTERM, 0, False)):
        stop = StopSignals(tmp_path, rank, ControlGroup())
        with stop.listening():
            os.kill(os.getpid(), number)
            wait_until(lambda stop=stop: stop.asked == REQUEUE)
        assert (tmp_path / TIME_UP).exists() == noted


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
        module = {"clips": "train.callbacks.clips", "validation": "train.measures.losses"}[where]
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
        ("train.measures.losses.noise_like", 15, 36, 75),  # the third clip of the second of four rows: three are left
        ("train.report.held_out_losses.generate", 2, 2, 130),  # the second of three clips
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


def test_an_interrupt_that_comes_again_while_the_state_is_written_changes_nothing(tmp_path, monkeypatch):
    """A run whose state stays "running" would be queued again, though its user wants the end."""
    ended, real = [], train.run.how_to_go_on

    def again(folder):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # Python's own handler would raise in here
        return real(folder)

    monkeypatch.setattr("train.callbacks.stop.end_now", ended.append)  # it may come too late to be the same wish
    monkeypatch.setattr("train.run.how_to_go_on", again)
    with pytest.raises(SystemExit) as end:
        run(run_config(tmp_path), at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert end.value.code == 130 and ended in ([], [130])
    assert get_state(only_run(tmp_path / "runs"))[0] == "stopped"


def test_a_late_second_interrupt_leaves_the_state_of_a_run_that_is_done(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr("train.callbacks.stop.end_now", ended.append)
    monkeypatch.setattr("train.callbacks.stop._ONE_WISH", -1.0)
    set_state(tmp_path, "done")
    stop = StopSignals(tmp_path, 0, ControlGroup())
    with stop.listening():
        for count in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: stop.asked == STOP)
            wait_until(lambda count=count: len(ended) == count)
    assert get_state(tmp_path)[0] == "done"


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
def test_a_signal_to_one_rank_stops_all_in_order(two_ranks, tmp_path):
    process, folder = start_two(tmp_path, 4)
    os.kill(process.ranks()[1], signal.SIGTERM)
    text = process.end(240)
    assert process.process.returncode == 75, text
    assert get_state(folder)[0] == "requeue"
    (last,) = checkpoints_of(folder / "checkpoints")[-1:]
    assert load_state(last)["global_step"] == len(losses(folder))
    same_as(folder, two_ranks)
