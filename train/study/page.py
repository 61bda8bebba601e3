"""The study as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.report.document import facts, section, table, write_document
from train.study.pictures import STRIP
from train.study.results import RowResult
from train.study.results import table as table_of

PAGE = "study.html"


def write_page(
    results: Sequence[RowResult],
    lengths: Sequence[str],
    about: dict[str, Any],
    sentences: Sequence[str],
    picture: str,
    out: Path,
) -> Path:
    """Writes the page into the study's folder.

    Args:
        sentences: the conclusions.
        picture: SVG of cost against loss, or "".

    Raises:
        UserError: it cannot be written.
    """
    head, rows = table_of(results, lengths)
    listed = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    strip = out / STRIP
    clips = ""
    if strip.is_file():
        clips = f'<img src="data:image/png;base64,{base64.b64encode(strip.read_bytes()).decode()}" alt="clips">'
    parts = [
        "<h1>What keeps a lengthened model good</h1>",
        facts([(name, str(value)) for name, value in about.items()]),
        section("Findings", f"<ul>{listed}</ul>" if listed else ""),
        section("Rows", table([html.escape(cell) for cell in head], [[html.escape(c) for c in row] for row in rows])),
        section("Training cost against loss", f"<figure>{picture}</figure>" if picture else ""),
        section("Clips that go on from their first half", clips),
        section("Loss by noise level, mean over clips and seeds", _by_level(results, lengths)),
    ]
    return write_document("The study", parts, out / PAGE)


def _by_level(results: Sequence[RowResult], lengths: Sequence[str]) -> str:
    measured = [one for one in results if one.losses]
    if not measured:
        return ""
    levels = list(next(iter(measured[0].losses.values()))[lengths[0]])
    head = ["attention and training", *(f"{name}, {level}" for name in lengths for level in levels)]
    rows = []
    for one in measured:
        cells = [html.escape(one.row.words)]
        for name in lengths:
            for level in levels:
                values = [v for of in one.losses.values() for v in of[name][level] if v is not None]
                cells.append(f"{sum(values) / len(values):.4f}")
        rows.append(cells)
    return table(head, rows)
