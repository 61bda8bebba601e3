"""The page of a run, as a real browser shows it."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from radial.errors import Mistake
from tests.helpers.tiny import run_config
from train.loggers.csv_file import MetricsCsv, read_metrics
from train.report.__main__ import main
from train.report.charts import Line, line_chart
from train.report.page import write_page
from train.report.runs import smoothed
from train.run import train
from train.storage.run_folder import RunFolder

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("run"), trainer__steps=6, validation__every=3, validation__clips=2)
    made = RunFolder.create(replace(config, log=replace(config.log, norms_every=2)))
    train(replace(config, log=replace(config.log, norms_every=2)), made)
    (made.path / "samples").mkdir()
    Image.new("RGB", (16, 16), "red").save(made.path / "samples" / "step-000003-<b>.gif")
    plan = {"step_seconds": 1.0, "memory_gib": 2.0, "mfu": None, "table": "a <plan>"}
    (made.path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return made.path


@pytest.fixture(scope="module")
def browser():
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: {', '.join(BROWSERS)} not installed")

    def run(page, *options):
        # no name resolves: a page that asked for anything would show it as an error
        ours = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,2000"]
        nowhere = ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]
        command = [found, *ours, *nowhere, *options, page.as_uri()]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)

    return run


def test_a_browser_shows_all_of_it(folder, browser, tmp_path):
    page = write_page(folder)
    picture = tmp_path / "page.png"
    done = browser(page, "--dump-dom", f"--screenshot={picture}")
    dom = done.stdout
    assert "CONSOLE" not in done.stderr and "ERR_NAME_NOT_RESOLVED" not in done.stderr
    sections = re.findall(r"<h2>(.*?)</h2>", dom)
    assert sections[:4] == ["Curves", "Validation", "Clips", "Plan and measurement"]
    assert {"Attention mask", "Settings"} <= set(sections)
    assert dom.count("<svg") >= 9 and "NaN" not in dom
    for caption in ("loss", "validation loss by clip length (latent frames)", "gradient norm", "seconds a step"):
        assert f"<figcaption>{caption}</figcaption>" in dom
    assert "done" in dom and "6 of 6" in dom and "step-000006" in dom
    assert "a &lt;plan&gt;" in dom and "&lt;b&gt;.gif" in dom
    shown = Image.open(picture).convert("L")
    assert shown.size[0] == 1280
    assert len(shown.getcolors(256) or range(257)) > 20  # neither blank nor an error page in one colour


def test_the_page_needs_nothing_beside_itself(folder):
    text = write_page(folder).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)


def test_a_run_that_went_on_with_other_noise_levels_has_a_page(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    log = MetricsCsv(copy, 6)
    log.log_metrics({"validation/8_frames": 1.5, "validation/8_frames/sigma_0.25": 2.5, "validation/loss": 1.5}, 6)
    log.save()
    text = write_page(copy).read_text(encoding="utf-8")
    assert "<td>2.5000</td>" in text and "sigma 0.25" in text and "<td></td>" in text


def test_the_validation_table_has_every_length_and_noise_level(folder):
    rows = read_metrics(folder / "metrics.csv")
    last = [row for row in rows if row["validation/loss"]][-1]
    text = write_page(folder).read_text(encoding="utf-8")
    for length in (2, 4, 8):
        assert f"{length} latent frames" in text
        for level in ("0.4", "0.72", "0.8571", "0.9333", "0.9818"):  # quantiles at shift 6
            assert f"{float(last[f'validation/{length}_frames/sigma_{level}']):.4f}" in text
    assert last["validation/loss"] == last["validation/8_frames"]


def test_a_run_without_steps_has_a_page(tmp_path, capsys):
    made = RunFolder.create(run_config(tmp_path)).path
    main([f"run={made}", f"out={tmp_path}/page.html"])
    assert capsys.readouterr().out == f"{tmp_path}/page.html\n"
    assert "Settings" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_mistakes_are_one_line():
    done = subprocess.run([sys.executable, "-m", "train.report", "run=/nowhere"], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    with pytest.raises(Mistake, match="neither run nor runs is set, give run="):
        main([])
    with pytest.raises(Mistake, match="nix is not a known key"):
        main(["nix=1", "run=x"])


def path_of(chart):
    """The points of a chart's only coloured line, in its pixels."""
    (line,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: #3b82c4', chart)
    numbers = [float(word) for word in re.findall(r"[-\d.]+", line)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_a_line_goes_through_its_values():
    chart = line_chart("one & all", [Line([(1, 2.0), (2, float("nan")), (3, 4.0), (5, 3.0)])])
    assert "one &amp; all" in chart and "nan" not in chart
    (left, low), (middle, high), (right, between) = path_of(chart)
    assert right - left == pytest.approx(2 * (middle - left), abs=1e-3)
    assert between == pytest.approx((low + high) / 2, abs=1e-3) and high < low  # pixels count downwards
    decades = path_of(line_chart("log", [Line([(1, 0.01), (2, 1.0), (3, 100.0)])], log=True))
    assert decades[1][1] == pytest.approx((decades[0][1] + decades[2][1]) / 2, abs=1e-3)
    assert line_chart("nothing", [Line([(1, float("inf"))], "a")]) == ""
    assert smoothed([(1, 1.0), (2, float("nan")), (3, 2.0)]) == [(1, 1.0), (2, 1.0), (3, pytest.approx(1.1))]


def test_a_chart_takes_the_colours_and_the_font_of_its_page():
    chart = line_chart("loss", [Line([(1, 2.0), (2, 3.0)], "<b>"), Line([(1, 1.0), (2, 2.0)], "a & b", 1)])
    assert "currentColor" in chart and "#010203" not in chart and "#ffffff" not in chart
    assert "&lt;b&gt;" in chart and "a &amp; b" in chart
    assert not re.search("<metadata|<style|font-family|http|<script", chart)
    ids = re.findall(r'id="([^"]*)"', chart)
    assert ids and set(ids) == set(re.findall(r"#([mp][0-9a-f]{10})", chart))


def test_the_log_survives_new_keys_torn_rows_and_resumes(tmp_path):
    log = MetricsCsv(tmp_path, 0)
    for step in range(4):
        log.log_metrics({"loss": step / 3, **({"norm": 1.0} if step == 2 else {})}, step)
        log.save()
    assert [row["norm"] for row in read_metrics(tmp_path / "metrics.csv")] == ["", "", "1.0", ""]
    with (tmp_path / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write("4,0.1")  # killed here
    assert len(read_metrics(tmp_path / "metrics.csv")) == 4
    again = MetricsCsv(tmp_path, 3)
    again.log_metrics({"loss": 7.0}, 3)
    again.save()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"] and rows[3]["loss"] == "7.0"
    assert rows[1]["loss"] == repr(1 / 3)
