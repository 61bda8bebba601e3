"""The folder of a sweep: ``sweep.json`` with the settings of each run, and the run folders 0, 1, 2, ... beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.io.files import write_utf8
from train.config.schema import RunConfig
from train.errors import UserError
from train.storage.run_folder import get_state, stamped_folder, write_config

SWEEP = "sweep.json"
OUTPUT = "output.txt"  # in the folder of a run: what its process printed, on this machine
Settings = dict[str, str]
"""Key -> value of one run, as the command line takes them."""


@dataclass(frozen=True)
class SweepFolder:
    """A sweep on disk.

    Attributes:
        path: ``<runs>/<conf>/<time>``.
        settings: of each run, in the order of their numbers.
    """

    path: Path
    settings: tuple[Settings, ...] = ()

    @classmethod
    def create(cls, settings: Sequence[Settings], configs: Sequence[RunConfig]) -> SweepFolder:
        """A new sweep, with the config of each run in a folder of its own.

        Raises:
            UserError: it cannot be written.
        """
        return cls(stamped_folder(configs[0])).extended(settings, configs)

    @classmethod
    def read(cls, path: Path) -> SweepFolder:
        """A sweep that was made before.

        Raises:
            UserError: there is none.
        """
        if not is_sweep(path):
            raise UserError(f"{path} has no {SWEEP}, expected the folder of a sweep such as runs/shapes_4x/<time>")
        return cls(path, tuple(json.loads((path / SWEEP).read_text(encoding="utf-8"))["runs"]))

    def extended(self, settings: Sequence[Settings], configs: Sequence[RunConfig]) -> SweepFolder:
        """The sweep with further runs, whose folders are made first: a ``sweep.json`` names none that is not there.

        Raises:
            UserError: they cannot be written.
        """
        longer = SweepFolder(self.path, (*self.settings, *settings))
        try:
            for number, config in enumerate(configs, len(self.settings)):
                self.run(number).mkdir(exist_ok=True)
                write_config(config, self.run(number))
            write_utf8(self.path / SWEEP, json.dumps({"runs": longer.settings}, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): make room, or set runs=") from error
        return longer

    def run(self, number: int) -> Path:
        """The folder of a run."""
        return self.path / str(number)

    def changes(self, number: int) -> Settings:
        """The settings of a run that another run of the sweep has not."""
        return {key: value for key, value in self.settings[number].items() if not self._is_shared(key)}

    def label(self, number: int) -> str:
        """`changes` as words of a command line."""
        return " ".join(f"{key}={value}" for key, value in self.changes(number).items())

    def unfinished(self) -> list[int]:
        """The numbers of the runs that have not come to their end."""
        return [number for number in range(len(self.settings)) if get_state(self.run(number))[0] != "done"]

    def _is_shared(self, key: str) -> bool:
        return len({each.get(key) for each in self.settings}) == 1


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (folder / SWEEP).is_file()
