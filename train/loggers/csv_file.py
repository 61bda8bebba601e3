"""metrics.csv: the log that every run has, a row a step."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from data.io.files import beside

METRICS = "metrics.csv"


def read_metrics(file: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; one that a killed run has left half-written is not among them."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    text = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return [row for row in rows if None not in row and None not in row.values() and row.get("step", "").isdigit()]


class MetricsCsv(Logger):
    """``metrics.csv``: a row a step, a column a key, empty where a step has no such figure.

    Rows are appended as they come. A new key means a new header: the file is then written anew under another name and
    renamed. What a full disk refuses is kept and written when there is room again.

    Args:
        before: a resumed run's first step: rows from there on are dropped, as they come again.
    """

    def __init__(self, folder: Path, before: int) -> None:
        super().__init__()
        self.file = folder / METRICS
        self._waiting: list[dict[str, Any]] = []
        self._columns: list[str] = []
        rows: list[dict[str, Any]] = [
            {key: value for key, value in row.items() if value != ""}
            for row in read_metrics(self.file)
            if int(row["step"]) < before
        ]
        if rows or self.file.exists():
            self._columns = _columns(rows)
            self._rewrite(rows)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are in config.yaml."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._waiting and self._waiting[-1]["step"] == step:
            self._waiting[-1].update(metrics)
        else:
            self._waiting.append({"step": step, **metrics})

    def save(self) -> None:
        """Appends what has come.

        Raises:
            OSError: it cannot be written; it is kept for the next time.
        """
        if not self._waiting:
            return
        columns = _columns(self._waiting, self._columns)
        if columns != self._columns:
            rows: list[dict[str, Any]] = [*read_metrics(self.file), *self._waiting]
            self._columns, old = columns, self._columns
            try:
                self._rewrite(rows)
            except OSError:
                self._columns = old
                raise
        else:
            size = self.file.stat().st_size
            try:
                with self.file.open("a", newline="", encoding="utf-8") as stream:
                    self._writer(stream).writerows(self._waiting)
            except OSError:
                os.truncate(self.file, size)
                raise
        self._waiting = []

    def finalize(self, status: str) -> None:
        self.save()

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        with beside(self.file) as fresh, fresh.open("w", newline="", encoding="utf-8") as stream:
            writer = self._writer(stream)
            writer.writeheader()
            writer.writerows(rows)

    def _writer(self, stream: Any) -> csv.DictWriter:
        return csv.DictWriter(stream, self._columns, restval="", lineterminator="\n")


def _columns(rows: list[dict[str, Any]], known: list[str] | None = None) -> list[str]:
    found = dict.fromkeys(known or ["step"])
    for row in rows:
        found.update(dict.fromkeys(row))
    return ["step", *sorted(found.keys() - {"step"})]
