"""The base and the tuned rows as ordinary run folders of the trainer, within the time that a command has.

    <runs>/study_base/<time>/                 the base, where none is given
    <out>/runs/<row>-seed-<seed>-<digest>/    what `python -m train` leaves; `python -m train resume=` takes it up too

The digest is that of the run's settings and of the base's weights: with others a row is trained anew beside the old.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from train.config.compose import compose_run, finish, read_config
from train.config.schema import RunConfig
from train.errors import EXIT_CODES, REQUEUE
from train.preflight import preflight
from train.run import resume
from train.storage.inputs import fingerprints
from train.storage.run_folder import CONFIG, RunFolder, get_state, write_config
from train.study.base import BASE_RUN
from train.study.rows import Row
from train.study.settings import Job

_MARGIN = 25.0  # seconds before the end that are left for a checkpoint and the results


class TimeUp(Exception):
    """The time of the command is over; what is finished is on disk."""


class Clock:
    """The time that a command has.

    Args:
        minutes: 0 for no end.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes - min(_MARGIN, 30 * minutes) if minutes else None

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return self._end is not None and time.monotonic() > self._end

    def check(self) -> None:
        """Ends what is under way.

        Raises:
            TimeUp: the time is over.
        """
        if self.over:
            raise TimeUp


class Deadline(Callback):
    """Asks the run to save a checkpoint and stop, as SLURM does, when the time is over."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.asked = clock, False

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.clock.over and not self.asked:
            self.asked = True
            os.kill(os.getpid(), signal.SIGTERM)


def train_in_time(folder: Path, config: RunConfig, clock: Clock) -> None:
    """Trains a run to its end, from where it stopped.

    Raises:
        TimeUp: the time is over, and its checkpoint is saved.
        UserError: it cannot be trained.
        SystemExit: a signal has stopped it.
    """
    torch.compiler.reset()  # graphs of other runs are of no use, and count against the compiler's limits
    deadline = Deadline(clock)
    try:
        resume(folder, config, extra_callbacks=[deadline])
    except SystemExit as end:
        if deadline.asked and end.code == EXIT_CODES[REQUEUE]:
            raise TimeUp from None
        raise
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def train_base(runs: str, clock: Clock) -> None:
    """Trains the study's base to its end: a new run of it, or on from where the newest one stopped.

    Raises:
        TimeUp, UserError, SystemExit: as `train_in_time`.
    """
    clock.check()
    config = finish(compose_run({"conf": BASE_RUN, "runs": runs}))
    begun = [run for run in sorted((Path(runs) / BASE_RUN).glob("*")) if (run / CONFIG).is_file()]
    if begun:
        folder = begun[-1]
        config = read_config(folder)
    else:
        preflight(config)
        folder = RunFolder.create(config).path
    print(f"the base, in {folder}", flush=True)
    train_in_time(folder, config, clock)


@dataclass(frozen=True)
class RowRun:
    """A row with a seed.

    Attributes:
        config: of its run; of an untuned row, what a run would have.
        digest: of all that decides over its weights.
    """

    row: Row
    seed: int
    config: RunConfig
    digest: str
    out: Path

    @classmethod
    def of(cls, job: Job, row: Row, seed: int) -> RowRun:
        """The run of a row.

        Raises:
            UserError: settings that do not make one.
        """
        given = {**job.words, **row.settings, "seed": str(seed)}
        if given.get("lora") == "null":  # a section that is null has no keys
            given = {key: value for key, value in given.items() if not key.startswith("lora.")}
        config = finish(compose_run(given))
        about = {name: value for name, value in asdict(config).items() if name not in ("runs", "log", "report")}
        about["model"] = {**about["model"], "path": fingerprints(config, None)["weights"]}
        about["attention"] = {**about["attention"], "masks": _content(row.settings.get("attention.masks"))}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:8]
        return cls(row, seed, config, digest, job.out)

    @property
    def name(self) -> str:
        """The name of the run's folder and files."""
        return f"{self.row.name}-seed-{self.seed}-{self.digest}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.out / "runs" / self.name

    @property
    def done(self) -> bool:
        """Whether it has been trained."""
        return get_state(self.folder)[0] == "done"

    def train(self, clock: Clock) -> None:
        """Trains it to its end, from where it stopped.

        Raises:
            TimeUp: the time is over, and its checkpoint is saved.
            UserError: it cannot be trained.
            SystemExit: a signal has stopped it.
        """
        clock.check()
        if not (self.folder / CONFIG).is_file():
            preflight(self.config)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_config(self.config, self.folder)
        train_in_time(self.folder, self.config, clock)


def _content(file: str | None) -> str | None:
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
