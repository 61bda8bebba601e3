"""The outlines of the shapes in synthetic clips, as signed distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# How far each shape's corners reach from its centre, in units of its size; chosen for about equal areas.
REACH = {"circle": 1.0, "square": 1.22, "triangle": 1.42, "star": 1.36}


def signed_distance(shape: str, x: Tensor, y: Tensor, size: float) -> Tensor:
    """Distance in pixels to the outline of a shape around the origin, negative inside.

    Args:
        shape: a key of `REACH`.
        x, y: pixels from the origin, tensors of one shape.
        size: of the shape, in pixels; its corners reach `size * REACH[shape]` far.
    """
    if shape == "circle":
        return (x * x + y * y).sqrt() - size
    if shape == "square":
        half = size * REACH["square"] / math.sqrt(2)
        over_x, over_y = x.abs() - half, y.abs() - half
        return over_x.clamp(min=0).hypot(over_y.clamp(min=0)) + torch.maximum(over_x, over_y).clamp(max=0)
    corners, inner = (3, 0.5) if shape == "triangle" else (5, 0.5)
    return _star(x, y, size * REACH[shape], corners, inner)


def _star(x: Tensor, y: Tensor, radius: float, corners: int, inner: float) -> Tensor:
    """Signed distance to a star with outer corners at `radius` and inner ones at `inner * radius`.

    By symmetry everything folds into the half sector between an outer corner (on the axis) and the next inner one,
    where the outline is one line segment. A triangle is the star of 3 corners whose inner ones lie on its sides.
    """
    half = math.pi / corners
    angle = torch.atan2(y, x)
    folded = (angle - 2 * half * torch.round(angle / (2 * half))).abs()
    length = (x * x + y * y).sqrt()
    px, py = length * folded.cos(), length * folded.sin()
    ex, ey = inner * radius * math.cos(half) - radius, inner * radius * math.sin(half)
    along = (((px - radius) * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    offset_x, offset_y = px - radius - along * ex, py - along * ey
    side = torch.sign((px - radius) * ey - py * ex)
    return (offset_x * offset_x + offset_y * offset_y).sqrt() * side
