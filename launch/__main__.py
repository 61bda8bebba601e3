"""``python -m launch``: starts runs and looks after them."""

from __future__ import annotations

import importlib
import sys

from train.cli import guarded
from train.errors import UserError

COMMANDS = {
    "plan": "memory, time and settings of a run, before a GPU is touched",
    "local": "a run on this machine",
    "slurm": "a run on a SLURM cluster, or a sweep as a job array",
    "status": "how runs stand",
    "logs": "what a job has printed, or the log of a run on this machine",
    "cancel": "ends a run, or a sweep, in order",
    "doctor": "what this machine has, and what a run needs",
}
"""Subcommand -> what it does; each is a module launch/<name>.py with a ``USAGE`` and a ``main(arguments)``."""


def usage() -> str:
    """The text of --help."""
    lines = ["python -m launch COMMAND [key=value ...]", "", "commands:"]
    lines += [f"  {name:<10} {about}" for name, about in COMMANDS.items()]
    return "\n".join([*lines, "", "options of a command: python -m launch COMMAND --help"])


def main(arguments: list[str]) -> None:
    """Hands the rest of the command line to the subcommand."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    name, *rest = arguments
    if name not in COMMANDS:
        guarded(_refuse, [name], "")
    command = importlib.import_module(f"launch.{name}")
    guarded(command.main, rest, command.USAGE)


def _refuse(arguments: list[str]) -> None:
    raise UserError(f"launch has no command {arguments[0]!r}, expected one of {', '.join(COMMANDS)} (see --help)")


if __name__ == "__main__":
    main(sys.argv[1:])
