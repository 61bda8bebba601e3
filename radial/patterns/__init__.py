"""Static attention patterns: which block pairs of a video grid attend to each other. One file a kind.

* `Released`: the mask of the public Radial Attention inference code, the default. `Paper`: Eq. 4 of arXiv 2506.19852.
* `Dense`: everything. `Random`: the floor that a mask has to beat.
* `Fitted`: a mask for each head, fitted to the model's own attention (`radial.fit`).
* `Local`, `Spatial`, `Temporal`, `SlidingTile`, `Power`, `ShiftedGroups`: the field's other static patterns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from radial.errors import RadialError
from radial.patterns.base import Pattern
from radial.patterns.dense import Dense
from radial.patterns.fitted import Fitted
from radial.patterns.head_masks import HeadMasks
from radial.patterns.paper import Paper
from radial.patterns.power import Power
from radial.patterns.random import Random
from radial.patterns.released import RULES, Released
from radial.patterns.shifted import ShiftedGroups
from radial.patterns.sliding_tile import SlidingTile
from radial.patterns.window import Local, Spatial, Temporal

__all__ = [
    "PATTERNS",
    "RULES",
    "Dense",
    "Fitted",
    "HeadMasks",
    "Local",
    "Paper",
    "Pattern",
    "Power",
    "Random",
    "Released",
    "ShiftedGroups",
    "SlidingTile",
    "Spatial",
    "Temporal",
    "make_pattern",
]

_KINDS: tuple[type[Pattern], ...] = (
    *(Released, Paper, Fitted, Random, Dense),
    *(Local, Spatial, Temporal, SlidingTile, Power, ShiftedGroups),
)
PATTERNS: dict[str, type[Pattern]] = {kind.name: kind for kind in _KINDS}


def make_pattern(
    name: str,
    *,
    decay: float = 1.0,
    rule: str = "wan",
    reach: float | None = None,
    per_head: bool = False,
    masks: str | Path | None = None,
) -> Pattern:
    """The pattern of that name.

    Args:
        name: a key of `PATTERNS`.
        decay, rule: which released mask it is, or has as many blocks as (``random``); for the others they have to be
            valid all the same.
        reach: the parameter of the patterns that have one of this name; None: its default.
        per_head: of ``random``: a draw for each head of each layer.
        masks: of ``fitted``: the file of ``python -m radial fit``.

    Raises:
        RadialError: an unknown name, a value that the pattern refuses, or one that it does not have.
    """
    released = Released(decay=decay, rule=rule)
    if name not in PATTERNS:
        raise RadialError(f"pattern is {name!r}, expected one of {', '.join(PATTERNS)}")
    kind = PATTERNS[name]
    given: dict[str, Any] = {}
    if reach is not None:
        if kind.parameter != "reach":
            takers = ", ".join(n for n, other in PATTERNS.items() if other.parameter == "reach")
            raise RadialError(f"reach is {reach}, pattern {name} has none: leave it out (it is of {takers})")
        given["reach"] = reach
    if per_head:
        if kind is not Random:
            raise RadialError(f"per_head is of pattern {Random.name}, {name} has none: leave it out")
        given["per_head"] = True
    if (masks is None) == (kind is Fitted):
        raise RadialError(
            f"masks is not set, pattern {name} needs the file that python -m radial fit writes"
            if kind is Fitted
            else f"masks is of pattern {Fitted.name}, {name} has none: leave it out"
        )
    if masks is not None:
        given["masks"] = HeadMasks.read(masks)
    if kind is Random:
        given["like"] = released
    return released if kind is Released else kind(**given)
