"""Runs of two processes that are disturbed, beside one that is not."""

from tests.helpers.faults import Run, equal_checkpoints, losses, only_run
from tests.helpers.tiny import words

STEPS = 30
"""Of the runs of two processes: room for five kills in a row."""


def start_two(tmp_path, step, **changes):
    """A run of two processes that has made so many steps; its folder."""
    process = Run(*words(tmp_path, trainer__devices=2, trainer__steps=STEPS, **changes))
    process.wait_for(lambda: any(len(losses(f)) >= step for f in tmp_path.glob("runs/shapes_4x/*")))
    return process, only_run(tmp_path / "runs")


def same_as(folder, whole):
    """The run, resumed until its end, has the losses and the state of the undisturbed one, bit for bit."""
    text = Run(f"resume={folder}").end()
    assert losses(folder) == losses(whole), text
    assert equal_checkpoints(folder / "checkpoints" / f"step-{STEPS:06d}", whole / "checkpoints" / f"step-{STEPS:06d}")
