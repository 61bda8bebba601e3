"""``python -m train --help``: the runs, the groups and the sections; with a word, what stands behind it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import MISSING

from radial.cli.reader import guess
from radial.cli.settings import described, help_lines
from train.config.compose import CONF, DEFAULT_RUN, group_options, run_names
from train.config.keys import sections_of
from train.config.schema import KEYS, RunConfig
from train.errors import UserError

ALONE = [name for name in KEYS if "." not in name]
"""Keys that stand in no section."""
SECTIONS = sections_of(RunConfig)


def overview() -> list[str]:
    """What can be set, without the keys of sections: runs, groups, sections, and how to see more."""
    lines = ["runs (conf=...):", *_runs()]
    lines += ["", "groups (model=..., and so on), each a set of keys:"]
    for group, options in group_options().items():
        lines += described(group, ", ".join(options))
    lines += ["", "sections of keys (optim.lr=..., and so on):"]
    for name, about in SECTIONS.items():
        lines += described(name, about)
    return [*lines, "", "keys of no section:", *(line for name in ALONE for line in _key(name))]


def topic(word: str) -> list[str]:
    """What ``--help <word>`` prints: a section's keys, one key, a group's options, or the run files.

    Raises:
        UserError: there is no such word.
    """
    groups, lines = group_options(), []
    if word in SECTIONS:
        lines += [f"{word}: {SECTIONS[word]}", ""]
        lines += [line for name in KEYS if name.startswith(f"{word}.") for line in _key(name)]
    if word in groups:
        lines += [""] * bool(lines) + [f"{word}=... sets several keys at once; it is one of"]
        for option in groups[word]:
            lines += described(option, _first_comment(CONF / word / f"{option}.yaml"))
    if word in KEYS:
        lines += _key(word)
    if word == "conf":
        lines += _runs()
    if not lines:
        known = [*SECTIONS, *groups, *KEYS]
        near = guess(word, known) or "; python -m train --help lists them"
        raise UserError(f"--help {word}: there is no such section, key or group{near}")
    return lines


def _runs() -> list[str]:
    return [line for name in run_names() for line in described(name, _first_comment(CONF / f"{name}.yaml"))]


def _key(name: str) -> list[str]:
    key = KEYS[name]
    required = "set by the run file or its groups" if key.field.default == MISSING else None
    if name == "conf":
        required = f"default {DEFAULT_RUN}"
    return help_lines(name, key.field, key.hint, required)


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if not line.startswith("# @package")).lstrip("# ")
