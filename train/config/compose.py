"""From what a user types to a `RunConfig`.

Run files are ``conf/<run>.yaml``; groups are the folders beside them. Hydra composes the run file with the groups that
the command line chooses; every other ``key=value`` is applied to the typed schema as it was typed, without Hydra's
quoting rules: a value is read by the type of its key, so that a prompt may hold commas and a path ``=``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from data.cli import expanded
from train.cli import flag
from train.config.check import validate
from train.config.global_batch import clips_a_step
from train.config.schema import RunConfig, literal, structured
from train.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
DEFAULT_RUN = "shapes_4x"


PATHS = frozenset(("run", "resume", "out", "checkpoint", "add", "add_2", "container", "mounts"))
"""Keys of commands that are paths."""
RUN_PATHS = frozenset(("runs", "model.path", "lora.init", "data.shards", "data.cache", "validation.shards",
                       "validation.images"))  # fmt: skip
"""Keys of a run that are paths, or addresses."""


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


def split_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """``key=value`` words as a dict; the first ``=`` splits. In paths a ~ is the home folder.

    Raises:
        UserError: a word without ``=``, or a key given twice.
    """
    settings: dict[str, str] = {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not a setting, expected key=value (see --help)")
        if key in settings:
            raise UserError(f"{key} is given twice")
        settings[key] = expanded(value) if key in PATHS else value
    return settings


def compose_run(settings: dict[str, str]) -> DictConfig:
    """The composed, typed config of a run; nothing is checked beyond names and types.

    Raises:
        UserError: an unknown run, group option or key, a wrong type, a missing value.
    """
    settings = dict(settings)
    run = settings.pop("conf", DEFAULT_RUN)
    if run not in run_names():
        raise UserError(f"conf is {run!r}, expected one of {', '.join(run_names())}{_guess(run, run_names())}")
    groups = group_options()
    chosen = {key: settings.pop(key) for key in list(settings) if key in groups}
    for group, option in chosen.items():
        if option not in groups[group]:
            raise UserError(
                f"{group} is {option!r}, expected one of {', '.join(groups[group])}{_guess(option, groups[group])}"
            )
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose(run, overrides=[_override(run, group, option) for group, option in chosen.items()])
        config = OmegaConf.merge(OmegaConf.structured(RunConfig), composed, {"conf": run})
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"conf/{run}.yaml: {_one_line(error)}") from error
    assert isinstance(config, DictConfig)
    for key, text in settings.items():
        _assign(config, key, text)
    return config


def run_file(run: str) -> dict[str, Any]:
    """What ``conf/<run>.yaml`` says itself, without its groups; empty where this version has no such run."""
    file = CONF / f"{run}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _override(run: str, group: str, option: str) -> str:
    """Hydra's override; a group that the run file leaves at the schema's defaults is added with ``+``."""
    defaults = run_file(run).get("defaults", [])
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


FREE = ("trainer.nodes", "trainer.devices", "trainer.checkpoint_every", "trainer.checkpoint_minutes", "trainer.keep",
        "trainer.compile", "trainer.check_memory", "trainer.timeout", "trainer.max_skipped", "data.batch_size",
        "data.workers", "data.cache", "data.max_bad", "optim.accumulate", "optim.global_batch", "runs")  # fmt: skip
FREE_SECTIONS = ("parallel", "log", "validation", "report")
"""With `FREE`: what may change on resume, as long as a step keeps its number of clips."""


def change_config(config: RunConfig, settings: dict[str, str]) -> RunConfig:
    """The config of a run that goes on with other settings.

    Args:
        settings: what changes; ``override=true`` lets keys in that change the results.

    Raises:
        UserError: keys that change the results, or the number of clips in a step, without ``override=true``, naming
            the differences; or the name of the run file.
    """
    settings = dict(settings)
    override = flag("override", settings.pop("override", "false"))
    typed = structured(config)
    for key, text in settings.items():
        _assign(typed, key, text)
    changed = finish(typed)
    found = differences(config, changed)
    if "conf" in found:
        raise UserError(f"{found['conf']}: a run keeps its run file; start a new run with conf={changed.conf}")
    if override:
        return changed
    matter = [line for key, line in found.items() if not _free(key)]
    if matter:
        raise UserError(
            f"{'; '.join(matter)}: this changes what the run computes. Add override=true to go on with it, "
            "or start a new run"
        )
    ranks = changed.trainer.nodes * changed.trainer.devices
    if ranks % changed.parallel.sequence or not changed.clips_at_once().is_integer():
        return changed  # preflight says what is wrong
    before, now = int(clips_a_step(config)), int(clips_a_step(changed))
    if now != before:
        raise UserError(
            f"a step would have {now} clips over all GPUs, it had {before}: {_as_many(before, changed)}add "
            f"override=true to go on with {now}"
        )
    return changed


def _as_many(clips: int, config: RunConfig) -> str:
    """What makes a step of so many clips with the layout of ``config``, in words; empty where nothing does."""
    share, rest = divmod(clips, int(config.clips_at_once()) // config.data.batch_size)
    if rest:
        return ""
    batch = math.gcd(config.data.batch_size, share)
    size = "" if batch == config.data.batch_size else f"data.batch_size={batch} "
    return f"set {size}optim.accumulate={share // batch} to keep them, or "


def differences(before: RunConfig, after: RunConfig) -> dict[str, str]:
    """Each key that differs, and how, in words."""
    old, new = (structured(config) for config in (before, after))
    found = {}
    for key in _leaves(RunConfig):
        one, other = OmegaConf.select(old, key), OmegaConf.select(new, key)
        if one != other:
            found[key] = f"{key} was {one}, now {other}"
    return found


def _free(key: str) -> bool:
    return key in FREE or key.split(".")[0] in FREE_SECTIONS


def _assign(config: DictConfig, key: str, text: str) -> None:
    known = _leaves(RunConfig)
    text = expanded(text) if key in RUN_PATHS else text
    parts = key.split(".")
    open_ended = any(".".join(parts[:n]) == "model.architecture" for n in range(1, len(parts)))
    if key not in known and not open_ended:
        inner = [name for name in known if name.startswith(key + ".")]
        if inner and text != "null":
            raise UserError(f"{key} is a section, set its keys: {', '.join(inner)}")
        if not inner:
            raise UserError(f"{key} is not a known key{_guess(key, known)}")
    value: Any = text
    if text == "null":
        value = None
    elif open_ended or "list" in known[key] or "dict" in known[key]:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{key} is {text!r}, expected a YAML value: {_one_line(error)}") from error
    section = key.rpartition(".")[0]
    if section and OmegaConf.select(config, section) is None:
        raise UserError(f"{key} cannot be set, {section} is null in this run")
    try:
        OmegaConf.update(config, key, literal(value), merge=False, force_add=open_ended)
    except ConfigKeyError as error:
        raise UserError(f"{key} is not a known key{_guess(key, known)}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{key} is {text!r}, expected {known.get(key, 'another type')}") from error


def _leaves(schema: type, prefix: str = "") -> dict[str, str]:
    """Dotted key -> its type in words, for every leaf of the schema."""
    found: dict[str, str] = {}
    hints = get_type_hints(schema)
    for entry in fields(schema):
        hint = hints[entry.name]
        inner = next((t for t in (hint, *get_args(hint)) if isinstance(t, type) and is_dataclass(t)), None)
        if inner is not None:
            found.update(_leaves(inner, f"{prefix}{entry.name}."))
        else:
            found[prefix + entry.name] = getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint)
    return found


def _guess(word: str, known: Sequence[str] | dict[str, str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())
