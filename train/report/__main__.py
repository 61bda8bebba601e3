"""``python -m train.report``: a run as one page, or several runs compared on one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from radial.cli.command import Command
from radial.cli.settings import setting
from train.errors import UserError
from train.lora.file_lists import split_files
from train.report.compare import print_comparison, write_comparison
from train.report.page import PAGE, write_page
from train.report.runs import read_runs


@dataclass
class Options:
    """Whose page is written, and where to."""

    run: Path | None = setting("a run folder, whose page is written", None)
    runs: str | None = setting("a sweep's folder, or run folders with commas between them, to compare", None, path=True)
    out: Path | None = setting(
        "the page's file; null: report.html in the folder of the run or sweep, of a list in the current one", None
    )


def report(options: Options) -> None:
    """Writes the page and prints its file; of several runs also their table.

    Raises:
        UserError: both or neither of run and runs, or a folder without a run.
    """
    if options.run is not None and options.runs is None:
        print(write_page(options.run, options.out))
        return
    if options.runs is None or options.run is not None:
        found = "both are set" if options.run is not None else "neither run nor runs is set"
        raise UserError(f"{found}, give run=<run folder> such as run=runs/shapes_4x/<time>, or runs=<a sweep's folder>")
    folders = [Path(word).expanduser() for word in split_files(options.runs)]
    runs = read_runs(folders)
    print_comparison(runs)
    print(f"\n{write_comparison(runs, options.out or (folders[0] if len(folders) == 1 else Path(PAGE)))}")


main = Command(
    "python -m train.report",
    "With run=: curves, validation, clips, the plan beside what was measured, and settings of one run. With runs=: "
    "several runs compared: results with 95 % intervals over seeds, curves over each other, and the settings that "
    "differ. A run that still goes on has a report too. A page needs nothing beside itself and can be sent as it is.",
    Options,
    report,
    [
        "python -m train.report run=runs/shapes_4x/<time>",
        "python -m train.report runs=runs/shapes_4x/<time of a sweep>",
    ],
)

if __name__ == "__main__":
    main.run()
