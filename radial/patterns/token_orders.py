"""Orders of a frame's tokens in which as many neighbours as a block holds are a compact part of the frame.

In raster order 128 tokens of a frame 80 wide are a strip 1.6 rows high, whose ends are far from each other. In the
order ``patches`` a frame is cut into bands of whole rows, about as high as a square of a block's tokens, and each band
is walked column by column, there and back in turn:

    band 0, 3 rows        0  3  6  9         blocks of 9: columns 0 to 2 of band 0, then its column 3 with columns 3
                          1  4  7 10         and 2 of band 1, then the rest of band 1
                          2  5  8 11
    band 1, 3 rows       21 18 15 12
                         22 19 16 13
                         23 20 17 14

No size of frame needs padding: blocks go on from band to band and from frame to frame.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ORDERS = ("raster", "patches")


def frame_order(order: str, height: int, width: int, block: int) -> Tensor:
    """The place of a frame in raster order that each position of an order has.

    Args:
        order: one of `ORDERS`.
        height, width: of the frame, in tokens.
        block: tokens of a block.

    Returns:
        (height * width,) int64, a permutation.
    """
    places = torch.arange(height * width).view(height, width)
    if order == "raster":
        return places.flatten()
    count = max(1, round(height / math.sqrt(block)))
    bands = [places[height * n // count : height * (n + 1) // count] for n in range(count)]
    return torch.cat([(band.flip(1) if n % 2 else band).T.flatten() for n, band in enumerate(bands)])
