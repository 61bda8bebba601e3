"""``launch.json`` in a run's folder: how the run was started, for `status`, `logs` and `cancel`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from data.io.files import write_utf8
from train.errors import UserError
from train.storage.run_folder import CONFIG, LAUNCH, holder


def record(folder: Path, **about: Any) -> None:
    """Notes how the run was started, for `status`, `logs` and `cancel`."""
    about["at"] = time.strftime("%Y-%m-%d %H:%M:%S")
    write_utf8(folder / LAUNCH, json.dumps(about, indent=1) + "\n")


def recorded(folder: Path) -> dict[str, Any]:
    """What `record` noted; empty for a run that was started without launch.

    Raises:
        UserError: not a run folder.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has no {CONFIG}, expected a run folder such as runs/shapes_4x/<time>")
    file = folder / LAUNCH
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def job_of(folder: Path) -> str | None:
    """The SLURM job of a run: that of who runs in the folder, which may be another than the recorded, or none.

    Raises:
        UserError: not a run folder.
    """
    job: str | None = recorded(folder).get("job")
    who = holder(folder)
    return job if who is None else who.get("job")
