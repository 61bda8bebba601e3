"""`python -m data.bench` runs, counts right and says so; how fast it is, is no test's to say."""

from __future__ import annotations

import re
from typing import Any

import pytest

from data import bench
from data.errors import DataError
from data.shards.stream import read_samples
from radial.errors import Mistake


def test_it_measures_a_folder(make_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_folder(6)
    assert bench.main([f"shards={manifest.home}", "steps=2", "step_seconds=0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 samples of 0.0 MB in 2 shards")
    assert [line.split("  ")[0] for line in lines[1:5]] == ["", "raw tarfile", "loader, 1 workers", lines[4]]
    assert re.fullmatch(r"loader / raw: [\d.]+ \((holds|does not hold): at least 0.8\)", lines[4])
    waiting = r"waiting for data beside steps of 0.01 s: [\d.]+% of the time \((holds|does not hold): at most 1%\)"
    assert re.fullmatch(waiting, lines[5])


@pytest.mark.parametrize(("loaded", "waiting", "verdicts"), [
    (0.8, 0.01, ["holds", "holds"]), (0.79, 0.011, ["does not hold"] * 2),
])  # fmt: skip
def test_it_says_whether_the_goals_hold(
    make_folder: Any, monkeypatch: Any, capsys: Any, loaded: float, waiting: float, verdicts: list[str]
) -> None:
    monkeypatch.setattr(bench, "raw_speed", lambda *a: bench.Speed(100.0, 1.0))
    monkeypatch.setattr(bench, "loader_speed", lambda *a: bench.Speed(100 * loaded, 1.0))
    monkeypatch.setattr(bench, "waiting_share", lambda *a: waiting)
    bench.main([f"shards={make_folder(2).home}"])
    assert re.findall(r"\((.*?):", capsys.readouterr().out) == verdicts


def test_both_sides_read_the_same_bytes(make_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_folder(6)
    monkeypatch.setattr(bench.time, "perf_counter", iter([0.0, 1.0, 0.0, 1.0]).__next__)
    raw = bench.raw_speed([manifest.folder / shard.file for shard in manifest.shards], len(manifest.samples))
    loaded = bench.loader_speed(manifest.home, 0, 6)
    assert raw.samples == loaded.samples == 6
    held = list(read_samples(manifest))
    tensors = sum(s.latent.nbytes + s.text["umt5"].tokens.nbytes for s in held)
    assert raw.bytes > loaded.bytes > tensors > 0


def test_the_made_shards_are_those_of_the_recipe(tmp_path: Any) -> None:
    bench.make_shards(tmp_path / "s", 1)
    (sample,) = read_samples(tmp_path / "s")
    assert sample.latent.shape == (16, 81, 90, 160) and sample.text["text"].tokens.shape == (512, 4096)


def test_mistakes() -> None:
    with pytest.raises(Mistake, match="workers is 0, expected at least 1"):
        bench.main(["workers=0"])
    for value, message in (
        ("nan", "'nan', expected a number"),
        ("inf", "'inf', expected a number"),
        ("0", "0.0, expected a positive number"),
    ):
        with pytest.raises(Mistake, match=f"step_seconds is {message}"):
            bench.main([f"step_seconds={value}"])
    with pytest.raises(DataError, match="no manifest"):
        bench.main(["shards=nowhere"])
