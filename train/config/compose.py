"""From what a user types to a `RunConfig`.

Run files are ``conf/<run>.yaml``; groups are the folders beside them. Hydra composes the run file with the groups that
the command line chooses; every other ``key=value`` is applied to the typed schema as it was typed, without Hydra's
quoting rules: a value is read by the type of its key, so that a prompt may hold commas and a path ``=``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from radial.cli.reader import expanded, guess, read_bool
from radial.cli.settings import may_be_none
from train.config.check import validate
from train.config.schema import KEYS, RunConfig, literal
from train.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
DEFAULT_RUN = "shapes_4x"


def run_names() -> list[str]:
    """The run files that ``conf=`` may name."""
    return sorted(path.stem for path in CONF.glob("*.yaml"))


def group_options() -> dict[str, list[str]]:
    """Group name -> its options."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and any(folder.glob("*.yaml"))
    }


def compose_run(settings: dict[str, str]) -> DictConfig:
    """The composed, typed config of a run; nothing is checked beyond names and types.

    Raises:
        UserError: an unknown run, group option or key, a wrong type, a missing value.
    """
    settings = dict(settings)
    run = settings.pop("conf", DEFAULT_RUN)
    if run not in run_names():
        raise UserError(f"conf is {run!r}, expected one of {', '.join(run_names())}{guess(run, run_names())}")
    groups = group_options()
    chosen = {key: settings.pop(key) for key in list(settings) if key in groups}
    for group, option in chosen.items():
        if option not in groups[group]:
            raise UserError(
                f"{group} is {option!r}, expected one of {', '.join(groups[group])}{guess(option, groups[group])}"
            )
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose(run, overrides=[_override(run, group, option) for group, option in chosen.items()])
        config = OmegaConf.merge(OmegaConf.structured(RunConfig), composed, {"conf": run})
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"conf/{run}.yaml: {_one_line(error)}") from error
    assert isinstance(config, DictConfig)
    for key, text in settings.items():
        assign(config, key, text)
    return config


@cache
def composed_default(run: str, key: str) -> Any:
    """What a run file and its groups have for a key; None where this version has no such run."""
    return OmegaConf.select(compose_run({"conf": run}), key) if run in run_names() else None


def _override(run: str, group: str, option: str) -> str:
    """Hydra's override; a group that the run file leaves at the schema's defaults is added with ``+``."""
    defaults = yaml.safe_load((CONF / f"{run}.yaml").read_text(encoding="utf-8")).get("defaults", [])
    listed = any(isinstance(entry, dict) and group in entry for entry in defaults)
    return f"{'' if listed else '+'}{group}={option}"


def finish(config: DictConfig) -> RunConfig:
    """The config as dataclasses, complete and validated.

    Raises:
        UserError: see `train.config.check.validate`; or a value that is missing.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} is not set, give {missing[0]}=VALUE")
    try:
        run = cast(RunConfig, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise UserError(f"conf/{OmegaConf.select(config, 'conf')}.yaml: {_one_line(error)}") from error
    validate(run)
    return run


def read_config(run: Path) -> RunConfig:
    """The config that a run was started with.

    Raises:
        UserError: not a run folder, or a config of another version of this project.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run} has no config.yaml, expected a run folder such as runs/shapes_4x/<time>")
    try:
        stored = OmegaConf.load(file)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), stored))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{file} does not fit this version: {str(error).splitlines()[0]}") from error
    assert isinstance(config, RunConfig)
    if OmegaConf.select(stored, "attention.dense_steps") is None:  # of a version with one shift for clips of all sizes
        objective = replace(config.objective, shift=config.shift(), shift_with_length=False)
        config = replace(config, objective=objective)
    return config


def assign(config: DictConfig, key: str, text: str) -> None:
    """Sets a key of a typed config to a value as it was typed.

    Raises:
        Mistake: an unknown key, a section, or a value of another type.
    """
    parts = key.split(".")
    open_ended = any(".".join(parts[:n]) == "model.architecture" for n in range(1, len(parts)))
    if key not in KEYS and not open_ended:
        inner = [name for name in KEYS if name.startswith(key + ".")]
        if inner and not (text == "null" and may_be_none(get_type_hints(RunConfig).get(key))):
            raise UserError(f"{key} is a section, set its keys: {', '.join(inner)}")
        if not inner:
            raise UserError(f"{key} is not a known key{guess(key, [*group_options(), *KEYS])}")
    known = KEYS.get(key)
    value: Any = expanded(text) if known is not None and known.is_path else text
    if text == "null":
        value = None
    elif known is not None and known.is_bool:
        value = read_bool(key, text)
    elif open_ended or (known is not None and known.is_yaml):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{key} is {text!r}, expected a YAML value: {_one_line(error)}") from error
    section = key.rpartition(".")[0]
    if section and OmegaConf.select(config, section) is None:
        raise UserError(f"{key} cannot be set, {section} is null in this run")
    try:
        OmegaConf.update(config, key, literal(value), merge=False, force_add=open_ended)
    except ConfigKeyError as error:
        raise UserError(f"{key} is not a known key{guess(key, [*group_options(), *KEYS])}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{key} is {text!r}, expected {known.kind if known else 'another type'}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())
