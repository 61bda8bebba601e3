"""Synthetic clips in which length matters: what happens in one stretch has to be remembered in a later one.

A clip is of one of four worlds, in turn by its index. In each a resident bounces off the walls of the frame, and

    visitor    a visitor comes in through one side, turns around and leaves, is away for 14 to 26 frames, and comes back
               through the same side, the same in colour, shape, size and lane
    occlusion  a mover passes to and fro behind a wall, which hides it for 10 to 18 frames at a time
    sequence   a lamp goes through three colours in an order of its own, again and again: 21 to 30 frames a round
    cause      a signal shines in a colour, and 28 frames later a lamp shines in that colour; every signal has another

The caption names the world and the resident and nothing that has to be remembered.

Every motion is a function of time with a phase that is drawn evenly over its period, and nothing depends on a clip's
length. So a short clip is the beginning of the longer one of the same seed and index, and 16 frames of a long clip are
distributed like a clip of 16 frames, wherever in it they lie: a model made for 16 frames has seen every window of it,
but never two that belong together.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.errors import DataError
from data.synth.outlines import REACH, signed_distance
from data.synth.scenes import NIGHTS, PALETTE

WORLDS = ("visitor", "occlusion", "sequence", "cause")
WALL = (0.45, 0.45, 0.50)
"""The colour of the wall, and of a lamp that is off."""
HIDDEN, IN_PART, WHOLE = 0, 1, 2
"""How much of an object a frame shows (`Actor.seen`)."""
DELAY, SIGNAL, EVERY = 28, 6, 36  # frames: from a signal to its lamp, that each shines, from signal to signal
LEAST = 48  # pixels of a side


@dataclass(frozen=True)
class Actor:
    """One object of a clip of F frames.

    Attributes:
        role: resident, visitor, mover, wall, lamp or signal.
        shape: a key of `REACH`; the wall is a box.
        size: in pixels (`data.synth.outlines`); of the wall, half its width.
        colours: in each frame, a name of `PALETTE`; None for `WALL`.
        positions: of the centre in pixels, (F, 2), x and y.
        angles: in radians, (F,).
        seen: in each frame `HIDDEN`, `IN_PART` or `WHOLE`.
        lane: of visitor and mover, the axis along which they never move, 0 for x and 1 for y; None for the others.
    """

    role: str
    shape: str
    size: float
    colours: list[str | None]
    positions: Tensor
    angles: Tensor
    seen: list[int]
    lane: int | None = None

    @property
    def reach(self) -> float:
        """Distance in pixels from the centre to the farthest corner."""
        return self.size * REACH.get(self.shape, math.hypot(1, 1))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Actor:
        """The inverse of `to_json`, without angles."""
        places = torch.tensor(stored["positions"], dtype=torch.float64)
        own = {name: stored[name] for name in ("role", "shape", "size", "colours", "seen", "lane")}
        return cls(positions=places, angles=torch.zeros(len(places), dtype=torch.float64), **own)

    def to_json(self) -> dict[str, Any]:
        """All but the angles as plain values, positions to a hundredth of a pixel."""
        places = [[round(value, 2) for value in place] for place in self.positions.tolist()]
        return {"role": self.role, "shape": self.shape, "size": self.size, "colours": self.colours,
                "positions": places, "seen": self.seen, "lane": self.lane}  # fmt: skip


def make_world(seed: int, index: int, frames: int, height: int, width: int) -> tuple[Tensor, dict[str, Any]]:
    """The clip of (seed, index): the same on every call, and the beginning of every longer one.

    Returns:
        pixels (3, frames, H, W) float32 in [-1, 1], and the meta data: caption, source, width, height, world, ground
        (RGB in [0, 1] of what lies behind all) and actors, the truth about every object in every frame
        (`Actor.to_json`).

    Raises:
        DataError: when frames is below 1 or a side is below 48 pixels.
    """
    world, caption, ground, actors = draw_world(seed, index, frames, height, width)
    meta = {
        "caption": caption,
        "source": f"synth worlds {seed}/{index}",
        "width": width,
        "height": height,
        "world": world,
        "ground": list(ground),
        "actors": [actor.to_json() for actor in actors],
    }
    return render(actors, ground, frames, height, width), meta


def draw_world(
    seed: int, index: int, frames: int, height: int, width: int
) -> tuple[str, str, tuple[float, float, float], list[Actor]]:
    """The world, caption, ground and actors of a clip, those in front last; arguments and errors of `make_world`."""
    if frames < 1 or min(height, width) < LEAST:
        raise DataError(
            f"clips of {frames} frames of {height}x{width} pixels: expected >= 1 frame and sides >= {LEAST}"
        )
    rng = random.Random(int.from_bytes(hashlib.sha256(f"world/{seed}/{index}".encode()).digest(), "big"))
    world = WORLDS[index % len(WORLDS)]
    stage = _Stage(rng, frames, height, width)
    ground = rng.choice(NIGHTS)
    resident = stage.resident()
    others = {"visitor": stage.visitor, "occlusion": stage.occlusion, "sequence": stage.sequence, "cause": stage.cause}
    words, actors = others[world]()
    resident.seen[:] = stage.uncovered(resident, actors)
    return world, f"a {resident.colours[0]} {resident.shape} bounces, {words}", ground, [resident, *actors]


def render(actors: list[Actor], ground: tuple[float, float, float], frames: int, height: int, width: int) -> Tensor:
    """RGB pixels (3, frames, H, W) float32 in [-1, 1] of actors over their ground, those in front last."""
    pixels = torch.tensor(ground)[:, None, None, None].expand(3, frames, height, width).clone()
    for actor in actors:
        side = 2 * math.ceil(actor.reach + 1) + 1
        centre = actor.positions.float()
        # only the pixels around the centre are computed; where the frame ends, as many within it
        rows, columns = (
            (centre[:, axis].floor().long()[:, None] - side // 2).clamp(0, max(0, most - side))
            + torch.arange(min(side, most))
            for axis, most in ((1, height), (0, width))
        )
        dx, dy = columns[:, None, :] + 0.5 - centre[:, 0, None, None], rows[:, :, None] + 0.5 - centre[:, 1, None, None]
        if actor.shape == "box":
            distance = torch.maximum(dx.abs(), dy.abs()) - actor.size
        else:
            cos, sin = (turned.float()[:, None, None] for turned in (actor.angles.cos(), actor.angles.sin()))
            distance = signed_distance(actor.shape, cos * dx + sin * dy, cos * dy - sin * dx, actor.size)
        # a pixel's coverage falls from 1 to 0 over one pixel of signed distance
        cover = (0.5 - distance).clamp(0, 1)
        colours = torch.tensor([WALL if name is None else PALETTE[name] for name in actor.colours]).T[:, :, None, None]
        place = (slice(None), torch.arange(frames)[:, None, None], rows[:, :, None], columns[:, None, :])
        there = pixels[place]
        pixels[place] = there + cover * (colours - there)
    return pixels * 2 - 1


class _Stage:
    """Draws the actors of one clip; sizes and speeds scale with the shorter side."""

    def __init__(self, rng: random.Random, frames: int, height: int, width: int) -> None:
        self.rng, self.frames, self.sides = rng, frames, (width, height)
        self.scale = min(height, width) / 32
        self.time = torch.arange(frames, dtype=torch.float64)
        self.colours = rng.sample(list(PALETTE), len(PALETTE))  # each is taken once, the resident's first
        self.shapes = rng.sample(list(REACH), len(REACH))

    def resident(self) -> Actor:
        size, shape = self.rng.uniform(4.0, 5.0) * self.scale, self.shapes.pop()
        reach = size * REACH[shape]
        speed, heading = self.rng.uniform(0.6, 1.2) * self.scale, self.rng.uniform(0, 2 * math.pi)
        places = [
            self._to_and_fro(reach, side - reach, abs(part) * speed)
            for side, part in zip(self.sides, (math.cos(heading), math.sin(heading)), strict=True)
        ]
        return self._actor("resident", shape, size, self.colours.pop(), torch.stack(places, 1))

    def visitor(self) -> tuple[str, list[Actor]]:
        rng, axis, far = self.rng, self.rng.choice((0, 1)), self.rng.choice((False, True))
        shape, size = self.shapes.pop(), self._one_of_two_sizes()
        reach = size * REACH[shape]
        deepest = reach + 2 + rng.uniform(0, 0.15) * self.sides[axis]
        speed = 2 * (deepest + reach) / rng.uniform(15, 21)  # over the frames that a visit takes
        beyond = reach + 1 + speed * rng.uniform(14, 26) / 2
        inwards = self._to_and_fro(-beyond, deepest, speed)
        places = torch.empty(self.frames, 2, dtype=torch.float64)
        places[:, axis] = self.sides[axis] - inwards if far else inwards
        places[:, 1 - axis] = self._lane(1 - axis, reach)
        seen = [HIDDEN if at <= -reach - 0.5 else WHOLE if at >= reach else IN_PART for at in inwards.tolist()]
        return "a visitor comes and goes", [
            self._actor("visitor", shape, size, self.colours.pop(), places, seen, 1 - axis)
        ]

    def occlusion(self) -> tuple[str, list[Actor]]:
        shape, size = self.shapes.pop(), self._one_of_two_sizes()
        reach, (width, height) = size * REACH[shape], self.sides
        half = min(0.28 * width, 0.45 * height)
        lane = self._lane(1, reach)
        speed = 2 * max(half - reach, 0.1 * half) / self.rng.uniform(10, 18)
        along = self._to_and_fro(reach + 1, width - reach - 1, speed)
        places = torch.stack([along, torch.full_like(along, lane)], 1)
        gaps = (along - width / 2).abs()
        seen = [HIDDEN if gap <= half - reach else WHOLE if gap >= half + reach else IN_PART for gap in gaps.tolist()]
        middle = min(max(lane, half), height - half)
        wall = torch.tensor([[width / 2, middle]], dtype=torch.float64).expand(self.frames, 2)
        return "something passes behind a wall", [
            self._actor("mover", shape, size, self.colours.pop(), places, seen, 1),
            self._actor("wall", "box", half, None, wall),
        ]

    def sequence(self) -> tuple[str, list[Actor]]:
        each = self.rng.randint(7, 10)
        order = [self.colours.pop() for _ in range(3)]
        first = self.rng.randrange(3 * each)
        shown = [order[(first + frame) // each % 3] for frame in range(self.frames)]
        return "a lamp repeats its colours", [self._lamp("lamp", "circle", shown, (0.5, self._height()))]

    def cause(self) -> tuple[str, list[Actor]]:
        heights = [self._height() for _ in range(2)]  # before the colours, of which longer clips draw more
        # the frame at which the oldest signal began whose lamp may still shine in the clip
        began = self.rng.randrange(EVERY) - 2 * EVERY
        signal: list[str | None] = [None] * self.frames
        lamp = list(signal)
        while began < self.frames:
            colour = self.rng.choice(self.colours)
            for shows, start in ((signal, began), (lamp, began + DELAY)):
                for frame in range(max(0, start), min(self.frames, start + SIGNAL)):
                    shows[frame] = colour
            began += EVERY
        return "a lamp answers a signal", [
            self._lamp("signal", "star", signal, (0.2, heights[0])),
            self._lamp("lamp", "circle", lamp, (0.8, heights[1])),
        ]

    def uncovered(self, actor: Actor, others: list[Actor]) -> Iterator[int]:
        """How much of an actor is seen that others may stand before."""
        for frame, place in enumerate(actor.positions.tolist()):
            yield WHOLE if all(_apart(place, other, frame) > actor.reach + 1 for other in others) else IN_PART

    def _height(self) -> float:
        return self.rng.uniform(0.25, 0.75)

    def _lamp(self, role: str, shape: str, shown: Sequence[str | None], place: tuple[float, float]) -> Actor:
        """A lamp at a place in shares of the sides."""
        at = torch.tensor([[share * side for share, side in zip(place, self.sides, strict=True)]], dtype=torch.float64)
        still = torch.zeros(self.frames, dtype=torch.float64)
        return Actor(role, shape, 5 * self.scale, list(shown), at.expand(self.frames, 2), still, [WHOLE] * self.frames)

    def _actor(
        self,
        role: str,
        shape: str,
        size: float,
        colour: str | None,
        places: Tensor,
        seen: list[int] | None = None,
        lane: int | None = None,
    ) -> Actor:
        turn, spin = self.rng.uniform(0, 2 * math.pi), self.rng.choice((-1, 1)) * self.rng.uniform(0.08, 0.16)
        angles = turn + spin * self.time
        return Actor(role, shape, size, [colour] * self.frames, places, angles, seen or [WHOLE] * self.frames, lane)

    def _one_of_two_sizes(self) -> float:
        """Small or large, so that another one can be seen to be another."""
        return self.rng.choice((self.rng.uniform(3.2, 3.8), self.rng.uniform(5.2, 5.8))) * self.scale

    def _lane(self, axis: int, reach: float) -> float:
        """A place in the first or the second half of a side, away from its middle and from the walls."""
        room = max(0.0, self.sides[axis] / 2 - reach - 2)
        return self.sides[axis] / 2 + self.rng.choice((-1, 1)) * self.rng.uniform(0.5, 1.0) * room

    def _to_and_fro(self, low: float, high: float, speed: float) -> Tensor:
        """Between two walls at constant speed, from an evenly drawn moment of the period on: (F,)."""
        span = high - low
        along = (self.rng.uniform(0, 2 * span) + speed * self.time) % (2 * span)
        return low + torch.where(along < span, along, 2 * span - along)


def _apart(place: Sequence[float], other: Actor, frame: int) -> float:
    """Pixels from a point to the edge of a box, or of the circle around another shape; not above 0 within it."""
    gaps = [abs(mine - its) for mine, its in zip(place, other.positions[frame].tolist(), strict=True)]
    if other.shape == "box":
        return math.hypot(*(max(0.0, gap - other.size) for gap in gaps))
    return math.hypot(*gaps) - other.reach
