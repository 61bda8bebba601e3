"""The command lines of data/: `key=value` words, read by the type of the key, with a --help made from the schema.

A value is taken as it was typed: nothing needs quoting beyond what the shell asks for, and the first `=` splits. A
boolean key may also be switched on as `--key`. A mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NewType, TypeVar, get_args, get_type_hints

from data.errors import DataError, told
from data.io.console import drop_what_cannot_be_written

T = TypeVar("T")
Place = NewType("Place", str)
"""A path or an address, or several with commas between them: a field's type where `Path` would spoil a URL."""
_UNSET: Any = dataclasses.MISSING
# where a path begins: with the text, or after a comma, a bracket or a quote of a list
_HOME = re.compile(r"(^|[,\[]\s*['\"]?)(~[\w.-]*)(?=/|$)")
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


def setting(about: str, default: Any = _UNSET, choices: Sequence[str] = ()) -> Any:
    """A field of a command's schema: what --help says of it, its default (required without one), its choices."""
    return dataclasses.field(default=default, metadata={"about": about, "choices": tuple(choices)})


def parse(schema: type[T], words: Sequence[str], positional: str | None = None) -> T:
    """The words as an instance of `schema`, a dataclass whose fields are made by `setting`.

    Args:
        schema: fields are str, int, float, bool, Path or Place, or one of these or None; `null` stands for None.
        words: `key=value`, `--key` for a boolean, and one bare word when `positional` names a field.
        positional: the field that a bare word sets.

    Raises:
        DataError: an unknown key, a key given twice, a wrong type, an empty path, a URL for a path, a value that is no
            choice, a missing key.
    """
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    hints = get_type_hints(schema)
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals and word.startswith("--") and hints.get(word[2:].replace("-", "_")) is bool:
            name, text = word[2:].replace("-", "_"), "true"
        elif not equals and positional and not word.startswith("-"):
            name, text = positional, word
        elif not equals:
            raise DataError(f"{word!r} is not a setting, expected key=value (see --help)")
        if name not in fields:
            near = difflib.get_close_matches(name, list(fields), n=1)
            raise DataError(f"{name} is not a known key{f'; did you mean {near[0]}?' if near else ' (see --help)'}")
        if name in values:
            raise DataError(f"{name} is given twice")
        values[name] = _value(name, text, hints[name], fields[name].metadata["choices"])
    for name, field in fields.items():
        if name not in values and field.default is _UNSET:
            how = f"; {field.metadata['about']}"
            raise DataError(f"{name} is not set, give {'it' if name == positional else f'{name}=VALUE'}{how}")
    return schema(**values)


def _value(name: str, text: str, hint: Any, choices: Sequence[str]) -> Any:
    kinds = get_args(hint) or (hint,)
    if text == "null" and NoneType in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not NoneType)
    if choices and text not in choices:
        raise DataError(f"{name} is {text!r}, expected one of {', '.join(choices)}")
    if kind is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise DataError(f"{name} is {text!r}, expected true or false")
        return text.lower() in _TRUE
    if kind is Path:
        if not text:  # which Path takes for the current folder
            raise DataError(f"{name} is empty, expected a path; is a variable of the shell not set?")
        if re.match("[A-Za-z][A-Za-z0-9+.-]*://", text):
            raise DataError(f"{name} is {text}, expected a path on this machine; copy it from or to there by hand")
        return Path(expanded(text))
    if kind is Place:
        return expanded(text)
    try:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except ValueError as error:
        raise DataError(f"{name} is {text!r}, expected {'a number' if kind is float else 'a whole number'}") from error
    return value


def expanded(text: str) -> str:
    """A path with ~ as the home folder, as a shell has it; or a list of paths; any other text is left as it is."""

    def home(found: re.Match[str]) -> str:
        try:
            return found[1] + str(Path(found[2]).expanduser())
        except RuntimeError:  # nobody has that name
            return found[0]

    return _HOME.sub(home, text)


def usage(schema: type, synopsis: str, about: str, examples: Sequence[str]) -> str:
    """The text of --help."""
    lines = [synopsis, "", about, ""]
    for field in dataclasses.fields(schema):
        default = "required" if field.default is _UNSET else "null" if field.default is None else str(field.default)
        choices = f" [{', '.join(field.metadata['choices'])}]" if field.metadata["choices"] else ""
        lines.append(f"  {field.name:<16} {field.metadata['about']}{choices} ({default.lower()})")
    return "\n".join([*lines, "", "examples:", *(f"  {example}" for example in examples)])


def run(command: Callable[[list[str]], int], prog: str, help_text: str, words: list[str] | None = None) -> None:
    """Run a command line: prints `help_text` for --help, turns mistakes into one line and exit code 2.

    Output that nobody takes any more ends nothing (`data.io.console`).

    Args:
        command: gets the words, returns the exit code.
        prog: the command's name, the start of an error's line.
        help_text: what --help prints.
        words: instead of the process's own.
    """
    drop_what_cannot_be_written()
    words = sys.argv[1:] if words is None else words
    if any(word in ("-h", "--help") for word in words):
        print(help_text)
        return
    try:
        code = command(words)
    except (DataError, OSError) as error:
        print(f"{prog}: {told(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{prog}: stopped", file=sys.stderr)
        code = 130
    if code:
        raise SystemExit(code)
