"""Synthetic clips: coloured shapes that move, spin, bounce and collide, and one visitor that leaves and comes back.

A scene is drawn from (seed, index) and simulated frame by frame. Residents stay in the frame: they bounce off its walls
and collide elastically. The visitor crosses the frame in front of them along a straight line, leaves through one side,
is away for 12 to 28 frames and comes back through the same side, the same in colour, shape, size and lane. The caption
names colour and shape, but size, lane and moment of return take memory: that is what a model needs
long-range attention for.

Every clip runs from night through dawn to day, whatever its length: a clip four times as long shows the same sunrise
four times as slowly. The hour that a frame shows follows from its place in the clip alone, so a model that was trained
on short clips must learn anew to place it in long ones.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from data.errors import DataError
from data.synth.outlines import REACH, signed_distance

PALETTE = {
    "red": (0.90, 0.20, 0.18),
    "green": (0.22, 0.74, 0.33),
    "blue": (0.22, 0.42, 0.95),
    "yellow": (0.98, 0.83, 0.22),
    "pink": (0.93, 0.42, 0.83),
    "white": (0.94, 0.94, 0.92),
}
NIGHTS = ((0.06, 0.07, 0.13), (0.11, 0.06, 0.12), (0.05, 0.10, 0.09), (0.09, 0.09, 0.10))
DAWN, DAY = (0.62, 0.34, 0.30), (0.36, 0.56, 0.74)
# Shares of the clip: until the first the sky is that of night, at the second that of dawn, from the third on of day.
DARK, SUNRISE, BRIGHT = 0.2, 0.5, 0.8
SUBSTEPS = 4
# A clip that can hold the visitor's absence whole starts so that it does, with this many frames around it.
MARGIN = 8


@dataclass
class Body:
    """A shape and its state: pixels, pixels a frame, radians, radians a frame.

    `low` and `high` bound the centre (x, y); a visitor's reach beyond the frame along its line. `role` is the verb of
    the caption; it holds for the whole simulation, so any window of it has the same caption.
    """

    shape: str
    colour: str
    size: float
    spin: float
    position: list[float]
    velocity: list[float]
    angle: float
    low: tuple[float, float]
    high: tuple[float, float]
    role: str = "rotates"

    @property
    def visitor(self) -> bool:
        """Does it leave the frame and come back?"""
        return self.role == "visits"

    @property
    def reach(self) -> float:
        """Distance in pixels from the centre to the farthest corner."""
        return self.size * REACH[self.shape]


@dataclass
class Scene:
    """A scene of `height` × `width` pixels at its first frame, as `draw` makes it; its bodies, the visitor last.

    `night` is the RGB colour in [0, 1] of its dark sky.
    """

    height: int
    width: int
    night: tuple[float, float, float]
    bodies: list[Body]
    caption: str = field(init=False)

    def __post_init__(self) -> None:
        self.caption = ", ".join(f"a {body.colour} {body.shape} {body.role}" for body in self.bodies)

    @classmethod
    def draw(cls, rng: random.Random, height: int, width: int) -> Scene:
        """A random scene with one or two residents and the visitor; sizes and speeds scale with the shorter side."""
        scale = min(height, width) / 32
        count = 2 if rng.random() < 0.3 else 3
        shapes, colours = rng.sample(list(REACH), count), rng.sample(list(PALETTE), count)
        bodies: list[Body] = []
        for shape, colour in zip(shapes[:-1], colours[:-1], strict=True):
            # A second resident that finds no room in a narrow frame is left out.
            tries = (_resident(rng, shape, colour, height, width, scale) for _ in range(100))
            body = next((b for b in tries if all(_distance(b, other) > 1 for other in bodies)), None)
            bodies += [body] if body else []
        for body in bodies:
            if body.shape == "circle":
                body.role = _course(body) if len(bodies) == 1 else "bounces around"
        bodies.append(_visitor(rng, shapes[-1], colours[-1], height, width, scale))
        return cls(height, width, rng.choice(NIGHTS), bodies)

    def simulate(self, frames: int) -> Tensor:
        """The bodies' states (frames, bodies, 3) float64: x and y of the centre in pixels, angle in radians."""
        bodies = [replace(b, position=list(b.position), velocity=list(b.velocity)) for b in self.bodies]
        states = []
        for _ in range(frames):
            states.append([[*body.position, body.angle] for body in bodies])
            for _ in range(SUBSTEPS):
                _advance(bodies, 1 / SUBSTEPS)
        return torch.tensor(states, dtype=torch.float64)

    def visible(self, states: Tensor) -> list[bool]:
        """For each frame of `states`: does any part of the visitor lie in the frame?"""
        visitor, centre = self.bodies[-1], states[:, -1, :2]
        edge = visitor.reach + 0.5
        inside = (centre > -edge) & (centre < torch.tensor([self.width, self.height]) + edge)
        return [bool(x) for x in inside.all(dim=1)]

    def sky(self, frames: int) -> Tensor:
        """RGB in [0, 1] of the sky in each frame of a clip of `frames` frames: (3, frames) float32."""
        time = torch.arange(frames) / max(1, frames - 1)
        night, dawn, day = (torch.tensor(colour)[:, None] for colour in (self.night, DAWN, DAY))
        sky = night + ((time - DARK) / (SUNRISE - DARK)).clamp(0, 1) * (dawn - night)
        return sky + ((time - SUNRISE) / (BRIGHT - SUNRISE)).clamp(0, 1) * (day - sky)

    def render(self, states: Tensor) -> Tensor:
        """RGB pixels (3, frames, H, W) float32 in [-1, 1] of a clip: its simulated states (frames, bodies, 3)."""
        states = states.float()
        ys = torch.arange(self.height)[:, None] + 0.5
        xs = torch.arange(self.width)[None, :] + 0.5
        pixels = self.sky(len(states))[:, :, None, None].expand(-1, -1, self.height, self.width)
        for i, body in enumerate(self.bodies):
            x, y, angle = (states[:, i, j, None, None] for j in range(3))
            dx, dy = xs - x, ys - y
            cos, sin = angle.cos(), angle.sin()
            distance = signed_distance(body.shape, cos * dx + sin * dy, cos * dy - sin * dx, body.size)
            # A pixel's coverage falls from 1 to 0 over one pixel of signed distance.
            cover = (0.5 - distance).clamp(0, 1)
            colour = torch.tensor(PALETTE[body.colour])[:, None, None, None]
            pixels = pixels + cover * (colour - pixels)
        return pixels * 2 - 1


