"""A run with a user's stages: training gets what they return, resumes exactly, and refuses those that are not there."""

import csv
import shutil
import sys
from pathlib import Path

import pytest

from data.errors import DataError
from tests.helpers.tiny import run_config
from train.config.changes import change_config
from train.errors import UserError
from train.preflight import preflight
from train.run import resume, train
from train.storage.run_folder import RunFolder

CODE = """
from dataclasses import replace

LARGEST = []

def flat(sample):
    LARGEST.append(sample.latent.abs().max().item())
    return replace(sample, latent=sample.latent * 0)
"""

# The first loss of this run without stages (GOLDEN in test_run.py)
UNCHANGED = 1.90173


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "stages_of_a_run.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stages_of_a_run", raising=False)
    return "[stages_of_a_run.flat]"


def losses_of(folder: Path) -> list[str]:
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        return [row["loss"] for row in csv.DictReader(stream) if row["loss"]]


def test_a_run_with_stages_trains_on_what_they_return_and_resumes_exactly(tmp_path: Path, named: str) -> None:
    config = run_config(tmp_path, data__stages=named, data__workers=2)
    run = RunFolder.create(config)
    train(config, run)
    folder, whole = run.path, losses_of(run.path)
    assert len(whole) == 4 and min(sys.modules["stages_of_a_run"].LARGEST) > 0.5, "it was given the clips themselves"
    assert abs(float(whole[0]) - UNCHANGED) > 0.05, "and training got clips of zeros"
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    resume(folder, config)
    assert losses_of(folder) == whole


def test_a_stage_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="^data.stages: no_such_module_of_a_run.f: cannot be imported"):
        preflight(run_config(tmp_path, data__stages="[no_such_module_of_a_run.f]"))


def test_other_stages_need_override_on_resume(tmp_path: Path, named: str) -> None:
    with pytest.raises(UserError, match="data.stages"):
        change_config(run_config(tmp_path), {"data.stages": named})
    assert change_config(run_config(tmp_path), {"data.stages": named}, override=True).data.stages == [named[1:-1]]
