"""``python -m train.report``: a run as one page, or several runs compared on one."""

from __future__ import annotations

import sys
from pathlib import Path

from train.cli import guarded, split_files
from train.config.compose import split_arguments
from train.errors import UserError
from train.report.compare import print_comparison, write_comparison
from train.report.page import PAGE, write_page
from train.report.runs import read_runs

USAGE = """python -m train.report run=<run folder> [out=FILE]
python -m train.report runs=<a sweep's folder> [out=FILE]
python -m train.report runs=<run folder>,<run folder>,... [out=FILE]

With run=: curves, validation, clips, the plan beside what was measured, and settings of one run, as report.html in its
folder. With runs=: several runs compared, as report.html in the sweep's folder (of a list, in the current one): results
with 95 % intervals over seeds, curves over each other, and the settings that differ. A run that still goes on has a
report too. A page needs nothing beside itself and can be sent as it is.
"""


def main(arguments: list[str]) -> None:
    """Writes the page and prints its file; of several runs also their table.

    Raises:
        UserError: a key that is not known, or a folder without a run.
    """
    settings = split_arguments(arguments)
    unknown = settings.keys() - {"run", "runs", "out"}
    if unknown:
        raise UserError(f"{min(unknown)} is not a known key, expected run, runs or out")
    out = Path(settings["out"]) if settings.get("out") else None
    if ("run" in settings) == ("runs" in settings):
        found = "both are set" if "run" in settings else "neither run nor runs is set"
        raise UserError(f"{found}, give run=<run folder> such as run=runs/shapes_4x/<time>, or runs=<a sweep's folder>")
    if "run" in settings:
        print(write_page(Path(settings["run"]), out))
        return
    folders = [Path(word).expanduser() for word in split_files(settings["runs"])]
    runs = read_runs(folders)
    print_comparison(runs)
    print(f"\n{write_comparison(runs, out or (folders[0] if len(folders) == 1 else Path(PAGE)))}")


if __name__ == "__main__":
    guarded(main, sys.argv[1:], USAGE)
