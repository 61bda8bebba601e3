"""What of a clip has to be remembered, from the truth about its objects (`data.synth.worlds`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.synth.worlds import DELAY, HIDDEN, WHOLE, Actor

PASSING = ("visitor", "mover")
"""Roles of objects that go and come back; what is remembered of the others is a colour."""


@dataclass(frozen=True)
class Remembered:
    """What a clip shows again.

    Attributes:
        actor: the object.
        frames: in which it shows what was seen before, and had not been shown for a while; rising.
        since: the first frame without it, before these.
    """

    actor: Actor
    frames: list[int]
    since: int


def actors_of(meta: Mapping[str, Any], frames: int) -> list[Actor]:
    """The objects in the first frames of a clip, from its meta data; those in front last."""
    cut = ("colours", "positions", "seen")
    return [
        Actor.from_json({name: value[:frames] if name in cut else value for name, value in stored.items()})
        for stored in meta["actors"]
    ]


def remembered(meta: Mapping[str, Any], frames: int, given: int = 0) -> Remembered | None:
    """What the first frames of a clip show again; None where they show nothing so.

    Args:
        given: only what these first frames have shown counts, and only where it is shown after them; 0: all.
    """
    actors = {actor.role: actor for actor in actors_of(meta, frames)}
    seen_until = given or frames
    passing = next((actors[role] for role in PASSING if role in actors), None)
    if passing is not None:
        return _comes_back(passing, seen_until, given)
    lamp = actors["lamp"]
    if "signal" in actors:
        again = [t for t in range(max(given, DELAY), frames) if lamp.colours[t] and t - DELAY < seen_until]
        return Remembered(lamp, again, max(given, DELAY)) if again else None
    whole = _round(meta["actors"][[stored["role"] for stored in meta["actors"]].index("lamp")]["colours"])
    again = list(range(max(given, whole), frames)) if whole and whole <= seen_until else []
    return Remembered(lamp, again, again[0]) if again else None


def region(found: Remembered, frames: int, height: int, width: int) -> Tensor:
    """Where it is seen again: (frames, H, W) bool, the circle that holds the object."""
    mask = torch.zeros(frames, height, width, dtype=torch.bool)
    ys, xs = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None, :] + 0.5
    for frame in found.frames:
        x, y = found.actor.positions[frame].tolist()
        mask[frame] = (xs - x) ** 2 + (ys - y) ** 2 <= found.actor.reach**2
    return mask


def _comes_back(actor: Actor, seen_until: int, given: int) -> Remembered | None:
    """After the first absence that it was whole before and that ends beyond what is given."""
    seen, frames = actor.seen, len(actor.seen)
    starts = [t for t in range(1, frames) if seen[t] == HIDDEN and seen[t - 1] != HIDDEN]
    for start in starts:
        end = next((t for t in range(start, frames) if seen[t] != HIDDEN), frames)
        if end > given and WHOLE in seen[: min(start, seen_until)]:
            again = [t for t in range(max(end, given), frames) if seen[t] != HIDDEN]
            return Remembered(actor, again, max(start, given)) if again else None
    return None


def _round(colours: list[str]) -> int | None:
    """Frames after which a lamp's colours come again; None where the clip is too short to show it."""
    return next((n for n in range(3, len(colours)) if colours[n:] == colours[:-n] and len(set(colours[:n])) > 2), None)
