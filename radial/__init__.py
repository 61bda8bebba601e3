"""Radial attention: a static O(n log n) block-sparse attention for long videos (arXiv 2506.19852).

A library that needs only torch. In three lines::

    from radial import VideoGrid, radial_attention
    grid = VideoGrid.from_pixels(frames=161, height=720, width=1280)
    out = radial_attention(q, k, v, grid)  # q, k, v: (batch, tokens, heads, head_dim)

A name is imported when it is first used: commands and processes that need no tensors do without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radial.attention import attention_over, radial_attention
    from radial.errors import RadialError
    from radial.grid import LatentTime, VideoGrid
    from radial.head_layouts import HeadLayout, HeadLayouts, build_head_layouts
    from radial.layout import BlockLayout, build_layout
    from radial.patterns import (
        PATTERNS,
        Dense,
        Fitted,
        HeadMasks,
        Local,
        Paper,
        Pattern,
        Power,
        Random,
        Released,
        ShiftedGroups,
        SlidingTile,
        Spatial,
        Temporal,
        make_pattern,
    )
    from radial.serving import attention_for
    from radial.share import with_share

__all__ = [
    "PATTERNS",
    "BlockLayout",
    "Dense",
    "Fitted",
    "HeadLayout",
    "HeadLayouts",
    "HeadMasks",
    "LatentTime",
    "Local",
    "Paper",
    "Pattern",
    "Power",
    "RadialError",
    "Random",
    "Released",
    "ShiftedGroups",
    "SlidingTile",
    "Spatial",
    "Temporal",
    "VideoGrid",
    "attention_for",
    "attention_over",
    "build_head_layouts",
    "build_layout",
    "make_pattern",
    "radial_attention",
    "with_share",
]
_HOMES = {
    "attention": ("attention_over", "radial_attention"),
    "errors": ("RadialError",),
    "grid": ("LatentTime", "VideoGrid"),
    "layout": ("BlockLayout", "build_layout"),
    "patterns": ("PATTERNS", "Dense", "Fitted", "HeadMasks", "Local", "Paper", "Pattern", "Power", "Random", "Released",
                 "ShiftedGroups", "SlidingTile", "Spatial", "Temporal", "make_pattern"),
    "head_layouts": ("HeadLayout", "HeadLayouts", "build_head_layouts"),
    "serving": ("attention_for",),
    "share": ("with_share",),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f"radial.{home}"), name)
            return value
    raise AttributeError(f"module 'radial' has no attribute {name!r}")
