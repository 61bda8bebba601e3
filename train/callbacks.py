"""What watches a run: its checkpoints, its progress bar, its log file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger

from train.checkpoint import checkpoints_of


class StepCheckpoints(Callback):
    """Saves ``checkpoints/step-<n>`` every ``every`` optimizer steps and at the end; the newest ``keep`` stay."""

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.folder, self.every, self.keep = folder, every, keep
        self._saved = -1

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._saved = trainer.global_step  # a resumed run must not write the checkpoint it came from again

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step != self._saved:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step != self._saved:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._saved = trainer.global_step
        if trainer.global_step == 0:
            return
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:06d}")
        if trainer.is_global_zero:
            for old in checkpoints_of(self.folder)[: -self.keep]:
                trainer.strategy.remove_checkpoint(old)


class StepBar(TQDMProgressBar):
    """A bar over optimizer steps instead of epochs, since a run is counted in steps.

    Args:
        every: steps between two readings of the metrics; each waits for the device.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def on_train_start(self, *_: Any) -> None:
        assert isinstance(self.trainer.max_steps, int)
        self.train_progress_bar = Tqdm(
            desc="Training",
            initial=self.trainer.global_step,
            total=self.trainer.max_steps,
            unit="step",
            dynamic_ncols=True,
            disable=self.is_disabled,
        )

    def on_train_epoch_start(self, *_: Any) -> None:
        """The library's bar would start anew here."""

    def on_train_epoch_end(self, *_: Any) -> None:
        """And would write the epoch's metrics here."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        bar = self.train_progress_bar
        if trainer.global_step > bar.n:
            bar.update(trainer.global_step - bar.n)
            if trainer.global_step % self.every == 0:
                metrics = {k: v for k, v in self.get_metrics(trainer, module).items() if k != "v_num"}
                bar.set_postfix(metrics, refresh=False)


def csv_log(folder: Path, resumed_step: int, rank: int) -> CSVLogger:
    """Lightning's CSV log at ``folder/metrics.csv``; a resumed run keeps the rows before its step."""
    file, before = folder / "metrics.csv", folder / "metrics.before-resume.csv"
    rows: list[dict[str, Any]] = []
    if rank == 0 and resumed_step:
        if file.exists() and not before.exists():  # else an earlier resume was killed in the lines below
            file.rename(before)
        if before.exists():
            with before.open(newline="") as stream:
                rows = [row for row in csv.DictReader(stream) if int(row["step"]) < resumed_step]
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    if rank == 0:  # the logger of another rank writes nothing
        logger.experiment.metrics.extend({k: v for k, v in row.items() if v != ""} for row in rows)
        logger.save()
        before.unlink(missing_ok=True)
    return logger
