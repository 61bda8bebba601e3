"""What `local` and `slurm` share: from the command line to a run's folder with its config."""

from __future__ import annotations

from pathlib import Path

from launch.records import recorded
from launch.slurm_jobs import check_not_queued
from train.cli import flag, whole_number
from train.config.compose import change_config, compose_run, finish, read_config
from train.config.schema import RunConfig
from train.errors import UserError
from train.preflight import preflight, preflight_resume
from train.storage.run_folder import RunFolder, held, write_config

LAYOUT = {"nodes": "trainer.nodes", "gpus": "trainer.devices", "processes": "trainer.devices"}
"""Key of these commands -> the run's key that it stands for; a plan suggests the latter."""


def layout(settings: dict[str, str], key: str) -> int | None:
    """Takes ``nodes``, ``gpus`` or ``processes`` out of the settings, and the run's key of the same meaning.

    Returns:
        The number; None where neither is given.

    Raises:
        UserError: it is not a whole number of at least 1, or the two differ.
    """
    found = {name: whole_number(name, settings.pop(name)) for name in (key, LAYOUT[key]) if name in settings}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name} is {value}" for name, value in found.items())
        raise UserError(f"{said}, expected the same number: give {key} alone")
    return next(iter(found.values()), None)


def prepare(
    settings: dict[str, str], nodes: int | None, devices: int | None, *, elsewhere: bool, offline: bool = False
) -> tuple[RunFolder, RunConfig]:
    """The folder of a new run, or with ``resume=<run folder>`` of one that goes on; and its config.

    Args:
        settings: of the run, as ``python -m train`` takes them.
        nodes, devices: the layout; None leaves what the config has.
        elsewhere: the run is for other machines.
        offline: nothing is asked over the network.
    """
    for key, number in (("trainer.nodes", nodes), ("trainer.devices", devices)):
        if number is not None:
            settings[key] = str(number)
    if "resume" in settings:
        folder = Path(settings.pop("resume"))
        check_not_queued(folder, recorded(folder).get("job"))
        config = change_config(read_config(folder), settings)
        override = flag("override", settings.get("override", "false"))
        preflight_resume(config, folder, elsewhere=elsewhere, offline=offline, override=override)
        with held(folder):  # not under a run that reads it
            write_config(config, folder)
        return RunFolder(folder), config
    config = finish(compose_run(settings))
    preflight(config, elsewhere=elsewhere, offline=offline)
    return RunFolder.create(config), config
