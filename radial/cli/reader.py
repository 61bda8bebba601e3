"""From the words of a command line to a dataclass of settings, by one grammar for every command.

    key=value      --key=value      --key value      --flag (of a setting that is true or false)      VALUE

The last is for the one setting, such as a run folder, that a command also takes without its name. In a name after
``--`` a - stands for _. A value is taken as it was typed: nothing needs quoting beyond what the shell asks for, and the
first ``=`` splits. ``null`` unsets what may be unset; lists have commas between their items; in paths a ~ is the home
folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from radial.cli.settings import (
    REQUIRED,
    check_value,
    default_of,
    key_of,
    kind_in_words,
    may_be_none,
    plain_kind,
    text_of,
)
from radial.errors import Mistake

T = TypeVar("T")
# where a path begins: with the text, or after a comma, a bracket or a quote of a list
_HOME = re.compile(r"(^|[,\[]\s*['\"]?)(~[\w.-]*)(?=/|$)")


def read(schema: type[T], words: Sequence[str], positional: str | None = None) -> T:
    """The words as an instance of ``schema``, a dataclass whose fields are made by `radial.cli.settings.setting`.

    Args:
        schema: fields are str, int, float, bool, Path, lists of these, or one of these or None.
        positional: the field that a word without a name sets; each such word is an item of it where it is a list.

    Raises:
        Mistake: an unknown key, a key given twice, a wrong type, an empty path, a URL for a path on this machine, a
            value outside of the key's choices or bounds, a missing key.
    """
    return _read(schema, words, positional, others=False)[0]


def read_some(schema: type[T], words: Sequence[str], positional: str | None = None) -> tuple[T, dict[str, str]]:
    """As `read`; ``key=value`` words with keys of others are handed back as they were typed.

    Raises:
        Mistake: as `read`, but for unknown keys.
    """
    return _read(schema, words, positional, others=True)


def _read(schema: type[T], words: Sequence[str], positional: str | None, *, others: bool) -> tuple[T, dict[str, str]]:
    fields = {key_of(field): field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    types = get_type_hints(schema)
    hints = {name: types[field.name] for name, field in fields.items()}
    texts: dict[str, str] = {}
    unnamed: list[str] = []
    short = {f"-{field.metadata['short']}": f"--{name}" for name, field in fields.items() if field.metadata["short"]}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        word = short.get(word, word)
        name, equals, text = word.partition("=")
        if word.startswith("--"):
            name = name[2:].replace("-", "_")
            if name not in fields:
                raise Mistake(f"{word!r} is not an option{guess(name, list(fields), '--')} (see --help)")
            if not equals and plain_kind(hints[name]) is bool:
                text = "true"
            elif not equals and not rest:
                raise Mistake(f"{word} needs a value")
            elif not equals:
                text = rest.pop(0)
        elif positional and not word.startswith("-") and _is_value(word, equals, name, fields):
            unnamed.append(word)
            continue
        elif not equals or not name:
            raise Mistake(f"{word!r} is not a setting, expected key=value (see --help)")
        if name in texts:
            raise Mistake(f"{name} is given twice")
        texts[name] = text
    unknown = next((name for name in texts if name not in fields), None)
    if unknown is not None and not others:
        known = list(fields)
        near = guess(unknown, known) or (
            f", expected one of {', '.join(known)}" if len(known) < 10 else " (see --help)"
        )
        raise Mistake(f"{unknown} is not a known key{near}")
    values: dict[str, Any] = {
        name: _value(fields[name], hints[name], texts.pop(name)) for name in fields if name in texts
    }
    if positional and unnamed:
        if positional in values or (len(unnamed) > 1 and get_origin(plain_kind(hints[positional])) is not list):
            raise Mistake(f"{positional} is given twice: {' '.join(unnamed)}")
        values[positional] = _value(fields[positional], hints[positional], unnamed)
    for name, field in fields.items():
        if name not in values and default_of(field) is REQUIRED:
            how = "it" if name == positional else f"{name}=VALUE"
            raise Mistake(f"{name} is not set, give {how}; {field.metadata['about']}")
    return schema(**{fields[name].name: value for name, value in values.items()}), texts


def words_of(given: Any) -> list[str]:
    """Words that `read` makes the same settings of, without those that have their defaults."""
    words = []
    for field in dataclasses.fields(given):
        value, none = getattr(given, field.name), field.metadata["none"]
        if value != default_of(field):
            items = value if isinstance(value, list) else [value]
            words.append(f"{key_of(field)}={','.join(text_of(item, none) for item in items)}")
    return words


def settings_of(words: Sequence[str]) -> dict[str, str]:
    """``key=value`` words as they were typed, by key.

    Raises:
        Mistake: a word without ``=``, or a key given twice.
    """

    @dataclasses.dataclass
    class Nothing:
        pass

    return read_some(Nothing, words)[1]


def _is_value(word: str, equals: str, name: str, fields: Iterable[str]) -> bool:
    """Whether a word is a value without a name: it has no ``=``, or is a path that is there and has one."""
    return not equals or (name not in fields and Path(word).exists())


def _value(field: dataclasses.Field[Any], hint: Any, text: str | list[str]) -> Any:
    name, kind = key_of(field), plain_kind(hint)
    if text == field.metadata["none"] and may_be_none(hint):
        return None
    if get_origin(kind) is list:
        items = text.split(",") if isinstance(text, str) else text
        value: Any = [_item(field, get_args(kind)[0], item) for item in items]
    else:
        value = _item(field, kind, text[0] if isinstance(text, list) else text)
    check_value(name, field, value)
    return value


def _item(field: dataclasses.Field[Any], kind: Any, text: str) -> Any:
    name = key_of(field)
    if kind is bool:
        return read_bool(name, text)
    if not text and (kind is Path or field.metadata["path"]):  # which Path takes for the current folder
        raise Mistake(f"{name} is empty, expected a path; is a variable of the shell not set?")
    if kind is Path:
        if re.match("[A-Za-z][A-Za-z0-9+.-]*://", text):
            raise Mistake(f"{name} is {text}, expected a path on this machine; copy it from or to there by hand")
        return Path(expanded(text))
    if kind is str:
        return expanded(text) if field.metadata["path"] else text
    try:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except ValueError as error:
        must = field.metadata["must"]
        expected = kind_in_words(kind) + (f", {must.words}" if must else "")
        raise Mistake(f"{name} is {text!r}, expected {expected}") from error
    return value


def read_bool(name: str, text: str) -> bool:
    """true or false.

    Raises:
        Mistake: something else.
    """
    if text.lower() not in ("true", "false"):
        raise Mistake(f"{name} is {text!r}, expected true or false")
    return text.lower() == "true"


def expanded(text: str) -> str:
    """A path with ~ as the home folder, as a shell has it; or a list of paths; any other text is left as it is."""

    def home(found: re.Match[str]) -> str:
        try:
            return found[1] + str(Path(found[2]).expanduser())
        except RuntimeError:  # nobody has that name
            return found[0]

    return _HOME.sub(home, text)


def guess(word: str, known: Sequence[str], before: str = "") -> str:
    """``; did you mean …?`` where a known word is near, else nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {before}{near[0]}?" if near else ""
