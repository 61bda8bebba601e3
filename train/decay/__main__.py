"""``python -m train.decay``: the command line."""

from __future__ import annotations

import sys

from data.cli import usage
from train.cli import guarded
from train.decay.settings import Job, Settings


def help_text() -> str:
    """The text of --help."""
    return usage(
        Settings,
        "python -m train.decay [model=NAME model.path=FOLDER data.shards=SHARDS] [key=value ...]",
        "Measures a model's attention on real clips at several noise levels: how it falls off with distance in every\n"
        "head, what the patterns of attention= keep of it, and what they change in the model's velocity. Writes\n"
        "decay.json, decay.safetensors and a page. Without any key: the repository's tiny model on synthetic clips.\n"
        "A command that was stopped goes on; other keys are those of a training run.",
        [
            "python -m train.decay",
            "python -m train.decay model=wan_14b model.path=weights/wan_14b data.shards=shards/openvid_4x",
            "python -m train.decay model=wan_14b model.path=weights/wan_14b data.shards=shards/openvid_4x frames=4x "
            "rope=interpolate attention=radial,paper tile=8x16",
        ],
    )


def main(arguments: list[str]) -> None:
    """Measures and prints the advice."""
    job = Job.of(arguments)
    from train.decay.run import run_decay  # takes seconds to import

    for sentence in run_decay(job):
        print(f"* {sentence}")
    print(f"\nEverything is in {job.out}")


if __name__ == "__main__":
    guarded(main, sys.argv[1:], help_text())
