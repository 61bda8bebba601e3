"""A setting is one field of a dataclass: meaning, default, unit, choices and bounds stand in the field's metadata.

What reads values from a command line (`radial.cli.reader`), checks them and prints --help takes all of it from there.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args, get_origin

from radial.errors import Mistake

REQUIRED: Any = dataclasses.MISSING
"""The default of a setting that has none."""
_WIDTH, _COLUMN = 118, 26  # of --help: characters in a line, and before a meaning
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Bound:
    """What a value has to be beyond its type.

    Attributes:
        words: what is expected, as it follows "expected" in an error and stands in --help.
        holds: whether a value is so; never called with None.
    """

    words: str
    holds: Callable[[Any], bool]


def at_least(least: float) -> Bound:
    """``least`` or more, but not infinite; not a number (nan) is less than anything."""
    return Bound(f"at least {least:g}", lambda value: bool(least <= value < math.inf))


def within(low: float, high: float) -> Bound:
    """The bound of numbers from ``low`` to ``high``, both included."""
    return Bound(f"a number from {low:g} to {high:g}", lambda value: bool(low <= value <= high))


def each(bound: Bound) -> Bound:
    """The bound of a list, each of whose items has to keep ``bound``."""
    return Bound(f"{bound.words} each", lambda values: all(map(bound.holds, values)))


POSITIVE = Bound("a positive number", lambda value: 0 < value < math.inf)
POWER_OF_TWO = Bound("a power of two such as 64 or 128", lambda value: value >= 16 and value & (value - 1) == 0)


def setting(
    about: str,
    default: Any = REQUIRED,
    choices: Sequence[str] = (),
    *,
    unit: str = "",
    must: Bound | None = None,
    path: bool = False,
    none: str = "null",
    short: str = "",
    key: str = "",
    **more: Any,
) -> Any:
    """A field of a dataclass that people set.

    Args:
        about: what it is for, a phrase or sentences.
        default: required without one; a list or dict is copied for each instance.
        choices: the words that it may be.
        unit: of a number.
        must: its bounds.
        path: it is a path or an address, or several with commas between them: a ~ where one begins is the home folder.
        none: the word that stands for None, where it may be that.
        short: the letter of ``-m``, which stands for ``--multirun``.
        key: what people type, such as ``caption.model``, where that is not the field's name.
        **more: what else a schema notes of its settings.
    """
    metadata = {"about": about, "choices": tuple(choices), "unit": unit, "must": must, "path": path, "none": none,
                "short": short, "key": key}  # fmt: skip
    metadata |= more
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def key_of(field: dataclasses.Field[Any]) -> str:
    """What people type to set a field."""
    return field.metadata["key"] or field.name


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default, made anew where it is a list or dict; `REQUIRED` where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def check_value(name: str, field: dataclasses.Field[Any], value: Any) -> None:
    """Holds a value to the choices and bounds of its field; None stands for "not set" and is always possible.

    Raises:
        Mistake: naming the setting, its value and what is expected.
    """
    choices, must = field.metadata["choices"], field.metadata["must"]
    if value is None:
        return
    if choices and not set(value if isinstance(value, list) else [value]) <= set(choices):
        raise Mistake(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    if must is not None and not must.holds(value):
        raise Mistake(f"{name} is {value!r}, expected {must.words}")


def plain_kind(hint: Any) -> Any:
    """The type of a hint without the None that it may also be."""
    return next((kind for kind in get_args(hint) if kind is not NoneType), hint) if may_be_none(hint) else hint


def may_be_none(hint: Any) -> bool:
    """Whether a hint allows None."""
    return NoneType in get_args(hint)


def kind_in_words(hint: Any) -> str:
    """A type as an error names it: "a whole number" for ``int | None``."""
    kind = plain_kind(hint)
    if get_origin(kind) is list:
        return "a list such as [a, b]"
    if get_origin(kind) is dict:
        return "a mapping such as {a: 1}"
    return _KINDS.get(kind, "a path")


def text_of(value: Any, none: str = "null") -> str:
    """A value as people type it."""
    if value is None:
        return none
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(text_of, value))}]"
    return str(value)


def help_lines(name: str, field: dataclasses.Field[Any], hint: Any, default: str | None = None) -> list[str]:
    """What --help prints of one setting: name, meaning, choices or bounds, unit and default, wrapped.

    Args:
        default: in words, instead of the field's own.
    """
    about, choices, must, unit = (field.metadata[word] for word in ("about", "choices", "must", "unit"))
    facts = [f"one of {', '.join(choices)}"] if choices else [must.words] if must else []
    facts += [unit] if unit else []
    value = default_of(field)
    if default is None and value in ("", []):
        default = "default none"
    if default is None:
        none = field.metadata["none"]
        default = "required" if value is REQUIRED else f"default {text_of(value, none)}"
        if value is None and f"{none}:" in about:  # which explains it
            default = ""
    if plain_kind(hint) is bool and not facts:
        facts = ["true or false"]
    facts += [default] if default else []
    return described(name, f"{about} ({'; '.join(facts)})" if facts else about)


def described(name: str, about: str) -> list[str]:
    """A name and what it is, wrapped, the meaning in a column of its own."""
    lines = textwrap.wrap(about, _WIDTH - _COLUMN, break_long_words=False, break_on_hyphens=False)
    head = f"  {name:<{_COLUMN - 3}}"
    if len(head) >= _COLUMN:  # no room for the meaning beside it
        return [head, *(" " * _COLUMN + line for line in lines)]
    return [f"{head} {lines[0]}", *(" " * _COLUMN + line for line in lines[1:])]


def paragraphs(text: str) -> Iterable[str]:
    """A text wrapped to the width of --help, its paragraphs kept."""
    for paragraph in text.split("\n\n"):
        yield from textwrap.wrap(" ".join(paragraph.split()), _WIDTH, break_long_words=False, break_on_hyphens=False)
        yield ""
