"""``python -m launch logs``: what a run has printed."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from launch.start import recorded, run_argument, yes
from train.errors import UserError
from train.folder import holder

USAGE = """python -m launch logs RUN [lines=N] [follow=true]

The last N lines (40 by default) of what a run printed: of its SLURM job's output, or of log.txt in its folder, which
has every rank's warnings. With follow=true what comes is printed until the run ends or Ctrl-C.
"""


def main(arguments: list[str]) -> None:
    """Prints them."""
    folder, settings = run_argument(arguments, "lines", "follow")
    follow = yes(settings, "follow")
    count = settings.get("lines", "40")
    if not count.isdigit():
        raise UserError(f"lines is {count!r}, expected a whole number")
    about = recorded(folder)
    file = log_file(folder, about.get("job"))
    while follow and not file.exists():
        time.sleep(1)
    if not file.exists():
        waits = f": SLURM job {about['job']} has not started" if about.get("job") else ""
        raise UserError(f"{folder} has no output yet{waits}")
    with contextlib.suppress(KeyboardInterrupt):
        _show(file, int(count), folder if follow else None)


def log_file(folder: Path, job: str | None) -> Path:
    """Where the run's output is."""
    return folder / (f"slurm-{job}.out" if job else "log.txt")


def _show(file: Path, count: int, while_running: Path | None) -> None:
    with file.open(errors="replace") as stream:
        # a progress line is written over itself
        lines = [line.rstrip("\n").split("\r")[-1] for line in stream]
        print("\n".join(lines[-count:] if count else []), flush=True)
        while while_running is not None:
            text = stream.read()
            sys.stdout.write(text)
            sys.stdout.flush()
            if not text:
                if holder(while_running) is None:
                    return
                time.sleep(0.5)
