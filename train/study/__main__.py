"""``python -m train.study``: the command line."""

from __future__ import annotations

import sys

from radial.cli.command import Command
from train.study.settings import Job, Settings


def study(settings: Settings, others: dict[str, str]) -> int:
    """Runs what is missing of the study and prints what the numbers show; the exit code is 1 where rows failed."""
    job = Job.made_of(settings, others)
    from train.study.rows import rows_of  # these take seconds to import
    from train.study.run import run_study
    from train.study.runs import Clock, TimeUp, train_base

    clock = Clock(settings.minutes)
    if job.base is None:
        rows_of(job)  # what is wrong is told before minutes go into a base
        try:
            train_base(job.config.runs, clock)
        except TimeUp:
            print("\nthe base is not trained to its end yet, and the same command goes on")
            return 0
        job = Job.made_of(settings, others)
    sentences, whole, failed = run_study(job, clock)
    print()
    for sentence in sentences:
        print(f"* {sentence}")
    print(f"\nEverything is in {job.out}{'' if whole else '; rows are missing, and the same command goes on'}")
    if failed:
        print(f"failed: {', '.join(failed)}; results.md has the reasons", file=sys.stderr)
    return 1 if failed else 0


main = Command(
    "python -m train.study",
    "Trains and measures the rows of the study: a base of this project made longer under each mask, with equal steps, "
    "clips, noise and positions, beside the base untuned. The base is trained first where there is none, and masks are "
    "fitted to it. Writes a table, a picture of cost against loss, a strip of clips and a page. A command that was "
    "stopped goes on.",
    Settings,
    study,
    [
        "python -m train.study minutes=9 processes=6",
        "python -m train.study rows=dense,released,random seeds=0 clips=0",
        "python -m train.study base=runs/study_base_large/<time> length=2x",
    ],
    others="those of a training run (conf=study_4x), the same in every row",
)

if __name__ == "__main__":
    main.run()
