"""What a person sees of a run: a line of progress, each of the project's own warnings once; the rest is in log.txt."""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L

from train.callbacks.base import StepCallback
from train.callbacks.metrics import StepMetrics
from train.step.module import LengthExtensionModule

LOG = "log.txt"
OURS = ("train", "data", "radial", "launch")
_CHATTY = ("lightning", "lightning.pytorch", "lightning.fabric", "lightning_utilities", "diffusers", "transformers",
           "DeepSpeed", "deepspeed", "peft", "wandb")  # fmt: skip
_DEAF = ("lightning.pytorch", "lightning.fabric")  # to their own talk of every start and checkpoint
_LINE_EVERY = 30.0  # seconds between lines where nothing can be written over, such as a job's output file


class _Quiet(logging.FileHandler):
    """A log file that a full disk silences instead of breaking what it reports on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Prints nothing: the disk is full, and there is no other place."""


class _OursOnce(logging.Filter):
    """Warnings of this project, each text once."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.name.split(".")[0] not in OURS or text in self._told:
            return False
        self._told.add(text)
        return True


@contextmanager
def collected(folder: Path, rank: int) -> Iterator[None]:
    """Sends what libraries and this project log, warnings included, to ``log.txt``; of ours, warnings to the screen."""
    root = logging.getLogger()
    file = _Quiet(folder / LOG, delay=True, encoding="utf-8")
    file.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    screen = logging.StreamHandler()
    screen.setLevel(logging.WARNING)
    screen.addFilter(_OursOnce())
    where = f"rank {rank}: " if rank else ""
    screen.setFormatter(logging.Formatter(f"\n{where}%(levelname)s: %(message)s"))
    before = root.level, list(root.handlers)
    silenced: list[tuple[logging.Logger, list[logging.Handler], bool]] = []
    for name in _CHATTY:
        logger = logging.getLogger(name)
        silenced.append((logger, list(logger.handlers), logger.propagate))
        logger.handlers, logger.propagate = [], True
    levels = {name: logging.getLogger(name).level for name in _DEAF}
    for name in _DEAF:
        logging.getLogger(name).setLevel(logging.WARNING)
    root.setLevel(logging.INFO)
    root.addHandler(file)
    root.addHandler(screen)
    # pytest and others who watch warnings already keep watching them
    shown, warnings.showwarning = warnings.showwarning, _log_warning
    try:
        yield
    finally:
        warnings.showwarning = shown
        root.setLevel(before[0])
        for handler in (file, screen):
            root.removeHandler(handler)
            handler.close()
        for logger, handlers, propagate in silenced:
            logger.handlers, logger.propagate = handlers, propagate
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _log_warning(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    logging.getLogger("warnings").warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)


class Progress(StepCallback):
    """The line: step, loss with its smoothed trend, pace, MFU, memory, time left. Rank 0 alone writes it."""

    def __init__(self, figures: StepMetrics) -> None:
        super().__init__()
        self.figures = figures
        self._smooth: float | None = None
        self._older: list[float] = []
        self._shown: dict[str, float] = {}
        self._last_line = -math.inf

    def on_step_end(self, trainer: L.Trainer, module: LengthExtensionModule) -> None:
        if not trainer.is_global_zero:
            return
        self._shown |= self.figures.row
        loss = self._shown["loss"]
        if math.isfinite(loss):
            self._smooth = loss if self._smooth is None else self._smooth + 0.1 * (loss - self._smooth)
            self._older = [*self._older[-19:], self._smooth]
        parts = self.parts(trainer.global_step, trainer.max_steps)
        text = "  ".join(parts.values())
        if sys.stdout.isatty():
            # a line that wraps would leave its first row behind at every step
            print(f"\r\x1b[K{_fitted(parts, shutil.get_terminal_size().columns - 1)}", end="", flush=True)
        elif time.monotonic() - self._last_line > _LINE_EVERY or trainer.global_step == trainer.max_steps:
            self._last_line = time.monotonic()
            print(text, flush=True)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and sys.stdout.isatty():
            print()

    def parts(self, step: int, steps: int) -> dict[str, str]:
        """The line in its parts, such as ``step 120/2500``, ``loss 0.0831 (0.0902 falling)``, ``12.30 s/step``,
        ``23.7k tokens/s``, ``MFU 41%``, ``68.0 GiB``, ``8.1 h left``, ``1 skipped``."""
        figures = self._shown
        parts = {"step": f"step {step}/{steps}", "loss": f"loss {figures['loss']:.4f} ({self._trend()})"}
        if "step_seconds" in figures:
            parts["pace"] = f"{figures['step_seconds']:.2f} s/step"
            parts["tokens"] = f"{_short(figures['tokens_per_second'])} tokens/s"
            if "mfu" in figures:
                parts["mfu"] = f"MFU {figures['mfu']:.0%}"
            parts["memory"] = f"{figures['memory_gib']:.1f} GiB"
            parts["left"] = f"{_duration(figures['hours_left'])} left"
        if figures.get("skipped"):
            parts["skipped"] = f"{figures['skipped']:.0f} skipped"
        return parts

    def _trend(self) -> str:
        if self._smooth is None:
            return "not finite"
        change = self._smooth / self._older[0] - 1
        word = "steady" if abs(change) < 0.005 else "falling" if change < 0 else "rising"
        return f"{self._smooth:.4f} {word}"


def _fitted(parts: dict[str, str], width: int) -> str:
    """The line in at most ``width`` characters, but for the step: what a person misses least is left out first."""
    kept = dict(parts)
    for name in ("memory", "tokens", "mfu", "pace", "skipped", "left", "loss"):
        if len("  ".join(kept.values())) <= width:
            break
        kept.pop(name, None)
    return "  ".join(kept.values())


def _short(number: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
