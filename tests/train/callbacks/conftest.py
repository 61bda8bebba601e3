"""A run of two processes for the tests of this folder."""

import pytest

from tests.helpers.faults import Run, losses, only_run
from tests.helpers.tiny import words
from tests.helpers.two_ranks import STEPS


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """An undisturbed run of two processes."""
    tmp_path = tmp_path_factory.mktemp("two")
    text = Run(*words(tmp_path, trainer__devices=2, trainer__steps=STEPS)).end()
    folder = only_run(tmp_path / "runs")
    assert len(losses(folder)) == STEPS, text
    return folder