def make_clip(seed: int, index: int, frames: int, height: int, width: int) -> tuple[Tensor, dict[str, Any]]:
    """The clip of (seed, index): the same on every call, whatever else is made.

    The scene does not depend on `frames`; the clip is a window of its simulation. Long clips hold an absence of the
    visitor whole; those too short for that start at any moment of its cycle, its absence included.

    Returns:
        pixels (3, frames, H, W) float32 in [-1, 1], and the meta data: caption, source, clip_start (frames into the
        simulation), width, height, objects (colour, shape, role) and absent, the [first, last + 1] frames of this clip
        in which the visitor is out of sight.

    Raises:
        DataError: when frames is below 1 or a side is below 16 pixels.
    """
    if frames < 1 or height < 16 or width < 16:
        raise DataError(f"clips of {frames} frames of {height}x{width} pixels: expected >= 1 frame and sides >= 16")
    rng = random.Random(int.from_bytes(hashlib.sha256(f"scene/{seed}/{index}".encode()).digest(), "big"))
    scene = Scene.draw(rng, height, width)
    visitor = scene.bodies[-1]
    axis = 0 if visitor.velocity[0] else 1
    cycle = math.ceil(2 * (visitor.high[axis] - visitor.low[axis]) / abs(visitor.velocity[axis]))
    states = scene.simulate(cycle + frames)
    visible = scene.visible(states)
    starts = [s for s in range(cycle) if _holds_absence(visible[s : s + frames])] or list(range(cycle))
    start = rng.choice(starts)
    meta = {
        "caption": scene.caption,
        "source": f"synth {seed}/{index}",
        "clip_start": start,
        "width": width,
        "height": height,
        "objects": [{"colour": b.colour, "shape": b.shape, "role": b.role} for b in scene.bodies],
        "absent": _absences(visible[start : start + frames]),
    }
    return scene.render(states[start : start + frames]), meta


