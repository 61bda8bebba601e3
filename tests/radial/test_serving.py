"""The attention of a LoRA's header, as a server's plug-in asks for it."""

import pytest
import torch

from radial import Dense, RadialError, Released, VideoGrid, attention_over, build_layout
from radial.serving import attention_for

GRID = VideoGrid(9, 4, 8)
HEADER = {
    f"radial.{name}": str(value)
    for name, value in {
        "pattern": "released", "rule": "ports", "decay": 0.4, "block": 16, "dense_layers": 1, "dense_sigma": 0.9,
        "dense_steps": 2, "frames": 33,
    }.items()
}  # fmt: skip


def tokens():
    return torch.randn(3, 1, GRID.tokens, 2, 8, generator=torch.Generator().manual_seed(0)).unbind(0)


@pytest.mark.parametrize(
    ("layer", "sigma", "dense"), [(0, 0.1, True), (1, 0.1, False), (1, 0.9, True), (7, 0.899, False)]
)
def test_layers_and_steps_are_those_of_the_header(layer, sigma, dense):
    q, k, v = tokens()
    pattern = Dense() if dense else Released(decay=0.4, rule="ports")
    expected = attention_over(q, k, v, build_layout(pattern, GRID, 16))
    got = attention_for(HEADER, GRID, layer=layer, sigma=sigma)(q, k, v)
    torch.testing.assert_close(got, expected)
    assert torch.allclose(got, attention_over(q, k, v, build_layout(Dense(), GRID, 16)), atol=1e-4) == dense


def test_a_header_with_a_number_of_dense_steps():
    header = {**HEADER, "radial.dense_sigma": "None", "radial.dense_layers": "0"}
    q, k, v = tokens()
    outs = [attention_for(header, GRID, layer=3, step=step)(q, k, v) for step in (0, 1, 2)]
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[1], outs[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radial.pattern": "None"}, "has no radial.pattern"),
        ({"radial.decay": "much"}, "radial.decay is 'much', expected a number"),
        ({"radial.rule": "other"}, "rule"),
        ({}, "dense from noise level 0.9 on: give sigma"),
        ({"radial.dense_sigma": "None"}, "first 2 steps are dense: give step"),
        ({"radial.pattern": "random", "radial.per_head": "True"}, "differs by head"),
    ],
)
def test_what_a_header_lacks(changes, message):
    sigma = None if "give" in message else 0.1
    with pytest.raises(RadialError, match=message):
        attention_for({**HEADER, **changes}, GRID, layer=1, sigma=sigma)
