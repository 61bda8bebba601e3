"""A log that fails (a full disk, a dead service, no network) warns once and never stops the training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from train.loggers.csv_file import MetricsCsv


class Forgiving(Logger):
    """A log whose failures are warned of once and otherwise ignored."""

    def __init__(self, inner: Logger, called: str, advice: str) -> None:
        super().__init__()
        self.inner, self.called, self.advice = inner, called, advice
        self._told = False

    @property
    def name(self) -> str | None:
        return self.inner.name

    @property
    def version(self) -> int | str | None:
        return self.inner.version

    @property
    def experiment(self) -> Any:
        return getattr(self.inner, "experiment", None)

    def attempt(self, what: Any, *arguments: Any, **options: Any) -> None:
        """Calls ``what``; an error gives one warning."""
        try:
            what(*arguments, **options)
        except Exception as error:
            if not self._told:
                self._told = True
                reason = " ".join(str(error).split()) or type(error).__name__
                print(f"\nwarning: {self.called} does not take the figures ({reason}); {self.advice}", flush=True)
        else:
            self._told = False

    @rank_zero_only
    def log_hyperparams(self, params: Any, *arguments: Any, **options: Any) -> None:
        self.attempt(self.inner.log_hyperparams, params, *arguments, **options)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.attempt(self._log, metrics, step)

    def _log(self, metrics: dict[str, float], step: int | None) -> None:
        self.inner.log_metrics(metrics, step)
        if isinstance(self.inner, MetricsCsv):
            self.inner.save()

    @rank_zero_only
    def save(self) -> None:
        self.attempt(self.inner.save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.attempt(self.inner.finalize, status)
