"""``python -m train.study``, whole: stopped in the middle of a row, gone on, and its files."""

import csv
import json
import re

import pytest

from tests.helpers.studies import study_settings
from train.errors import UserError
from train.loggers.csv_file import read_metrics
from train.storage.run_folder import get_state
from train.study.__main__ import main
from train.study.runs import Clock, Deadline

ROWS = "untuned_released,released"


@pytest.mark.slow
def test_a_study_is_stopped_and_goes_on(tmp_path, monkeypatch, capsys):
    over = {"now": False}
    stop = Deadline.on_train_batch_end

    def after_one_step(self, trainer, *arguments):
        over["now"] = True
        stop(self, trainer, *arguments)

    words = study_settings(tmp_path, rows=ROWS, minutes=9)
    with monkeypatch.context() as patch:
        patch.setattr(Clock, "over", property(lambda self: over["now"]))
        patch.setattr(Deadline, "on_train_batch_end", after_one_step)
        main(words)
    assert "rows are missing, and the same command goes on" in capsys.readouterr().out
    (folder,) = (tmp_path / "study" / "runs").iterdir()
    assert folder.name.startswith("released-seed-0-") and get_state(folder)[0] == "requeue"
    assert "0 of 1 seeds" in (tmp_path / "study" / "results.md").read_text(encoding="utf-8")
    main(words)
    assert "rows are missing" not in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(folder / "metrics.csv")] == ["0", "1"]
    results = json.loads((tmp_path / "study" / "results.json").read_text(encoding="utf-8"))
    by_name = {row["row"]["name"]: row for row in results["rows"]}
    assert list(by_name) == [*ROWS.split(","), "truth"]
    for name in ("untuned_released", "released"):
        row = by_name[name]
        assert row["state"] == "done" and len(row["losses"]["0"]["4x"]["0.6"]) == 4 and len(row["clips"]) == 2
        assert 0 < row["blocks"] < 1 and row["gflops"] > 0 and row["frechet"] >= 0
    assert by_name["released"]["seconds"]["0"] > 0
    assert by_name["released"]["validation"]["0"][0][0] == 1
    untuned, released = (by_name[name]["losses"]["0"] for name in ("untuned_released", "released"))
    assert untuned["1x"] != released["1x"]  # the LoRA is in the weights that are measured
    assert by_name["truth"]["clips"][0]["repetition"] < 0.5
    with (tmp_path / "study" / "results.csv").open(encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert len(table) == 4 and len({len(row) for row in table}) == 1
    page = (tmp_path / "study" / "study.html").read_text(encoding="utf-8")
    assert "<svg" in page and "data:image/png" in page and not re.search(r'(src|href)="(?!data:|#)', page)
    assert all((tmp_path / "study" / name).stat().st_size for name in ("cost.png", "clips.png", "results.md"))
    parts = {file: file.stat().st_mtime_ns for file in (tmp_path / "study").glob("[lcr]*/*/*.json")}
    main(words)  # nothing is left to do
    assert parts == {file: file.stat().st_mtime_ns for file in parts}
    with pytest.raises(UserError, match=r"not trained enough to judge masks: held-out loss .* expected at most 6.0%"):
        main([*(word for word in words if not word.startswith("enough=")), "enough=0.06"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope": "default"}, "rope is set by the study"),
        ({"model__rope": "default"}, "model.rope is set by the study"),
        ({"attention__share": "0.1"}, "attention.share is set by the study"),  # released would not be released
        ({"attention__pattern": "dense"}, "attention.pattern is set by the study"),
        ({"trainer__devices": "2"}, "trainer.devices is 2, and each row is trained by one process"),
        ({"seeds": "0,0"}, "seeds is '0,0'"),
        ({"sigmas": "1"}, "sigmas is '1'"),
        ({"length": "3x"}, "length is '3x', expected one of 2x, 4x"),
        ({"rows": "released,raidal"}, "rows has 'raidal', expected all, or some of untuned_dense"),
        ({"base": "nowhere"}, "base nowhere has neither"),
        ({"base": "null", "rows": "raidal"}, "rows has 'raidal', expected all"),  # before a base is trained
        ({"fitted": "0.6,0.6"}, "fitted is '0.6,0.6', expected shares"),
        ({"fitted": "0.6:2"}, "fitted is '0.6:2', expected shares"),
        ({"fitted": "half"}, "fitted is 'half', expected shares"),
        ({"processes": "0"}, "processes is 0"),
        ({"data__synthetic_scenes": "sunrise"}, "data.synthetic_scenes is sunrise"),
        ({"data__shards": "shards"}, "data.shards is given"),
        ({"enough": "0"}, "enough is 0"),
    ],
)
def test_refusals(tmp_path, changes, expected):
    with pytest.raises(Exception) as caught:
        main(study_settings(tmp_path, **changes))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "study").exists()
