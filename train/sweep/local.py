"""The runs of a sweep on this machine, one after the other.

Each is ``python -m train resume=<its folder>``, a process of its own, so that a run that crashes or is killed for its
memory ends alone. What a run prints goes to ``output.txt`` in its folder. A signal that asks the sweep to stop is
passed on to the run that is on: it saves a checkpoint and ends (`train.callbacks.stop`), and no other is started.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.errors import EXIT_CODES, REQUEUE, STOP
from train.report.runs import Run
from train.storage.run_folder import get_state, set_state
from train.storage.sweep_folder import OUTPUT, SweepFolder


class LocalRuns:
    """Runs what is unfinished of a sweep.

    Args:
        program: what is started for each run, with ``resume=<its folder>``.

    Attributes:
        failed: numbers of the runs that did not come to their end by themselves.
        asked: what a signal asked for, as in `train.errors`; 0 for nothing.
    """

    def __init__(self, sweep: SweepFolder, program: Sequence[str] = (sys.executable, "-m", "train")) -> None:
        self.sweep = sweep
        self.program = program
        self.failed: list[int] = []
        self.asked = 0
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Runs them, with a line for each: its number, its settings, how it ended and its result."""
        total = len(self.sweep.settings)
        width = max(len(self.sweep.label(number)) for number in range(total))
        with self._listening():
            for number in range(total):
                if self.asked:
                    return
                print(f"{number:>{len(str(total))}}  {self.sweep.label(number):<{width}}  ", end="", flush=True)
                folder = self.sweep.run(number)
                if get_state(folder)[0] == "done":
                    print(f"was done before, {Run.read(folder).result}")
                    continue
                start = time.monotonic()
                code, said = self._run_one(folder)
                if code == 0:
                    print(f"done in {(time.monotonic() - start) / 60:.1f} min, {Run.read(folder).result}")
                    continue
                print(self._ending(folder, code, said), flush=True)
                if not self.asked:
                    self.failed.append(number)
                    if get_state(folder)[0] == "new":  # it ended before it could say so itself
                        set_state(folder, "failed", f"{_how(code)}: {said}")

    def _run_one(self, folder: Path) -> tuple[int, str]:
        """Runs one to its end.

        Returns:
            The exit code, below 0 the number of the signal that ended it; and the last error that it printed, the last
            line where there is none.
        """
        command = [*self.program, f"resume={folder}"]
        with (folder / OUTPUT).open("ab") as output:
            start = output.tell()
            # in a session of its own: Ctrl-C would otherwise reach it twice, which ends it without a checkpoint
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        if self.asked:  # a signal came while it was started
            self._process.send_signal(signal.SIGINT if self.asked == STOP else signal.SIGTERM)
        try:
            code = self._process.wait()
        finally:
            self._process = None
        printed = (folder / OUTPUT).read_bytes()[start:].decode(errors="replace")
        lines = [line for line in printed.replace("\r", "\n").split("\n") if line.strip()]
        lines = [line for line in lines if line.startswith("error: ")] or lines
        return code, lines[-1].strip().removeprefix("error: ") if lines else "nothing was printed"

    def _ending(self, folder: Path, code: int, said: str) -> str:
        """How a run ended that did not finish, in words."""
        if code in EXIT_CODES.values():
            return f"stopped: {get_state(folder)[1]}"
        if self.asked:  # before the run listened for signals, or in haste
            return f"stopped, {_how(code)}"
        return f"failed, {_how(code)}: {said} ({folder / OUTPUT})"

    @contextmanager
    def _listening(self) -> Iterator[None]:
        taken = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in taken}
        for number in taken:
            if number != signal.SIGHUP or before[number] != signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        self.asked = STOP if number == signal.SIGINT or self.asked == STOP else REQUEUE
        if self._process is not None:
            self._process.send_signal(number)


def _how(code: int) -> str:
    """An exit code, or the name of the signal where it is below 0."""
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
