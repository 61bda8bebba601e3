"""What the ranks of tests/train/parallel/test_control_group.py do."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from train.parallel.control_group import ControlGroup


def _opened() -> ControlGroup:
    group = ControlGroup()
    group.open(SimpleNamespace(global_rank=dist.get_rank(), world_size=dist.get_world_size()))  # type: ignore[arg-type]
    return group


def close_late(seconds: float) -> dict[str, Any]:
    """The last rank comes so much later; the first one alone has asked something of itself before."""
    group = _opened()
    first = group.first(1)
    if group.rank == group.world - 1:
        time.sleep(seconds)
    start = time.monotonic() - (seconds if group.rank == group.world - 1 else 0)
    closed = group.close() and group.close()
    assert first.any([True]) == [True]  # needs no group
    return {"closed": closed, "joined": dist.is_initialized(), "seconds": time.monotonic() - start}


def close_stuck(seconds: float) -> dict[str, Any]:
    """Taking the groups down does not end."""
    group = _opened()
    with patch.object(dist, "destroy_process_group", threading.Event().wait):
        return {"closed": group.close(seconds), "again": group.close(seconds)}


def alone() -> dict[str, Any]:
    """One process, without torch.distributed."""
    group = ControlGroup()
    return {"first": group.first(1).gather(1), "closed": group.close()}
