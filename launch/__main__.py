"""``python -m launch``: starts runs and looks after them."""

from __future__ import annotations

import importlib
from functools import partial

from radial.cli.command import Command, Commands

ABOUT = {
    "plan": "memory, time and settings of a run, before a GPU is touched",
    "local": "a run on this machine",
    "slurm": "a run on a SLURM cluster, or a sweep as a job array",
    "status": "how runs stand",
    "logs": "what a job has printed, or the log of a run on this machine",
    "cancel": "ends a run, or a sweep, in order",
    "doctor": "what this machine has, and what a run needs",
}
"""Subcommand -> what it does; each is a module launch/<name>.py with its ``main``."""


def _find(name: str) -> Command:
    found: Command = importlib.import_module(f"launch.{name}").main
    return found


main = Commands(
    "python -m launch",
    "Starts runs and looks after them.",
    {name: (about, partial(_find, name)) for name, about in ABOUT.items()},
)

if __name__ == "__main__":
    main.run()
