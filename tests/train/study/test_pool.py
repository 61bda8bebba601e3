"""The whole study from one command: a base, masks fitted to it, and several rows at the same time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest

from tests.helpers.studies import study_settings
from train.config.compose import compose_run, finish
from train.loggers.csv_file import METRICS, read_metrics
from train.storage.checkpoints import checkpoints_of
from train.storage.run_folder import get_state, write_config
from train.study.__main__ import main
from train.study.pool import signals_reach_all


def losses(folder: Path) -> dict[str, float]:
    """Of each row and seed, at 4x and the only noise level; the mean of the clips."""
    files = [file for file in (folder / "losses").iterdir() if not file.name.startswith("base-")]
    stored = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
    return {name: fmean(parts["losses"]["4x"]["0.6"]) for name, parts in stored.items()}


@pytest.mark.slow
def test_rows_at_the_same_time_are_those_one_after_the_other(tmp_path, capsys):
    names = "untuned_released,untuned_fitted_0.6,untuned_fitted_0.001,released,fitted_0.6,fitted_0.001"
    rows = {"rows": names, "fitted": "0.6,0.001"}
    big = {"clip__height": 64, "clip__width": 64, "held_out": 4, "seeds": "0,1"}
    main(study_settings(tmp_path, out=tmp_path / "one", **rows, **big))
    assert "rows are missing" in capsys.readouterr().out  # the masks that are too small for one block a row
    main(study_settings(tmp_path, out=tmp_path / "two", processes=2, **rows, **big))
    said = capsys.readouterr().out
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6 and two == pytest.approx(one, rel=1e-5)  # sums differ with the number of threads
    log = tmp_path / "two" / "logs" / "released-seed-1.log"
    assert f"released, seed 1: begun, {log}" in said and "released, seed 1: done" in said
    assert "step 2/2" in log.read_text(encoding="utf-8") and "step 2/2" not in said
    results = json.loads((tmp_path / "two" / "results.json").read_text(encoding="utf-8"))
    by_name = {row["row"]["name"]: row for row in results["rows"]}
    alone = json.loads((tmp_path / "one" / "results.json").read_text(encoding="utf-8"))
    for row in alone["rows"]:
        clips = by_name[row["row"]["name"]]["clips"]
        assert len(clips) == (0 if row["state"].startswith("failed") else 2)
        for one, other in zip(row["clips"], clips, strict=True):
            assert other["drift"] == pytest.approx(one["drift"], rel=1e-3) and other["clip"] == one["clip"]
    for name in ("fitted_0.001", "untuned_fitted_0.001"):
        assert by_name[name]["state"].startswith("failed: share is ")
    for name in ("fitted_0.6", "untuned_fitted_0.6"):
        assert by_name[name]["blocks"] == pytest.approx(0.6 * by_name["released"]["blocks"], rel=0.02)


@pytest.mark.slow
def test_a_signal_saves_every_row_that_is_trained(tmp_path):
    words = study_settings(tmp_path, rows="released,random", processes=2, clips=0, trainer__steps=5000)
    command = [sys.executable, "-m", "train.study", *words]
    study = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    folder, deadline = tmp_path / "study" / "runs", time.monotonic() + 240

    def trained() -> list[Path]:
        runs = list(folder.glob("*")) if folder.is_dir() else []
        return [run for run in runs if (run / METRICS).is_file() and len(read_metrics(run / METRICS)) > 1]

    while len(trained()) < 2 and study.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(study.pid, signal.SIGTERM)
    said, _ = study.communicate(timeout=120)
    assert study.returncode == 128 + signal.SIGTERM, said
    runs = list(folder.iterdir())
    assert len(runs) == 2
    for run in runs:
        assert get_state(run)[0] == "requeue"
        newest = checkpoints_of(run / "checkpoints")[-1]
        assert newest.name == f"step-{int(read_metrics(run / METRICS)[-1]['step']) + 1:06d}"
    assert "0 of 1 seeds" in (tmp_path / "study" / "results.md").read_text(encoding="utf-8")


def test_a_terminal_that_closes_ends_nothing_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_reach_all():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_the_base_is_trained_where_there_is_none(tmp_path, capsys):
    given = {
        "conf": "study_base", "runs": str(tmp_path / "runs"), "clip.height": "48", "clip.width": "48",
        "model.architecture.num_layers": "1", "trainer.steps": "2", "trainer.compile": "false",
        "data.synthetic_clips": "4", "data.batch_size": "2", "data.workers": "0", "data.shuffle_window": "4",
        "optim.warmup": "1", "validation.every": "0", "report.clips": "0", "trainer.checkpoint_every": "1",
    }  # fmt: skip
    begun = tmp_path / "runs" / "study_base" / "2026-01-01_00-00-00"
    begun.mkdir(parents=True)
    write_config(finish(compose_run(given)), begun)
    words = study_settings(tmp_path, base="null", rows="untuned_released", clips=0)
    main([*words, "minutes=0.0001"])
    assert "the base is not trained to its end yet, and the same command goes on" in capsys.readouterr().out
    main(words)
    assert get_state(begun)[0] == "done"
    results = json.loads((tmp_path / "study" / "results.json").read_text(encoding="utf-8"))
    assert results["about"]["base"] == str(begun / "export" / "model")
    assert [row["state"] for row in results["rows"]] == ["done"]
