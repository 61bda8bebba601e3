"""What `local` and `slurm` share: from the command line to a run's folder with its config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.records import recorded
from launch.slurm_jobs import check_not_queued
from radial.cli.settings import at_least, setting
from train.config.changes import change_config
from train.config.compose import compose_run, finish, read_config
from train.config.schema import RunConfig
from train.errors import UserError
from train.preflight import preflight, preflight_resume
from train.storage.run_folder import RunFolder, held, write_config

LAYOUT = {"nodes": "trainer.nodes", "gpus": "trainer.devices", "processes": "trainer.devices"}
"""Key of these commands -> the run's key that it stands for; a plan suggests the latter."""


@dataclass
class RunOptions:
    """Which run is started, and on how many nodes and GPUs; what `local` and `slurm` share."""

    resume: Path | None = setting("a run folder whose run goes on from its newest checkpoint", None)
    override: bool = setting("with resume: change keys that change the results too", False)
    nodes: int | None = setting("nodes; null: those of the run", None, must=at_least(1))
    gpus: int | None = setting("GPUs of each node, one process each; null: those of the run", None, must=at_least(1))


def layout(given: int | None, key: str, settings: dict[str, str]) -> int | None:
    """The number that ``nodes``, ``gpus`` or ``processes`` stands for; takes the run's key of the same meaning out of
    the settings.

    Args:
        given: the command's own.

    Returns:
        The number; None where neither is given.

    Raises:
        UserError: the run's is not a whole number of at least 1, or the two differ.
    """
    text = settings.pop(LAYOUT[key], None)
    if text is None:
        return given
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"{LAYOUT[key]} is {text!r}, expected a whole number of at least 1")
    if given not in (None, int(text)):
        raise UserError(f"{key} is {given} and {LAYOUT[key]} is {text}, expected the same number: give {key} alone")
    return int(text)


def prepare(
    options: RunOptions,
    settings: dict[str, str],
    nodes: int | None,
    devices: int | None,
    *,
    elsewhere: bool,
    offline: bool = False,
) -> tuple[RunFolder, RunConfig]:
    """The folder of a new run, or with ``resume=<run folder>`` of one that goes on; and its config.

    Args:
        options: which run goes on, if one does.
        settings: of the run, as ``python -m train`` takes them.
        nodes, devices: the layout; None leaves what the config has.
        elsewhere: the run is for other machines.
        offline: nothing is asked over the network.
    """
    for key, number in (("trainer.nodes", nodes), ("trainer.devices", devices)):
        if number is not None:
            settings[key] = str(number)
    if options.resume is not None:
        folder = options.resume
        check_not_queued(folder, recorded(folder).get("job"))
        config = change_config(read_config(folder), settings, override=options.override)
        preflight_resume(config, folder, elsewhere=elsewhere, offline=offline, override=options.override)
        with held(folder):  # not under a run that reads it
            write_config(config, folder)
        return RunFolder(folder), config
    config = finish(compose_run(settings))
    preflight(config, elsewhere=elsewhere, offline=offline)
    return RunFolder.create(config), config
