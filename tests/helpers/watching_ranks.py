"""What the ranks of tests/train/callbacks/test_watchdog.py do that stand still, or wait for each other."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from train.callbacks import watchdog
from train.parallel.control_group import ControlGroup
from train.storage.run_folder import get_state


def stand_still(folder: Path) -> dict[str, Any]:
    """Both ranks hang. The second one has been still for its patience, the first one, which came later, has not; then
    that sees how the second has ended."""
    control, rank, codes = ControlGroup(), dist.get_rank(), []
    dog = watchdog.Watchdog(folder, 60.0 if rank == 0 else 1.0, control)
    dog.rank = rank
    trainer: Any = SimpleNamespace(global_rank=rank, world_size=2, global_step=3)

    def end(code: int) -> None:
        codes.append(code)
        raise SystemExit  # the thread's

    with patch.object(watchdog, "end_now", end):
        dog.on_fit_start(trainer, None)  # type: ignore[arg-type]
        thread = threading.Thread(target=dog.watch, daemon=True)
        thread.start()
        if rank:
            thread.join(40)
        found = control.gather(get_state(folder))[1]
        if rank == 0:
            follower = threading.Thread(target=dog.end, args=("rank 1 ended with exit code 1", True))
            follower.start()
            follower.join(10)
        control.gather(None)  # the first rank holds the store
    return {"codes": codes, "found": found, "last": get_state(folder)}


def wait_for_the_first(folder: Path) -> list[int]:
    """The first rank moves on by itself, and the second one waits for it for several times its patience; the codes that
    its watchdog would have ended it with."""
    control, rank, codes = ControlGroup(), dist.get_rank(), []
    dog = watchdog.Watchdog(folder, 1.0, control)
    dog.rank = rank
    trainer: Any = SimpleNamespace(global_rank=rank, world_size=2, global_step=3)
    with patch.object(watchdog, "end_now", codes.append):
        dog.on_fit_start(trainer, None)  # type: ignore[arg-type]
        threading.Thread(target=dog.watch, daemon=True).start()
        began = time.monotonic()
        while rank == 0 and time.monotonic() - began < 8:
            dog.progress()
            time.sleep(0.2)
        control.gather(None)
        dog.on_train_end()
    return codes
