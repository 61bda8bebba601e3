"""Run folders for the tests of this folder: of one run, and of a sweep."""

import pytest

from launch.slurm import main
from tests.helpers.tiny import run_config, words
from train.storage.run_folder import RunFolder
from train.storage.sweep_folder import SweepFolder


@pytest.fixture
def sweep(tmp_path, capsys):
    """A sweep of three runs that has its script, and was not submitted."""
    main(["-m", "processes=1", "dry_run=true", "at_once=2", *words(tmp_path, seed="0,1,2")])
    (path,) = (tmp_path / "runs" / "shapes_4x").iterdir()
    return SweepFolder.read(path)


@pytest.fixture
def folder(tmp_path):
    """A run that has not started."""
    return RunFolder.create(run_config(tmp_path)).path
