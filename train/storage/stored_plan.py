"""The plan of a run in its folder, for its logs and its report to set beside what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.io.files import write_utf8
from train.planning.budget import GIB, Budget
from train.planning.duration import Duration
from train.storage.run_folder import PLAN


def store_plan(folder: Path, budget: Budget, table: str) -> None:
    """Writes plan.json: ``step_seconds``, ``memory_gib``, ``mfu`` (null where unknown) and the ``table`` in words."""
    duration = Duration(budget)
    # on a CPU the whole process is measured, with libraries that no plan knows
    memory = None if budget.machine.is_cpu else budget.gpu_memory / GIB
    about = {"step_seconds": duration.step, "memory_gib": memory, "mfu": duration.mfu, "table": table}
    write_utf8(folder / PLAN, json.dumps(about, indent=1) + "\n")


def stored_plan(folder: Path) -> dict[str, Any] | None:
    """What `store_plan` has written; None where no plan was made."""
    file = folder / PLAN
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
