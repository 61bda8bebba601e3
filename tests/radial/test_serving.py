"""The attention of a LoRA's header, as a server's plug-in asks for it."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import radial
from radial import (
    Dense,
    RadialError,
    Released,
    VideoGrid,
    attention_for,
    attention_over,
    build_layout,
    make_pattern,
    radial_attention,
)
from tests.helpers.patterns import fitted

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


def test_masks_that_differ_by_head():
    header = {**HEADER, "radial.pattern": "random", "radial.per_head": "True"}
    q, k, v = tokens()
    pattern = make_pattern("random", decay=0.4, rule="ports", per_head=True)
    for layer in (1, 2):
        expected = radial_attention(q, k, v, GRID, pattern, block=16, layer=layer)
        torch.testing.assert_close(attention_for(header, GRID, layer=layer, layers=3, sigma=0.1)(q, k, v), expected)
    dense = attention_for(header, GRID, layer=0, layers=3, sigma=0.1)(q, k, v)
    torch.testing.assert_close(dense, radial_attention(q, k, v, GRID, Dense()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radial.pattern": "None"}, "has no radial.pattern"),
        ({"radial.decay": "much"}, "radial.decay is 'much', expected a number"),
        ({"radial.rule": "other"}, "rule"),
        ({}, "dense from noise level 0.9 on: give sigma"),
        ({"radial.dense_sigma": "None"}, "first 2 steps are dense: give step"),
        ({"radial.pattern": "random", "radial.per_head": "True"}, "differs by layer and head"),
    ],
)
def test_what_a_header_lacks(changes, message):
    sigma = None if "give" in message else 0.1
    with pytest.raises(RadialError, match=message):
        attention_for({**HEADER, **changes}, GRID, layer=1, sigma=sigma)


def test_masks_that_differ_by_head_are_those_beside_the_lora():
    pattern = fitted(GRID, 16, layers=(1, 2), heads=2)
    header = {**HEADER, "radial.pattern": "fitted", "radial.masks_sha256": pattern.masks.digest}
    q, k, v = tokens()
    got = attention_for(header, GRID, layer=2, sigma=0.1, masks=pattern.masks)(q, k, v)
    torch.testing.assert_close(got, radial_attention(q, k, v, GRID, pattern, block=16, layer=2))
    other = attention_for(header, GRID, layer=1, sigma=0.1, masks=pattern.masks)(q, k, v)
    assert not torch.allclose(got, other)
    with pytest.raises(RadialError, match="masks are fitted for layers 1 to 2, layer 3 has none"):
        attention_for(header, GRID, layer=3, sigma=0.1, masks=pattern.masks)(q, k, v)
    with pytest.raises(RadialError, match="layer is 3, expected one of the model's 3 layers, from 0 on"):
        attention_for(header, GRID, layer=3, layers=3, sigma=0.1, masks=pattern.masks)(q, k, v)
    with pytest.raises(RadialError, match="layer is -1"):
        radial_attention(q, k, v, GRID, pattern, block=16, layer=-1)
    with pytest.raises(RadialError, match="masks is not set, pattern fitted needs the file"):
        attention_for(header, GRID, layer=2, sigma=0.1)
    with pytest.raises(RadialError, match="the masks' SHA-256 is"):
        attention_for(header, GRID, layer=2, sigma=0.1, masks=fitted(GRID, 16, heads=2, seed=1).masks)


def test_the_manuals_plug_in_runs(tmp_path, monkeypatch):
    manual = Path(radial.__file__).with_name("README.md").read_text(encoding="utf-8")
    (example,) = [
        code for code in re.findall(r"```python\n(.*?)```", manual, re.DOTALL) if "class RadialPlugin" in code
    ]
    monkeypatch.chdir(tmp_path)
    save_file({"x": torch.zeros(1)}, "wan_4x.safetensors", HEADER)
    names = {}
    exec(example, names)
    assert names["plugin"].header == HEADER and names["out"].shape == names["q"].shape
    dense = names["plugin"](names["q"], names["k"], names["v"], layer=0, step=2, sigma=0.5)
    assert not torch.allclose(names["out"], dense, atol=1e-3)
