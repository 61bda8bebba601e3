"""Rows as text: what comes out is what went in, in any order, in the same file, and in little memory."""

from __future__ import annotations

import io
import json
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data.prepare.chosen import ChosenVideos, Rejected
from data.prepare.rows import Row, Rows, Texts

ROWS = [
    Row("a.mp4", "a boat", 3),
    Row('b "], [.mp4', '"rows": [{"path": "x"}], \\ and\nlines', 0, 1.5, 3.25, "b[1.5-3.25]", [7, 1 << 63]),
    Row("ü.mp4", "日本 🎬", 12, 0.1),
    Row("c.mp4", "", 1),
]  # fmt: skip


def test_texts_come_in_any_order() -> None:
    texts = Texts(3)
    texts[2], texts[0] = "日本", "a"
    texts.append("b")
    assert list(texts) == ["a", "", "日本", "b"]
    with pytest.raises(IndexError):
        texts[4]


def test_rows_are_what_went_in() -> None:
    rows = Rows(ROWS)
    assert list(rows) == ROWS and rows[1] == rows[-3] == ROWS[1] and rows[1:] == ROWS[1:]
    assert rows == Rows(rows) and rows != Rows(ROWS[:3]) and rows != Rows([*ROWS[:3], replace(ROWS[3], clips=2)])
    captions = Texts(4)
    captions[3] = "new"
    rows.caption_all(captions)
    assert [row.caption for row in rows] == ["", "", "", "new"] and rows[2] == replace(ROWS[2], caption="")


@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("cut", [0, 1, 40, 10**6])
def test_a_file_of_rows_is_plain_json(tmp_path: Path, count: int, cut: int) -> None:
    """Begun folders have such files of earlier versions: neither the names nor their order may change."""
    chosen = ChosenVideos(
        {"where": '"rows": [', "sizes": [[1, 2]]}, "/videos", Rows(ROWS[:count]), [Rejected("d", "no")], 2
    )
    listed = {"rows": list(map(asdict, ROWS[:count])), "rejected": list(map(asdict, chosen.rejected))}
    plain = json.dumps({**vars(chosen), **listed})
    chosen.save(tmp_path)
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == plain
    assert ChosenVideos.load(tmp_path) == chosen
    _, _, array = plain.partition(', "rows": [')
    assert Rows.read(array[:cut], io.StringIO(array[cut:])) == (chosen.rows, array[array.index(', "rejected"') :])


def test_a_file_that_ends_within_a_row_is_refused() -> None:
    with pytest.raises(json.JSONDecodeError):
        Rows.read('{"path": "a.mp4", "cap', io.StringIO(""))


def test_a_row_takes_little_more_memory_than_its_text() -> None:
    count, caption = 20_000, "a boat sails at dawn over the calm sea while gulls circle"
    tracemalloc.start()
    try:
        rows = Rows(Row(f"folder/{n:030d}.mp4", caption, 3) for n in range(count))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(rows) == count and taken / count < len(rows[0].path) + len(caption) + 100
