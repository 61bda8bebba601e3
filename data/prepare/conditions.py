"""Conditions on the columns of a list, or on what a video's header says: `score>4.5, camera=static`."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data.errors import DataError

PROBED = ("frames", "seconds", "fps", "width", "height", "aspect")
"""What a condition may ask for without a column of that name: it is then read from the video."""

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
_CONDITION = re.compile(r"\s*(.+?)\s*(>=|<=|!=|==|>|<|=)\s*(.+?)\s*")


@dataclass(frozen=True)
class Condition:
    """`column operator value`, such as `score > 4.5`; numbers are compared as numbers."""

    column: str
    symbol: str
    value: str

    def holds(self, columns: Mapping[str, Any]) -> bool:
        """Whether it holds for these columns; a value that is missing or no number holds for nothing but `!=`.

        true and false are the same in capitals, as tables write them in many ways.
        """
        compare, found = _OPERATORS[self.symbol], columns.get(self.column)
        wanted = self._wanted
        if wanted is not None:
            actual = number(found)
            return self.symbol == "!=" if actual is None else compare(actual, wanted)
        text, value = "" if found is None else str(found), self.value
        if value.lower() in ("true", "false"):
            text, value = text.lower(), value.lower()
        return compare(text, value)

    @cached_property
    def _wanted(self) -> float | None:
        return number(self.value)


def number(value: Any) -> float | None:
    """The value as a finite number, or None."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def parse_conditions(text: str) -> list[Condition]:
    """`score>4.5, width>=1280 and camera=static` as conditions, all of which must hold.

    Raises:
        DataError: a part that is no condition, or that orders by something that is no number.
    """
    conditions = []
    for part in re.split(r",|\s+and\s+", text):
        match = _CONDITION.fullmatch(part)
        if match is None or match[3][0] in "<>=!":  # `=>` is no operator
            raise DataError(f"where: {part.strip()!r} is not a condition, expected such as score>4.5 or camera=static")
        condition = Condition(*match.groups())
        if condition.symbol in (">=", "<=", ">", "<") and number(condition.value) is None:
            raise DataError(f"where: {part.strip()!r} compares with {condition.value!r}, expected a number")
        conditions.append(condition)
    return conditions


def split_conditions(conditions: Sequence[Condition], columns: Collection[str]) -> tuple[list[Condition], ...]:
    """Splits conditions into those on the table's columns, and those on what only the video itself shows (`PROBED`).

    Raises:
        DataError: a condition on neither.
    """
    for condition in conditions:
        if condition.column not in columns and condition.column not in PROBED:
            raise DataError(f"where: {no_column(condition.column, [*columns, *PROBED])}")
    table = [condition for condition in conditions if condition.column in columns]
    return table, [condition for condition in conditions if condition.column not in columns]


def no_column(name: str, columns: Collection[str]) -> str:
    """What an error says of a column that is not there."""
    near = difflib.get_close_matches(name, list(columns), n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return f"there is no column {name!r}, found {', '.join(columns) or 'none'}{guess}"
