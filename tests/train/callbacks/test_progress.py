"""A terminal that closes and an output that is full: training, and every other command, goes on without them."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.helpers.faults import losses, only_run
from tests.helpers.tiny import words
from train.storage.checkpoints import checkpoints_of
from train.storage.run_folder import get_state

STEPS = 40


def started(command, output, **given):
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        **given,
    )


def read_until(terminal, word, process):
    """Reads what the process prints to a terminal until it is the word."""
    seen = b""
    while word not in seen:
        assert process.poll() is None, seen
        seen += os.read(terminal, 4096)
    return seen


def own_terminal():
    """In the new process: standard output becomes the terminal that is its own, whose end is told by SIGHUP."""
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize(
    "ignored", [pytest.param(True, marks=pytest.mark.slow), False], ids=["SIGHUP ignored", "SIGHUP"]
)
def test_a_run_survives_the_end_of_its_terminal(tmp_path, ignored):
    """Under nohup it trains to its end; else it saves a checkpoint and says that it wants to go on."""
    terminal, other = pty.openpty()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        command = ["train", *words(tmp_path, trainer__steps=STEPS, trainer__checkpoint_every=STEPS)]
        process = started(command, other, preexec_fn=own_terminal)
    finally:
        signal.signal(signal.SIGHUP, before)
    os.close(other)
    read_until(terminal, b"step 2/", process)
    os.close(terminal)
    code = process.wait(120)
    folder = only_run(tmp_path / "runs")
    trained, saved = len(losses(folder)), checkpoints_of(folder / "checkpoints")
    if ignored:
        assert (code, get_state(folder)[0], trained) == (0, "done", STEPS)
        assert (folder / "export").is_dir() and "the run is done" in (folder / "log.txt").read_text(encoding="utf-8")
    else:
        assert (code, get_state(folder)[0]) == (75, "requeue")
        assert 2 <= trained < STEPS and [path.name for path in saved] == [f"step-{trained:06d}"]


@pytest.mark.slow
def test_a_run_whose_output_is_full_trains_and_exports(tmp_path):
    with Path("/dev/full").open("wb") as full:
        process = started(["train", *words(tmp_path)], full)
        assert process.wait(120) == 0
        folder = only_run(tmp_path / "runs")
        assert get_state(folder)[0] == "done" and len(losses(folder)) == 4
        out = tmp_path / "again"
        assert started(["train.export", f"run={folder}", f"out={out}"], full).wait(120) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in (folder / "export").iterdir()}