def _course(body: Body) -> str:
    """How a resident moves that has nothing but walls to bounce off."""
    across, down = abs(body.velocity[0]), abs(body.velocity[1])
    if across > 2 * down:
        return "moves from side to side"
    return "moves up and down" if down > 2 * across else "bounces around"


def _resident(rng: random.Random, shape: str, colour: str, height: int, width: int, scale: float) -> Body:
    size = rng.uniform(4.0, 6.0) * scale
    reach = size * REACH[shape]
    high = (width - reach, height - reach)
    speed, heading = rng.uniform(0.6, 1.6) * scale, rng.uniform(0, 2 * math.pi)
    return Body(
        shape=shape,
        colour=colour,
        size=size,
        spin=rng.choice((-1, 1)) * rng.uniform(0.08, 0.16),
        position=[rng.uniform(reach, high[0]), rng.uniform(reach, high[1])],
        velocity=[speed * math.cos(heading), speed * math.sin(heading)],
        angle=rng.uniform(0, 2 * math.pi),
        low=(reach, reach),
        high=high,
    )


def _visitor(rng: random.Random, shape: str, colour: str, height: int, width: int, scale: float) -> Body:
    """A resident whose walls on the two sides of its line stand so far out that it is away for 12 to 28 frames."""
    body = _resident(rng, shape, colour, height, width, scale)
    axis = rng.choice((0, 1))
    # Fast enough to cross the frame, leave and be back within 64 frames of the default size.
    speed = (rng.uniform(1.3, 1.6) if axis == 0 else rng.uniform(0.9, 1.4)) * scale
    beyond = body.reach + 0.5 + speed * rng.uniform(13, 27) / 2
    low, high = list(body.low), list(body.high)
    low[axis], high[axis] = -beyond, (width, height)[axis] + beyond
    body.low, body.high = (low[0], low[1]), (high[0], high[1])
    body.position[axis] = rng.uniform(low[axis], high[axis])
    body.velocity = [0.0, 0.0]
    body.velocity[axis] = rng.choice((-1, 1)) * speed
    body.role = "visits"
    return body


def _advance(bodies: list[Body], time: float) -> None:
    """Move all bodies by `time` frames: straight on, off the walls, and residents off each other."""
    for body in bodies:
        body.angle += body.spin * time
        for axis in (0, 1):
            body.position[axis] += body.velocity[axis] * time
            if body.position[axis] < body.low[axis]:
                body.position[axis] = 2 * body.low[axis] - body.position[axis]
                body.velocity[axis] = abs(body.velocity[axis])
            elif body.position[axis] > body.high[axis]:
                body.position[axis] = 2 * body.high[axis] - body.position[axis]
                body.velocity[axis] = -abs(body.velocity[axis])
    residents = [body for body in bodies if not body.visitor]
    for a, b in itertools.combinations(residents, 2):
        if _distance(a, b) < 0:
            _collide(a, b)


def _distance(a: Body, b: Body) -> float:
    """Pixels between the circles that stand for two bodies in a collision, a little inside their corners."""
    return math.dist(a.position, b.position) - 0.9 * (a.reach + b.reach)


def _collide(a: Body, b: Body) -> None:
    """Elastic collision of equal masses: along the line of centres they exchange velocities, if they approach."""
    gap = math.dist(a.position, b.position) or 1.0
    normal = [(b.position[i] - a.position[i]) / gap for i in (0, 1)]
    approach = sum((a.velocity[i] - b.velocity[i]) * normal[i] for i in (0, 1))
    if approach > 0:
        for i in (0, 1):
            a.velocity[i] -= approach * normal[i]
            b.velocity[i] += approach * normal[i]


def _absences(visible: list[bool]) -> list[list[int]]:
    """The runs of False as [first, last + 1]."""
    runs, position = [], 0
    for seen, group in itertools.groupby(visible):
        length = len(list(group))
        if not seen:
            runs.append([position, position + length])
        position += length
    return runs


def _holds_absence(visible: list[bool]) -> bool:
    """Does the visitor leave and come back, in sight for MARGIN frames at both ends of the clip?"""
    return all(visible[:MARGIN] + visible[-MARGIN:]) and not all(visible)
