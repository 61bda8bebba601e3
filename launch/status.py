"""``python -m launch status``: how runs stand."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from launch.records import job_of
from launch.slurm_jobs import queued, slurm_state
from radial.cli.command import Command
from radial.cli.settings import setting
from train.config.compose import read_config
from train.errors import UserError
from train.loggers.csv_file import METRICS, read_metrics
from train.storage.checkpoints import checkpoints_of, how_to_go_on
from train.storage.run_folder import CONFIG, get_state, holder
from train.storage.sweep_folder import SweepFolder, is_sweep


@dataclass
class Options:
    """Which run."""

    run: Path | None = setting(
        "the run folder, or that of a sweep: a line for each of its runs; null: a line for each run under runs/", None
    )


def status(options: Options) -> None:
    """Prints how the run stands, or a line for each of several."""
    folder = options.run
    if folder is None:
        files = [*Path("runs").glob(f"*/*/{CONFIG}"), *Path("runs").glob(f"*/*/*/{CONFIG}")]
        if not files:
            raise UserError("runs/ has no run, expected one, or a run folder as in: python -m launch status RUN")
        for each in sorted(file.parent for file in files):
            print(f"{each!s:<48} {_line(each)}")
        return
    if is_sweep(folder):
        _print_sweep(SweepFolder.read(folder))
        return
    job = job_of(folder)
    word, why = standing(folder)
    print(f"{folder}: {word}{': ' + why if why else ''}")
    print(f"  progress    {_progress(folder)}")
    saved = checkpoints_of(folder / "checkpoints")
    if saved:
        age = (time.time() - saved[-1].stat().st_mtime) / 60
        print(f"  checkpoint  {saved[-1].name}, {age:,.0f} minutes old")
    if job:
        print(f"  SLURM       job {job}: {slurm_state(job) or 'no longer known'}")


def _print_sweep(sweep: SweepFolder) -> None:
    left = sweep.unfinished()
    print(f"{sweep.path}: {len(sweep.settings) - len(left)} of {len(sweep.settings)} runs done")
    width = max(len(sweep.label(number)) for number in range(len(sweep.settings)))
    for number in range(len(sweep.settings)):
        job = job_of(sweep.run(number)) if number in left else None
        state = queued(job)
        slurm = f"; job {job}: {state}" if state else ""
        print(f"  {number:<4} {sweep.label(number):<{width}}  {_line(sweep.run(number))}{slurm}")


def _line(folder: Path) -> str:
    """A run's state and progress; other people's folders, and those of other versions, may be damaged."""
    try:
        return f"{standing(folder)[0]:<10} {_progress(folder)}"
    except (OSError, ValueError, KeyError) as error:
        return f"{'damaged':<10} {' '.join(str(error).split())}"


def standing(folder: Path) -> tuple[str, str]:
    """The run's state in a word, and why in words. A run whose state is "running" and that nobody runs was killed."""
    word, why = get_state(folder)
    who = holder(folder)
    if who is not None:
        job = f", SLURM job {who['job']}" if who["job"] else ""
        text = f"process {who['pid']} on {who['host']}{job} since {who['since']}"
        return "running", text if who["certain"] else f"{text}, by its own record{_last_sign(folder)}"
    if word == "running":
        return "killed", how_to_go_on(folder)
    return word, why


def _last_sign(folder: Path) -> str:
    """What else is known of a run on another machine where the file system has no locks."""
    try:
        age = (time.time() - (folder / METRICS).stat().st_mtime) / 60
    except OSError:
        return " (there are no file locks to know by)"
    return f" (there are no file locks to know by), its last figures are {age:,.0f} minutes old"


def _progress(folder: Path) -> str:
    rows = [row for row in read_metrics(folder / METRICS) if row.get("loss")]
    steps = read_config(folder).trainer.steps
    if not rows:
        return f"no step of {steps} yet"
    last = rows[-1]
    text = f"step {int(last['step']) + 1} of {steps}, loss {float(last['loss']):.4f}"
    pace = next((row for row in reversed(rows) if row.get("step_seconds")), None)
    if pace is not None:
        text += f", {float(pace['step_seconds']):.2f} s/step, {float(pace['hours_left']):.1f} h left"
    return text


main = Command(
    "python -m launch status",
    "How a run stands: who runs it where, its step, loss, pace and time left, its newest checkpoint, and what SLURM "
    "reports.",
    Options,
    status,
    ["python -m launch status", "python -m launch status runs/wan_4x/<time>"],
    positional="run",
)
