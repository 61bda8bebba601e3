"""Orders of a frame's tokens: permutations, walked as stated, and compact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from radial.patterns.token_orders import frame_order


@given(height=st.integers(1, 50), width=st.integers(1, 90), block=st.sampled_from([16, 64, 128]))
def test_patches_walk_bands_column_by_column_there_and_back(height, width, block):
    order = frame_order("patches", height, width, block).tolist()
    bands = max(1, round(height / block**0.5))
    expected, first = [], 0
    for band in range(bands):
        last = height * (band + 1) // bands
        columns = range(width) if band % 2 == 0 else reversed(range(width))
        expected += [y * width + x for x in columns for y in range(first, last)]
        first = last
    assert order == expected and sorted(order) == list(range(height * width))
    assert frame_order("raster", height, width, block).tolist() == list(range(height * width))


@pytest.mark.parametrize(
    ("height", "width"), [(45, 80), (30, 52), (30, 53), (22, 40), (24, 40)], ids=lambda size: str(size)
)
def test_blocks_are_compact(height, width):
    """The mean distance of two tokens of a block of 128, in all models' frames, beside that in raster order."""

    def spread(order):
        places = frame_order(order, height, width, 128)[: height * width // 128 * 128].view(-1, 128)
        y, x = (places // width).double(), (places % width).double()
        distances = ((y[:, :, None] - y[:, None]) ** 2 + (x[:, :, None] - x[:, None]) ** 2).sqrt()
        return float(distances.mean())

    square = torch.cdist(*[torch.cartesian_prod(torch.arange(11.3), torch.arange(11.3)).double()] * 2).mean()
    assert spread("patches") < 1.25 * float(square) < 0.9 * spread("raster")
