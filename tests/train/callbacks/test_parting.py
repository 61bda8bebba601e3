"""The exits of processes whose groups do not end, as NCCL's may not."""

import subprocess
import sys

import pytest

from train.storage.run_folder import set_state

PROCESS = """
import atexit, sys, threading
from pathlib import Path

from train.callbacks.parting import part, parting
from train.callbacks.stop import StopSignals
from train.parallel.control_group import ControlGroup

folder, rank, agreed, fails = Path(sys.argv[1]), *map(int, sys.argv[2:])
control = ControlGroup()
control.rank, control.world, control.close = rank, 2, lambda: False
stop = StopSignals(folder, rank, control)
stop.agreed = agreed
atexit.register(threading.Event().wait)  # Lightning's end of the groups
print("last words")
with parting(folder, stop):
    if fails:
        raise SystemExit(2)
"""


@pytest.mark.parametrize(
    ("rank", "agreed", "fails", "state", "code"),
    [
        (0, 0, 0, "running", 0),
        (0, 1, 0, "stopped", 130),
        (0, 2, 0, "requeue", 75),
        (1, 1, 0, "running", 0),
        (1, 2, 0, "running", 0),
        (0, 0, 1, "failed", 2),
        (0, 0, 1, "died", 1),
        (0, 0, 1, "running", 1),
    ],
)
def test_a_process_ends_as_its_run_stands_and_waits_for_no_group(tmp_path, rank, agreed, fails, state, code):
    """Of a run that stops, rank 0 alone has an exit code: srun and torchrun end all ranks once one has failed."""
    set_state(tmp_path, state)
    command = [sys.executable, "-c", PROCESS, tmp_path, *map(str, (rank, agreed, fails))]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert (done.returncode, done.stdout) == (code, "last words\n"), done.stderr
