"""The arguments with which a folder was begun, beside those that are asked for: a folder is only continued with the
same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.encoders import same_encoder
from data.errors import DataError
from data.prepare.clip_rules import ALL

YOUNGER = {
    "upscale": True,
    "min_fps": None,
    "start_column": None,
    "end_column": None,
    "captions": "require",
    "dedup": False,
    "upload": None,
    **asdict(ALL),
}
"""Arguments that folders of earlier versions do not know, with what they were made with."""


def _others(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Each argument, the encoder among them, that is another."""
    other = []
    for name, value in asked.items():
        found = there.get(name, YOUNGER.get(name))
        if not (same_encoder(found, value) if name == "encoder" and found else found == value):
            other.append(f"{name}={found} (asked: {value})")
    return other


def same(there: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether a folder was begun with these arguments."""
    return not _others(there, asked)


def check_same(out: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise a DataError that names each argument with which a folder was begun otherwise."""
    before, now = there.get("decoding", 1), asked["decoding"]
    if there.get("made_by") == asked["made_by"] and before != now:
        raise DataError(
            f"{out}: its videos were decoded by version {before}, this is version {now}, which gives other pixels: "
            "choose another out= or delete it"
        )
    other = _others(there, asked)
    if other:
        raise DataError(f"{out}: was begun with {', '.join(other)}; ask for the same, choose another out= or delete it")
