"""The end of a run on several ranks: their groups end together, and no process waits for an end that does not come.

Lightning ends the groups when a process exits, and NCCL's end can wait for ranks that come late or not at all.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from train.callbacks.stop import StopSignals
from train.errors import EXIT_CODES
from train.parallel.processes import end_now
from train.storage.run_folder import get_state


@contextmanager
def parting(folder: Path, stop: StopSignals) -> Iterator[None]:
    """Around what ranks do last. One that fails in it leaves its groups, which others still need, as they are.

    Args:
        folder: of the run, whose state tells the exit code.
    """
    try:
        yield
    except BaseException:
        if stop.control.world > 1:
            atexit.register(_leave, folder, stop, otherwise=1)
        raise
    part(folder, stop)


def part(folder: Path, stop: StopSignals) -> None:
    """All ranks have done what they do together. Where their groups do not end, this process leaves out at its exit
    what Lightning would do there, which is to wait for that."""
    if not stop.control.close():
        atexit.register(_leave, folder, stop, otherwise=0)


def _leave(folder: Path, stop: StopSignals, *, otherwise: int) -> None:
    """Ends this process with the exit code of how the run stands, else ``otherwise``; nothing that follows is done."""
    with suppress(OSError, ValueError):  # nobody may read it any more
        sys.stdout.flush()
    if stop.rank == 0:  # another rank that ends otherwise than well would end this one too, before it has said why
        otherwise = EXIT_CODES.get(stop.agreed, otherwise)
    end_now({"failed": 2, "died": 1}.get(get_state(folder)[0], otherwise))
