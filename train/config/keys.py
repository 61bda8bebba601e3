"""A key of a run is one field of the schema: meaning, default, choices, bounds, and whether it may change on resume.

What checks values, resumes runs, finds paths and prints --help walks the schema with `keys_of`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from dataclasses import dataclass
from typing import Any, get_origin, get_type_hints

from radial.cli.settings import kind_in_words, plain_kind, setting


def key(about: str, default: Any, choices: Any = (), *, resume: bool = False, **more: Any) -> Any:
    """A field of a section: as `radial.cli.settings.setting`.

    Args:
        resume: it may change when a run goes on, as long as a step keeps its number of clips.
    """
    return setting(about, default, choices, resume=resume, **more)


def section(schema: type, *, resume: bool = False) -> Any:
    """A field that holds a section of keys, whose meaning is the docstring of ``schema``.

    Args:
        resume: all of its keys may change when a run goes on.
    """
    return dataclasses.field(default_factory=schema, metadata={"resume": resume})


@dataclass(frozen=True)
class Key:
    """One key of a run.

    Attributes:
        name: such as ``optim.lr``.
        hint: its type.
        field: of the schema, with the metadata of `key`.
        resume: it may change when a run goes on.
    """

    name: str
    hint: Any
    field: dataclasses.Field[Any]
    resume: bool

    @property
    def kind(self) -> str:
        """Its type in words."""
        return kind_in_words(self.hint)

    @property
    def is_yaml(self) -> bool:
        """Whether its value is typed as YAML: a list or a mapping."""
        return get_origin(plain_kind(self.hint)) in (list, dict)

    @property
    def is_bool(self) -> bool:
        """Whether it is true or false."""
        return plain_kind(self.hint) is bool

    @property
    def is_path(self) -> bool:
        """Whether it is a path or an address."""
        return bool(self.field.metadata["path"])


@functools.cache
def keys_of(schema: type) -> dict[str, Key]:
    """Every key of a schema by its dotted name, those of its sections too, in the order of their fields."""
    found: dict[str, Key] = {}
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner = plain_kind(hints[field.name])
        if not dataclasses.is_dataclass(inner):
            found[field.name] = Key(field.name, hints[field.name], field, field.metadata["resume"])
            continue
        for name, each in keys_of(inner).items():  # type: ignore[arg-type]
            full, resume = f"{field.name}.{name}", each.resume or field.metadata["resume"]
            found[full] = dataclasses.replace(each, name=full, resume=resume)
    return found


@functools.cache
def sections_of(schema: type) -> dict[str, str]:
    """The sections of a schema, and what each is for: its docstring in one line."""
    hints = {name: plain_kind(hint) for name, hint in get_type_hints(schema).items()}
    return {
        name: " ".join((inspect.getdoc(hint) or "").split())
        for name, hint in hints.items()
        if dataclasses.is_dataclass(hint)
    }


def value_of(config: Any, name: str) -> Any:
    """The value of a dotted key; None where its section is None."""
    for part in name.split("."):
        config = None if config is None else getattr(config, part)
    return config
