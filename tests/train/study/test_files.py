"""The study's files while rows are missing, and beside those of other settings."""

import json

import pytest
import torch

from radial import HeadMasks
from radial.cli.reader import read_some
from radial.patterns.head_masks import About, write
from tests.helpers.studies import study_settings
from train.errors import UserError
from train.study import parts
from train.study.__main__ import main
from train.study.clips import MEASURES
from train.study.fits import Fit
from train.study.masks import fit_mask, masks_file
from train.study.parts import RowClips
from train.study.pictures import draw
from train.study.pool import do_parts
from train.study.rows import TRUTH, Row
from train.study.run import Study
from train.study.runs import Clock, RowRun, TimeUp
from train.study.settings import Job, Settings


def test_masks_of_another_size_fail_their_row_alone(tmp_path, capsys):
    about = About("patches", 32, 4, 16, 16, (0, 1), 0.5, 0.5, 0.1, 0)
    (tmp_path / "masks").mkdir()
    write(torch.zeros(2, 2, about.entries, dtype=torch.bool), about, tmp_path / "masks" / "other.safetensors")
    assert HeadMasks.read(tmp_path / "masks" / "other.safetensors").about == about
    words = study_settings(tmp_path, rows="fitted_other,released", masks=tmp_path / "masks")
    job = Job.made_of(*read_some(Settings, words))
    job.out.mkdir()
    study = Study(job, Clock(0))
    study.write()
    found = states(job)
    assert found["fitted_other"].startswith("failed: attention.masks are fitted to frames of 16 x 16 tokens")
    assert found["released"] == "0 of 1 seeds"
    assert [part.row.name for part in study._losses()] == ["released"]
    assert capsys.readouterr().out.count("warning: ") == 1
    assert main(study_settings(tmp_path, rows="fitted_other", masks=tmp_path / "masks", clips=0)) == 1
    assert "failed: fitted_other; results.md has the reasons" in capsys.readouterr().err


def test_pictures_of_other_settings_do_not_stay(tmp_path):
    for name in ("cost.png", "clips.png"):
        (tmp_path / name).write_bytes(b"of another base")
    assert draw([], "4x", {}, "first 8 frames given", tmp_path) == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["losses", "clips"])
def test_a_row_whose_measurement_finds_memory_full_fails_alone(tmp_path, monkeypatch, part):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(parts, "measure", full)
    monkeypatch.setattr(parts, "held_out_shards", full)
    job = Job.made_of(*read_some(Settings, study_settings(tmp_path)))
    row = Row("untuned_released", "untuned, released", False, {"attention": "radial"})
    failed = []
    do_parts(
        job,
        iter([parts.RowLosses(row, 0) if part == "losses" else parts.RowClips(row)]),
        Clock(0),
        lambda row, error: failed.append((row.name, str(error))),
    )
    ((name, why),) = failed
    assert name == "untuned_released"
    said = "out of memory: CUDA out of memory. Tried to allocate 2 GiB. Give fewer processes= or at_once=; "
    assert why == f"{said}what is finished stays"


def measured(job, run, clock):
    """In place of `parts.measure`: losses of every length, without a model."""
    levels = {name: {"0.6": [0.1, 0.2, 0.3, 0.4]} for name in job.lengths}
    file = parts.losses_file(job, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"losses": levels, "again": levels, "gflops": 1.0, "blocks": 0.5}), encoding="utf-8")


def states(job):
    rows = json.loads((job.out / "results.json").read_text(encoding="utf-8"))["rows"]
    return {row["row"]["name"]: row["state"] for row in rows}


def test_a_row_is_not_done_before_its_clips_are(tmp_path, monkeypatch):
    job = Job.made_of(*read_some(Settings, study_settings(tmp_path, rows="untuned_released", clips=4)))
    monkeypatch.setattr(parts, "measure", measured)
    study = Study(job, Clock(0))
    study.measure_rows()
    assert states(job) == {"untuned_released": "0 of 4 clips"}
    for row in (TRUTH, *study.rows):
        folder = parts.clips_folder(job, row)
        folder.mkdir(parents=True)
        clip = dict.fromkeys(MEASURES, 0.5)
        two = {"clips": [{**clip, "clip": f"clip-{n}"} for n in range(2)], "features": [[0.1], [0.2]]}
        for part in ("0000", "0002"):
            (folder / f"{part}.json").write_text(json.dumps(two), encoding="utf-8")
    (folder / "0002.json").unlink()
    study.write()
    assert states(job) == {"untuned_released": "2 of 4 clips", "truth": "done"}


def test_what_is_measured_of_a_row_that_fails_later_stays_in_the_results(tmp_path, monkeypatch):
    words = study_settings(tmp_path, rows="released,untuned_released", seeds="0,1")
    job = Job.made_of(*read_some(Settings, words))

    def diverged(job, run, clock):
        if run.seed == 1:
            raise UserError("loss is not finite at step 3")
        measured(job, run, clock)

    monkeypatch.setattr(parts, "measure", diverged)
    monkeypatch.setattr(RowRun, "train", lambda self, clock: None)
    study = Study(job, Clock(0))
    study.measure_rows()
    monkeypatch.setattr(RowClips, "do", lambda self, job, clock: _raise(UserError("memory is full")))
    study.generate_clips()
    results = json.loads((job.out / "results.json").read_text(encoding="utf-8"))
    rows = {row["row"]["name"]: row for row in results["rows"]}
    assert states(job) == {
        "released": "failed: loss is not finite at step 3",
        "untuned_released": "failed: memory is full",
    }
    assert list(rows["released"]["losses"]) == list(rows["untuned_released"]["losses"]) == ["0"]
    assert len(results["conclusions"]) == 1  # of the two rows' losses


def _raise(error):
    raise error


def test_the_end_of_the_time_is_heeded_while_masks_are_fitted(tmp_path):
    job = Job.made_of(*read_some(Settings, study_settings(tmp_path)))
    time_left = iter([True])

    def check():
        if not next(time_left, False):
            raise TimeUp

    with pytest.raises(TimeUp):
        fit_mask(job, Fit(0.6), check)
    folder = masks_file(job, Fit(0.6)).parent / "decay"
    assert len(list((folder / "parts").iterdir())) == 1 and not (folder / "decay.safetensors").exists()
