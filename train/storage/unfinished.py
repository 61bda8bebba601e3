"""What a run does after its last step can be left at any clip or step; what is finished of it waits for the resume.

<run>/.unfinished/<hash>.safetensors    a part: a row of the table, a generated clip; gone when all are there
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.io.files import beside
from train.config.schema import RunConfig
from train.errors import Asked
from train.parallel.control_group import ControlGroup

FOLDER = ".unfinished"


class Unfinished:
    """The parts of a run's end, on all ranks that work at them together.

    Args:
        folder: the run's; its first rank reads and writes.
        config: of the run; parts of another config are made again.
        position: micro-batches that the model has seen; parts of another are made again.
        asked: whether one of the ranks that work at the parts was asked to stop; all of them must call it together.
        group: of these ranks.
    """

    def __init__(
        self, folder: Path, config: RunConfig, position: int, asked: Callable[[], bool], group: ControlGroup
    ) -> None:
        self.folder, self.asked, self.group = folder / FOLDER, asked, group
        self._about = json.dumps([position, asdict(config)])

    def check(self) -> None:
        """To be called at every clip and step, by every rank of the group.

        Raises:
            Asked: on all of them, when one was asked to stop.
        """
        if self.asked():
            raise Asked

    def part(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A part that was finished before, or that is made now; every rank of the group must ask for it.

        Args:
            name: of the part.
            make: makes it, on the CPU.
        """
        file = self.folder / f"{hashlib.sha256(f'{self._about}/{name}'.encode()).hexdigest()[:16]}.safetensors"
        first = self.group.rank == 0
        found: Tensor | None = self.group.from_first(_load(file) if first else None)
        if found is not None:
            return found
        made = make()
        if first:
            file.parent.mkdir(exist_ok=True)
            with beside(file) as fresh:
                save_file({"part": made.contiguous()}, fresh)
        return made

    def done(self) -> None:
        """All that the parts are for is written."""
        if self.group.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def _load(file: Path) -> Tensor | None:
    try:
        return load_file(file)["part"]
    except (OSError, SafetensorError, KeyError):
        return None
