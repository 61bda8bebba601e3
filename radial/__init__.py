"""Radial attention: a static O(n log n) block-sparse attention for long videos (arXiv 2506.19852).

A library that needs only torch. In three lines::

    from radial import VideoGrid, radial_attention
    grid = VideoGrid.from_pixels(frames=161, height=720, width=1280)
    out = radial_attention(q, k, v, grid)  # q, k, v: (batch, tokens, heads, head_dim)
"""

from radial.attention import attention_over, radial_attention
from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.layout import BlockLayout, build_layout
from radial.patterns import Dense, Paper, Pattern, Random, Released, make_pattern

__all__ = [
    "BlockLayout",
    "Dense",
    "Paper",
    "Pattern",
    "RadialError",
    "Random",
    "Released",
    "VideoGrid",
    "attention_over",
    "build_layout",
    "make_pattern",
    "radial_attention",
]
