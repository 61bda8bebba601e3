"""Objects found in the pixels of a clip: is what comes back the same, and do things move as they must?

Each pixel counts as the nearest of the palette's colours, the wall's and the ground's. So a blurred object is found,
and one of a colour between two is given to the nearer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from data.synth.outlines import REACH, signed_distance
from data.synth.scenes import PALETTE
from data.synth.worlds import WALL, WHOLE
from train.study.truth import PASSING, Remembered, actors_of

COLOURS = list(PALETTE)
_LEAST = 0.25  # of an object's area: less of its colour is no object
_ANGLES = 24


def classified(pixels: Tensor, ground: list[float]) -> Tensor:
    """The colour of each pixel: (F, H, W), the number of one of `COLOURS`, or a larger one for wall and ground.

    Args:
        pixels: (3, F, H, W) in [-1, 1].
        ground: RGB in [0, 1].
    """
    known = torch.tensor([*PALETTE.values(), WALL, tuple(ground)]) * 2 - 1
    # |x - c|² without |x|², which is the same for all colours
    nearness = torch.einsum("kc,cfhw->kfhw", known, pixels.float()) - (known.square().sum(1) / 2)[:, None, None, None]
    return nearness.argmax(0)


def permanence(pixels: Tensor, truth: Tensor, meta: Mapping[str, Any], found: Remembered) -> dict[str, float]:
    """Whether what was seen before comes back the same, by its features: 1 or 0 each, or a share of the frames.

    Args:
        pixels: (3, F, H, W) of the clip that is judged.
        truth: of the true one.
        meta: the true one's.
        found: what it shows again.

    Returns:
        Of a visitor or mover ``colour``, ``shape``, ``size`` and ``lane``; of a lamp ``colour``, the share of the
        frames in which it has the right one; and ``permanence``, the mean. Empty where the true clip does not show
        enough of it.
    """
    kinds = classified(pixels, meta["ground"])
    if found.actor.role not in PASSING:
        right = [_colour_at(kinds, found, t) == COLOURS.index(str(found.actor.colours[t])) for t in found.frames]
        share = sum(right) / len(right)
        return {"colour": share, "permanence": share}
    if WHOLE not in [found.actor.seen[t] for t in found.frames]:
        return {}
    colour = COLOURS.index(str(found.actor.colours[0]))
    expected = int((classified(truth, meta["ground"])[found.since :] == colour).sum(dim=(1, 2)).max())
    others = {COLOURS.index(str(a.colours[0])) for a in actors_of(meta, 1) if a.role == "resident"}
    areas = torch.stack([(kinds[found.since :] == number).sum(dim=(1, 2)) for number in range(len(COLOURS))])
    areas[list(others)] = 0
    number, frame = divmod(int(areas.argmax()), areas.shape[1])
    area = int(areas[number, frame])
    features = dict.fromkeys(("colour", "shape", "size", "lane"), 0.0)
    if area >= _LEAST * expected:
        mask = kinds[found.since + frame] == number
        centre = mask.nonzero().float().mean(0).flip(0) + 0.5
        lane = found.actor.lane
        assert lane is not None
        side = pixels.shape[3 - lane]
        features = {
            "colour": float(number == colour),
            "shape": float(shape_of(mask, centre) == found.actor.shape),
            "size": float(min(area, expected) / max(area, expected) >= 0.75),
            "lane": float(abs(float(centre[lane]) - float(found.actor.positions[0, lane])) <= 0.1 * side),
        }
    return {**features, "permanence": sum(features.values()) / len(features)}


def shape_of(mask: Tensor, centre: Tensor) -> str:
    """The shape that covers a mask best, turned by any angle.

    Args:
        mask: (H, W) bool.
        centre: x and y of its pixels' mean.
    """
    area = float(mask.sum())
    ys, xs = torch.arange(mask.shape[0]) + 0.5 - centre[1], torch.arange(mask.shape[1]) + 0.5 - centre[0]
    reach = 2 * math.sqrt(area / math.pi) + 2
    rows, columns = ys.abs() <= reach, xs.abs() <= reach
    part, dy, dx = mask[rows][:, columns], ys[rows][:, None], xs[columns][None, :]
    angles = torch.arange(_ANGLES)[:, None, None] * (2 * math.pi / _ANGLES)
    x, y = angles.cos() * dx + angles.sin() * dy, angles.cos() * dy - angles.sin() * dx
    fits = {}
    for shape in REACH:
        drawn = signed_distance(shape, x, y, math.sqrt(area / _unit_area(shape))) < 0
        fits[shape] = float(((drawn & part).sum((1, 2)) / (drawn | part).sum((1, 2))).max())
    return max(fits, key=lambda shape: fits[shape])


def trajectory_error(pixels: Tensor, meta: Mapping[str, Any], given: int) -> float | None:
    """How far the resident is from where the simulation has it after the given frames, in pixels.

    The mean over the frames in which nothing may stand before it; one that is not found counts as half of the frame's
    height. None where there is no such frame.
    """
    frames, half = pixels.shape[1], pixels.shape[2] / 2
    resident = actors_of(meta, frames)[0]
    kinds = classified(pixels, meta["ground"]) == COLOURS.index(str(resident.colours[0]))
    expected = _unit_area(resident.shape) * resident.size**2
    errors = []
    for frame in (t for t in range(given, frames) if resident.seen[t] == WHOLE):
        places = kinds[frame].nonzero()
        if len(places) < _LEAST * expected:
            errors.append(half)
            continue
        y, x = (places.float().mean(0) + 0.5).tolist()
        errors.append(min(half, math.dist((x, y), resident.positions[frame].tolist())))
    return sum(errors) / len(errors) if errors else None


def _colour_at(kinds: Tensor, found: Remembered, frame: int) -> int:
    """The commonest colour in the middle of the object."""
    x, y = found.actor.positions[frame].tolist()
    half = max(1, int(found.actor.size / 3))
    rows, columns = (slice(max(0, int(at) - half), int(at) + half + 1) for at in (y, x))
    return int(kinds[frame, rows, columns].flatten().mode().values)


@cache
def _unit_area(shape: str) -> float:
    """The area of a shape of size 1."""
    axis = torch.linspace(-2, 2, 401)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return float((signed_distance(shape, x, y, 1.0) < 0).sum()) * 0.01**2
