"""From the values of a sweep to the settings of each of its runs, in Hydra's own grammar.

``a,b``, ``choice(a,b)``, ``range(1,9,2)`` and, for groups, ``glob(*)`` give several values; ``shuffle``, ``sort`` and
the casts work as in Hydra. What Hydra's parser does not read as a sweep stands for itself, as it does without ``-m``: a
prompt with an apostrophe, a path with ``=``. ``choice("a fox, at dawn")`` is one value with a comma in it. What looks
like a number and is the value of a text stays as it is typed: ``data.shards=1.10,1.20``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString, Transformer, ValueType
from hydra.errors import HydraException

from radial.cli.settings import plain_kind
from train.config.compose import CONF, group_options
from train.config.schema import KEYS
from train.errors import UserError

ONE_FOR_ALL = ("conf", "runs")
"""A sweep has one folder, ``<runs>/<conf>/<time>``: these are taken as they are typed."""


def expand(settings: dict[str, str]) -> list[dict[str, str]]:
    """The settings of each run: every combination of the values, the last key changing fastest.

    Args:
        settings: key -> value as typed; the keys keep their order.

    Raises:
        UserError: a sweep without values or with a value that comes twice, or one without end.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        values = [[text] if key in ONE_FOR_ALL else _values(parser, key, text) for key, text in settings.items()]
    return [dict(zip(settings, combination, strict=True)) for combination in itertools.product(*values)]


def _values(parser: OverridesParser, key: str, text: str) -> list[str]:
    """The values of one key; the text itself where it is no sweep."""
    try:
        override = parser.parse_overrides([f"{key}={text}"])[0]
    except HydraException:
        return [text]
    if not override.is_sweep_override():
        return [text]
    if override.value_type is ValueType.INTERVAL_SWEEP:
        raise UserError(f"{key} is {text!r}, which has no end of values: give them as in range(0,1,0.1)")
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP and key not in group_options():
        raise UserError(f"{key} is {text!r}, but glob() is for groups: {', '.join(group_options())}")
    found = _texts(key, text, list(_elements(override)))
    twice = next((value for value in found if found.count(value) > 1), None)
    if not found or twice is not None:
        fault = "has no values" if twice is None else f"has {twice} twice"
        raise UserError(f"{key} is {text!r}, which {fault}: expected values that differ, such as {key}=A,B")
    return found


def _elements(override: Any) -> Iterator[Any]:
    return override.sweep_iterator(transformer=Transformer.identity)


def _texts(key: str, text: str, values: Sequence[Any]) -> list[str]:
    """The values as a person types them without ``-m``; of a key that takes a text, what Hydra reads as a number stays
    as it is typed here."""
    typed: list[str] = []
    if key in KEYS and plain_kind(KEYS[key].hint) is str:
        plain = re.fullmatch(r"(?:choice\()?([^()]*)\)?", text.strip())  # and no range or cast, which computes them
        typed = plain[1].split(",") if plain else []
    if len(typed) != len(values):  # one with a comma in it
        return [_as_typed(value) for value in values]
    pairs = zip(typed, values, strict=True)
    return [one.strip() if type(value) in (int, float) else _as_typed(value) for one, value in pairs]


def _as_typed(value: Any) -> str:
    """A value as a person types it without ``-m``."""
    value = _plain(value)
    if isinstance(value, (list, dict)):
        return yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
