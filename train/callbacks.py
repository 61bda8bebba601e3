"""The checkpoints of a run: when they are saved, and which stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from train.checkpoint import FolderCheckpointIO, checkpoints_of, remove_leftovers
from train.control import ControlGroup
from train.errors import UserError
from train.figures import VALIDATION, Figures

BEST = "best.json"


class StepCheckpoints(Callback):
    """Saves ``checkpoints/step-<n>`` every ``every`` optimizer steps and at the end.

    The newest ``keep`` stay, and the best: that with the least validation loss of those saved at a step with one. One
    that cannot be written is named, and training goes on; only when the run ends with it is that an error.

    Raises:
        UserError: the last checkpoint of the run could not be written.
    """

    def __init__(self, folder: Path, every: int, keep: int, control: ControlGroup, figures: Figures) -> None:
        self.folder, self.every, self.keep, self.control, self.figures = folder, every, keep, control, figures
        self._saved = -1

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.control.open(trainer)
        self._saved = trainer.global_step  # a resumed run must not write the checkpoint it came from again
        if trainer.is_global_zero:
            remove_leftovers(self.folder)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step != self._saved:
            problem = self._save(trainer)
            if problem:
                trainer.print(f"\nwarning: {problem}. Training goes on and tries again in {self.every} steps")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step != self._saved:
            problem = self._save(trainer)
            if problem:
                raise UserError(f"{problem}. Make room and resume: the run goes on from its last checkpoint")

    def _save(self, trainer: L.Trainer) -> str | None:
        """Returns why it could not be saved, on every rank."""
        if trainer.global_step == 0:
            return None
        path = self.folder / f"step-{trainer.global_step:06d}"
        trainer.save_checkpoint(path)
        plugin = trainer.strategy.checkpoint_io
        assert isinstance(plugin, FolderCheckpointIO)
        problem = self.control.from_first(plugin.problem)
        if problem is None:
            self._saved = trainer.global_step
            if trainer.is_global_zero:
                self._tidy(trainer, path)
        return problem

    def _tidy(self, trainer: L.Trainer, newest: Path) -> None:
        loss = self.figures.row.get(VALIDATION)
        best = best_checkpoint(self.folder)
        if loss is not None and (best is None or loss < best[1]):
            temporary = self.folder / f".{BEST}"
            temporary.write_text(json.dumps({"checkpoint": newest.name, "loss": loss}) + "\n")
            temporary.replace(self.folder / BEST)
            best = (newest, loss)
        for old in checkpoints_of(self.folder)[: -self.keep]:
            if best is None or old != best[0]:
                trainer.strategy.remove_checkpoint(old)


def best_checkpoint(folder: Path) -> tuple[Path, float] | None:
    """The checkpoint with the least validation loss, and that; None before the first validation."""
    try:
        noted = json.loads((folder / BEST).read_text())
    except (OSError, ValueError):
        return None
    return folder / noted["checkpoint"], noted["loss"]
