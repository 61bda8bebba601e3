"""What ``python -m train -m`` does: makes a sweep, or takes one up again, runs it, and compares its runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

from radial.cli.ranks import Rank
from train.config.compose import compose_run, finish
from train.config.schema import RunConfig
from train.errors import EXIT_CODES, UserError
from train.storage.run_folder import CONFIG, command, held
from train.storage.sweep_folder import Settings, SweepFolder
from train.sweep.expand import expand


def main(settings: Settings) -> None:
    """Runs a sweep on this machine.

    Args:
        settings: of ``python -m train -m``, with the values of the sweep; resume: a sweep's folder.

    Raises:
        UserError: settings that do not make a run, before any is started.
        SystemExit: code 1 where a run failed; as of a run where the sweep was asked to stop.
    """
    if Rank.here().world > 1:
        raise UserError(
            "-m was started by torchrun or srun, several times at once: start it once, it starts the runs itself, "
            "with trainer.devices processes each"
        )
    sweep = prepare(settings, lambda config: None)
    # after the configs are known to be right: lightning takes seconds to import
    from train.report.compare import print_comparison, write_comparison
    from train.report.runs import read_runs
    from train.sweep.local import LocalRuns

    print(f"{len(sweep.settings)} runs in {sweep.path}", flush=True)
    with held(sweep.path):
        runs = LocalRuns(sweep)
        runs.run()
        found = read_runs([sweep.path])
        print()
        print_comparison(found)
        print(f"\nthe runs on one page: {write_comparison(found, sweep.path)}")
    again = f"{command('train -m resume=', sweep.path)} goes on"
    if runs.asked:
        print(f"stopped; {again}")
        raise SystemExit(EXIT_CODES[runs.asked])
    if runs.failed:
        numbers = ", ".join(map(str, runs.failed))
        print(f"{len(runs.failed)} of {len(sweep.settings)} runs not finished: {numbers}; {again} with them")
        raise SystemExit(1)


def prepare(settings: Settings, check: Callable[[RunConfig], None]) -> SweepFolder:
    """The folder of a new sweep, or with ``resume=<a sweep's folder>`` of one that goes on, with what it lacks.

    Args:
        settings: of the runs, with the values of the sweep.
        check: called with the config of each new run before anything is written; raises where it cannot run.

    Raises:
        UserError: settings that do not make a run; or those of a resume have no run in the sweep.
    """
    sweep, new = _asked_for(settings)
    configs = [finish(compose_run(one)) for one in new]
    for config in configs:
        check(config)
    if sweep is None:
        return SweepFolder.create(new, configs)
    return sweep.extended(new, configs) if new else sweep


def show(settings: Settings) -> None:
    """Prints the config of each run that the command would make or go on with, as documents of one YAML text."""
    sweep, new = _asked_for(settings)
    old = sweep.settings if sweep is not None else ()
    whole = SweepFolder(Path() if sweep is None else sweep.path, (*old, *new))
    for number in whole.unfinished():
        if number < len(old):
            text = (whole.run(number) / CONFIG).read_text(encoding="utf-8")
        else:
            text = OmegaConf.to_yaml(compose_run(whole.settings[number]))
        print(f"---\n# run {number}: {whole.label(number)}\n{text}", end="")


def _asked_for(settings: Settings) -> tuple[SweepFolder | None, list[Settings]]:
    """The sweep of ``resume=``, None without; and the settings of the runs that are to be made."""
    settings = dict(settings)
    resume = settings.pop("resume", None)
    sweep = None if resume is None else SweepFolder.read(Path(resume))
    if sweep is not None and not settings:
        return sweep, []
    each = expand(settings)
    if sweep is None:
        return None, each
    new = [one for one in each if one not in sweep.settings]
    if len(new) == len(each):
        raise UserError(
            f"{resume} has no run of these settings, expected those that it was started with (see its sweep.json), "
            "perhaps with more values; or none beside resume="
        )
    return sweep, new
