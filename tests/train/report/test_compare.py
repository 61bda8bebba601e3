"""Several runs on one page: rows of seeds with their intervals, what differs, curves over each other."""

import json
import math
import re
import shutil
from dataclasses import replace
from statistics import fmean, stdev

import pytest

from tests.helpers.tiny import run_config, settings
from train.errors import UserError
from train.loggers.csv_file import MetricsCsv
from train.measures.results import TABLE
from train.report.__main__ import main
from train.report.compare import comparison
from train.report.runs import differing, grouped, read_runs
from train.storage.run_folder import RunFolder, set_state
from train.sweep.command import prepare


def log(folder, losses):
    """A finished run with these losses."""
    metrics = MetricsCsv(folder, 0)
    for step, loss in enumerate(losses):
        metrics.log_metrics({"loss": loss, "validation/loss": loss + 1, "step_seconds": 0.5, "memory_gib": 2.0}, step)
    metrics.save()
    set_state(folder, "done")


def held_out(folder, loss):
    row = {"name": "tuned", "frames": 8, "losses": [loss - 0.5, loss + 0.5], "attention_gflops": 30.0}
    (folder / TABLE).write_text(json.dumps([row]), encoding="utf-8")


@pytest.fixture
def sweep(tmp_path):
    """Two ranks in three seeds, the last of which has failed."""
    made = prepare(settings(tmp_path, lora__rank="4,8", seed="0,1,2"), lambda config: None)
    for number in range(5):
        log(made.run(number), [2.0 + number, 1.0 + number])
        held_out(made.run(number), (1.0, 1.1, 1.3, 2.0, 2.2)[number])
    set_state(made.run(5), "failed", "rank 0: out of <memory>")
    return made


def test_seeds_are_one_row_with_students_interval(sweep):
    groups = grouped(read_runs([sweep.path]))
    assert [group.label for group in groups] == ["lora.rank=4", "lora.rank=8"]
    four, eight = (group.figure("held-out loss") for group in groups)
    values = [1.0, 1.1, 1.3]
    assert four.mean == pytest.approx(fmean(values))
    assert four.half == pytest.approx(4.302653 * stdev(values) / 3**0.5, rel=1e-5)
    assert eight.half == pytest.approx(12.706205 * stdev([2.0, 2.2]) / 2**0.5, rel=1e-5)
    paired = groups[1].minus(groups[0], "held-out loss")
    assert paired.mean == pytest.approx(1.05) and paired.half == pytest.approx(12.706205 * 0.05, rel=1e-5)
    head, rows = comparison(groups)
    assert head[:3] == ["settings", "runs done", "held-out loss"] and head[-1] == "held-out loss minus the first row's"
    assert rows[0][:3] == ["lora.rank=4", "3 of 3", "1.1333 ± 0.3795"] and rows[0][-1] == ""
    assert rows[1][:2] == ["lora.rank=8", "2 of 3"] and rows[1][-1] == "+1.0500 ± 0.6353"


def test_a_seed_that_has_diverged_is_not_left_out_of_the_mean(sweep):
    held_out(sweep.run(2), math.nan)
    groups = grouped(read_runs([sweep.path]))
    assert groups[0].runs[2].result == "held-out loss nan"
    _, rows = comparison(groups)
    assert rows[0][:3] == ["lora.rank=4", "3 of 3", "nan ± nan"]


def test_a_single_run_has_no_interval(tmp_path):
    folder = RunFolder.create(run_config(tmp_path)).path
    log(folder, [3.0])
    (group,) = grouped(read_runs([folder]))
    assert group.figure("training loss") == 3.0 and group.figure("held-out loss") is None
    head, rows = comparison([group])
    assert rows == [["shapes_4x", "1 of 1", "4.0000", "3.0000", "0.5", "2"]] and "minus" not in "".join(head)


def test_the_page_shows_results_curves_and_every_run(sweep, capsys):
    main([f"runs={sweep.path}"])
    assert capsys.readouterr().out.splitlines()[-1] == str(sweep.path / "report.html")
    text = (sweep.path / "report.html").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", text) == ["Results", "Curves", "Runs"]
    assert text.count("<svg") == 3 and "1.1333 ± 0.3795" in text
    assert "failed: rank 0: out of &lt;memory&gt;" in text
    loss = re.search('aria-label="training loss.*?</svg>', text, re.DOTALL)[0]
    assert loss.count("stroke: #3b82c4") == 4 and loss.count("stroke: #e0622f") == 3  # three seeds, two, and the means
    assert not re.search(r'(src|href)="(?!data:|#)|http', text)


def test_runs_without_a_sweep_are_told_apart_by_their_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = run_config(tmp_path)
    other = replace(config, optim=replace(config.optim, lr=1e-3))
    folders = [RunFolder.create(each).path for each in (config, replace(config, seed=1), other)]
    runs = read_runs(folders)
    assert differing(runs)[2] == {"seed": "0", "optim.lr": "0.001"}
    assert [(group.label, len(group.runs)) for group in grouped(runs)] == [("optim.lr=0.002", 2), ("optim.lr=0.001", 1)]
    assert [run.folder for run in read_runs([tmp_path / "runs" / "shapes_4x"])] == sorted(folders)
    main([f"runs={folders[0]},{folders[2]}"])
    assert "optim.lr" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_that_is_given_twice_counts_once(sweep):
    """A second seed with the same losses would make an interval of no width."""
    runs = read_runs([sweep.run(0), sweep.run(0), sweep.path])
    assert [run.folder for run in runs] == [sweep.run(number) for number in range(6)]


@pytest.mark.parametrize("name", ["0_before", "17"])
def test_a_copy_of_a_run_in_its_sweeps_folder_can_be_compared(sweep, name):
    copy = sweep.path / name
    shutil.copytree(sweep.run(0), copy)
    first, other = read_runs([sweep.run(0), copy])
    assert first.changes == {"lora.rank": "4", "seed": "0"} and other.changes is None
    (group,) = grouped([first, other])
    assert other.name.endswith(f"/{name}") and len(group.runs) == 2
    assert group.figure("held-out loss") == 1.0  # of one seed: no interval


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no run, expected a sweep's folder or run folders, by commas"):
        main([f"runs={tmp_path}"])
    with pytest.raises(UserError, match="both are set"):
        main(["run=a", "runs=b"])
