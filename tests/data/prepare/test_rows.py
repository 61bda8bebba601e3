"""Rows and candidates as text: what comes out is what went in, in any order, in the same file, and in little memory."""

from __future__ import annotations

import io
import json
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data.prepare.chosen import ChosenVideos, Rejected
from data.prepare.listed import Candidate, CandidateList
from data.prepare.rows import Row, Rows, Texts
from data.prepare.spans import Span

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
    texts.append("half a \ud83d")
    assert list(texts) == ["a", "", "日本", "b", "half a \ud83d"]
    with pytest.raises(IndexError):
        texts[5]


def test_texts_of_any_length_share_the_buffers() -> None:
    long = ["é" * 300_000, "", "x" * 3_000_000, "y", "z" * 900_000, "é" * 100_000]
    texts = Texts()
    for text in long:
        texts.append(text)
    texts[3] = "again"
    assert list(texts) == [*long[:3], "again", *long[4:]]


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


def test_candidates_are_what_went_in_and_take_little_more_memory_than_their_text() -> None:
    some = [
        Candidate("caf\udce9.mp4", None, None, 1),
        Candidate("日本 \udce9.mp4", 'no "caption"', None, 2),
        Candidate("c.mp4", None, Span(0.1, None), 7),
        Candidate("c.mp4", None, Span(24, 48, True), 7),
        Candidate("\0c.mp4", None, None, 8),
    ]
    held = CandidateList()
    for candidate in some:
        held.append(candidate)
    assert list(held) == some and held[1:] == some[1:] and held[-1] == some[4]
    assert list(held.picked([3, 0, 2]).picked([2, 1])) == [some[2], some[0]]

    count = 20_000
    tracemalloc.start()
    try:
        held = CandidateList()
        for number in range(count):
            held.append(Candidate(f"folder/{number:030d}.mp4", None, None, number))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(held) == count and taken / count < len(held[0].path) + 60, taken / count
