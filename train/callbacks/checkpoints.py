"""The checkpoints of a run: when they are saved, and which stay."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from data.io.files import write_utf8
from train.callbacks.base import StepCallback
from train.callbacks.metrics import VALIDATION, StepMetrics
from train.callbacks.throughput import Throughput
from train.callbacks.validation import Validation
from train.errors import UserError
from train.parallel.control_group import ControlGroup
from train.step.module import LengthExtensionModule
from train.storage.checkpoints import FolderCheckpointIO, checkpoints_of

BEST = "best.json"


class StepCheckpoints(StepCallback):
    """Saves ``checkpoints/step-<n>`` every ``every`` optimizer steps, when ``minutes`` have passed, and at the end.

    The newest ``keep`` stay, and the best: that with the least validation loss of those saved at a step with one. A
    checkpoint that cannot be written gives a warning, and training goes on; only for the run's last one it is an error.

    Raises:
        UserError: the last checkpoint of the run could not be written, or the ranks go on from different ones.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        minutes: float,
        keep: int,
        control: ControlGroup,
        figures: StepMetrics,
        throughput: Throughput,
    ) -> None:
        super().__init__()
        self.folder, self.every, self.minutes, self.keep = folder, every, minutes, keep
        self.control, self.figures, self.throughput = control, figures, throughput
        self._saved = -1  # the step of the last checkpoint
        self.tried_at = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self.control.open(trainer)
        starts = self.control.gather((module.position, trainer.global_step))
        if len(set(starts)) > 1:
            steps = ", ".join(f"rank {rank} after step {step}" for rank, (_, step) in enumerate(starts))
            raise UserError(
                f"the ranks go on from different checkpoints: {steps}. Some node sees an old state of {self.folder}: "
                "wait until all see the same files there, and resume"
            )
        # a resumed run must not write the checkpoint it came from again
        self._saved = trainer.global_step
        self.tried_at = time.monotonic()

    def on_step_end(self, trainer: L.Trainer, module: LengthExtensionModule) -> None:
        if self._is_time() or trainer.global_step % self.every == 0:
            start = time.perf_counter()
            problem = self.save(trainer)
            self.throughput.busy(time.perf_counter() - start)
            if problem:
                or_minutes = f" or {self.minutes:g} minutes" if self.minutes else ""
                again = f"Training goes on and tries again in {self.every} steps{or_minutes}"
                trainer.print(f"\nwarning: {problem}. {again}")

    def _is_time(self) -> bool:
        """Whether a checkpoint is due by rank 0's clock; every rank must call it."""
        if not self.minutes:
            return False
        late = self.control.rank == 0 and time.monotonic() - self.tried_at >= 60 * self.minutes
        return self.control.any([late])[0]

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step != self._saved:
            problem = self.save(trainer)
            if problem:
                raise UserError(f"{problem}. Make room and resume: the run goes on from its last checkpoint")

    def save(self, trainer: L.Trainer) -> str | None:
        """Saves a checkpoint of the step; returns why it could not be saved, on every rank, None where it was."""
        if trainer.global_step == 0:
            return None
        path = self.folder / f"step-{trainer.global_step:06d}"
        trainer.save_checkpoint(path)
        plugin = trainer.strategy.checkpoint_io
        assert isinstance(plugin, FolderCheckpointIO)
        problem = self.control.from_first(plugin.problem)
        self.tried_at = time.monotonic()
        if problem is None:
            self._saved = trainer.global_step
            if trainer.is_global_zero:
                self.tidy(trainer, path)
        return problem

    def tidy(self, trainer: L.Trainer, newest: Path) -> None:
        """Notes whether the newest checkpoint is the best, and removes those that are neither best nor newest."""
        loss = self.figures.row.get(VALIDATION)
        measured = sorted(key for key in self.figures.row if key.startswith("validation/"))
        if measured:
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            measured += [f"clips {one.digest()}" for one in callbacks if isinstance(one, Validation)]
        best, every = best_checkpoint(self.folder, measured), checkpoints_of(self.folder)
        older = every[: every.index(newest)]
        if best is not None and best[0] not in older:
            best = None  # of steps from before which the run has gone on anew
        if loss is not None and math.isfinite(loss) and (best is None or loss < best[1]):
            try:
                about = {"checkpoint": newest.name, "loss": loss, "measured": measured}
                write_utf8(self.folder / BEST, json.dumps(about) + "\n")
            except OSError as error:  # on this rank alone: raised, it would leave the others waiting
                trainer.print(f"\nwarning: {newest.name} is the best, but {BEST} could not be written: {error}")
            else:
                best = (newest, loss)
        # one of a later step is what a resumed run went back from, damaged: it is none of those to keep
        for old in [*older, newest][: -self.keep]:
            if best is None or old != best[0]:
                trainer.strategy.remove_checkpoint(old)


def best_checkpoint(folder: Path, measured: list[str] | None = None) -> tuple[Path, float] | None:
    """The checkpoint with the least validation loss, and that; None before the first that is a number.

    Args:
        folder: of the run's checkpoints.
        measured: names of a validation's figures, and the digest of its clips; None too where the loss is not a mean of
            such, as a resumed run may validate at other noise levels and lengths, or on other clips. Empty or None
            takes any.
    """
    try:
        noted = json.loads((folder / BEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if measured and noted.get("measured", measured) != measured:
        return None
    return (folder / noted["checkpoint"], noted["loss"]) if math.isfinite(noted["loss"]) else None
