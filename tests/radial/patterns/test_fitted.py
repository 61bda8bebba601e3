"""Masks fitted to a model's heads: the rule, the draw, the fit and the file, against plain restatements."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from radial import (
    Fitted,
    HeadMasks,
    RadialError,
    VideoGrid,
    attention_over,
    build_head_layouts,
    build_layout,
    make_pattern,
    with_share,
)
from radial.__main__ import main
from radial.fit import chosen, fit, nearest_separable
from radial.patterns.fitted import spread
from radial.patterns.head_masks import About, packed, unpacked, write
from radial.patterns.token_orders import frame_order
from tests.helpers.oracles import masked_softmax
from tests.helpers.patterns import fitted

grids = st.builds(VideoGrid, st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.sampled_from([0, 1, 11, 40]))
fits = st.builds(VideoGrid, st.integers(2, 6), st.integers(1, 6), st.integers(1, 9))


def restated(pattern: Fitted, layer: int, head: int, grid: VideoGrid) -> np.ndarray:
    """The mask of one head, pair by pair, from the definition."""
    masks, about, block = pattern.masks, pattern.masks.about, pattern.masks.about.block
    bits = np.unpackbits(masks.bits[about.layers.index(layer), head].numpy(), bitorder="little")
    tiles, frames, per_frame = math.ceil(about.height * about.width / block), about.frames, about.height * about.width
    side, everyone = grid.video_tokens // block, len(about.layers) * masks.heads
    place = spread(about.layers.index(layer) * masks.heads + head, everyone)
    stretch = round(1 / about.rate) if about.rate * side > 1 else max(side, 1)
    out = np.zeros((side, side), bool)
    for i in range(side):
        for j in range(side):
            (f, a), (g, b) = (divmod(n * block + block // 2, per_frame) for n in (i, j))
            distance = g - f
            if grid.frames > frames:
                scaled = abs(distance) * (frames - 1) / (grid.frames - 1)
                distance = int(np.sign(distance)) * math.floor(scaled + 0.5)
            row = 2 * frames - 1 if g == 0 else distance + frames - 1
            x = (i // about.rows * side + j // stretch) ^ ((about.seed + 1) * 0x9E3779B1 % 2**32)
            for _ in range(2):
                x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32
            place_of_pair = ((x >> 16) ^ x) + (j % stretch) * 2**31 // stretch + place * 2**31 // everyone
            drawn = place_of_pair % 2**31 < round(about.rate * 2**31)
            out[i, j] = i == j or drawn or bits[(row * tiles + a // block) * tiles + b // block]
    return out


@hypothesis_settings(max_examples=25)
@given(
    of=fits, grid=grids, block=st.sampled_from([16, 32]), rate=st.sampled_from([0.0, 0.07, 0.4, 1.0]),
    seed=st.integers(0, 2**32 - 1), layer=st.sampled_from([2, 5]), head=st.integers(0, 2), rows=st.sampled_from([1, 4]),
)  # fmt: skip
@example(of=VideoGrid(2, 2, 3), grid=VideoGrid(6, 1, 1), block=16, rate=1.0, seed=0, layer=2, head=0, rows=1)
@example(of=VideoGrid(4, 5, 5), grid=VideoGrid(7, 1, 1), block=16, rate=0.0, seed=3, layer=5, head=1, rows=1)
def test_a_heads_mask_is_its_rule_its_diagonal_and_its_draw(of, grid, block, rate, seed, layer, head, rows):
    pattern = fitted(of, block, layers=(2, 5), heads=3, rate=rate, seed=seed, rows=rows)
    grid = VideoGrid(grid.frames, of.height, of.width, grid.text_tokens)
    expected = restated(pattern, layer, head, grid)
    layout = build_head_layouts(pattern, grid, block, layers=6, heads=3).layer(layer)
    complete = layout.complete_blocks
    mask = layout.mask()[head]
    assert np.array_equal(mask[:complete, :complete].numpy(), expected)
    assert mask[complete:].all() and mask[:, complete:].all()
    assert mask.any(1).all()
    own = build_layout(pattern.of_head(layer, head, 3), grid, block)
    assert torch.equal(own.mask(), mask) and own.filled_rows == 0


@hypothesis_settings(max_examples=6)
@given(
    grid=grids, block=st.sampled_from([16, 32]), first=st.integers(0, 1), masked=st.booleans(),
    order=st.sampled_from(["raster", "patches"]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_attention_and_gradients_are_each_heads_masked_softmax(grid, block, first, masked, order, seed):
    """Of some of a model's heads, as a rank of sequence parallelism has them."""
    pattern = fitted(VideoGrid(4, grid.height, grid.width), block, seed=seed, order=order)
    layout = build_head_layouts(pattern, grid, block, layers=2, heads=4).part(first, 2).layer(1)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, grid.tokens, 2, 8)
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4))
    lengths = torch.randint(0, grid.text_tokens + 1, (2,), generator=generator) if masked else None
    expected = []
    for head in range(2):
        own = build_layout(pattern.of_head(1, 2 * first + head, 4), grid, block)
        one = [x[:, :, head : head + 1] for x in (q, k, v)]
        expected.append(masked_softmax(*one, own, lengths, 8**-0.5))
    expected, got = torch.cat(expected, 2), attention_over(q, k, v, layout, text_lengths=lengths, backend="torch")
    for mine, right in zip(
        (got, *torch.autograd.grad(got, (q, k, v), grad.detach())),
        (expected, *torch.autograd.grad(expected, (q, k, v), grad.detach())),
        strict=True,
    ):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


@given(places=st.integers(1, 2000))
def test_heads_are_spread_over_all_places(places):
    assert sorted(spread(place, places) for place in range(places)) == list(range(places))


@hypothesis_settings(max_examples=20)
@given(of=fits, frames=st.integers(1, 9), heads=st.integers(1, 6), rate=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
@example(of=VideoGrid(2, 1, 4), frames=8, heads=1, rate=1.0, seed=0)
def test_every_pair_is_drawn_by_as_many_heads_as_its_rate_gives(of, frames, heads, rate, seed):
    pattern = fitted(of, 16, heads=heads, rate=rate, seed=seed, bits=0.0, rows=1 + seed % 4)
    grid = VideoGrid(frames, of.height, of.width)
    layouts = build_head_layouts(pattern, grid, 16, layers=2, heads=heads)
    masks = torch.cat([layouts.layer(layer).mask() for layer in range(2)])
    complete = grid.video_tokens // 16
    times = masks.sum(0)[:complete, :complete][~torch.eye(complete, dtype=torch.bool)].double()
    assert ((times - 2 * heads * rate).abs() < 1 + 1e-6).all()
    if 2 * heads * rate >= 1:
        assert masks.any(0).all()


def values_of(about, seed=0, layers=2, heads=3):
    """Masses of heads that are as wide as they differ."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.rand(layers, heads, 1, generator=generator) * 3
    return torch.rand(layers, heads, about.entries, generator=generator) ** (1 + 4 * width)


@hypothesis_settings(max_examples=25)
@given(
    of=fits, text=st.sampled_from([0, 11, 40]), share=st.floats(0.05, 1), coverage=st.sampled_from([0, 0.25, 0.5, 1]),
    seed=st.integers(0, 99),
)  # fmt: skip
@example(of=VideoGrid(2, 4, 4), text=0, share=1.0, coverage=0.5, seed=0)
@example(of=VideoGrid(2, 5, 9), text=0, share=0.640625, coverage=0, seed=8)
def test_the_heaviest_bits_and_a_rate_that_reach_the_share(of, text, share, coverage, seed):
    grid = VideoGrid(of.frames, of.height, of.width, text)
    about = About("raster", 16, of.frames, of.height, of.width, (0, 1), share, coverage, 0.0, seed)
    values = values_of(about, seed)
    complete, blocks = grid.video_tokens // 16, -(-grid.tokens // 16)
    if share * blocks**2 < blocks**2 - complete**2 + complete:
        with pytest.raises(RadialError, match="expected at least"):
            chosen(values, about, grid)
        return
    rules, rate = chosen(values, about, grid)
    pattern = Fitted(
        HeadMasks(packed(rules), About(**{**vars(about), "rate": rate}), f"{of} {text} {share} {coverage} {seed}")
    )
    layouts = build_head_layouts(pattern, grid, 16, layers=2, heads=3)
    kept = sum(1 - layouts.layer(layer).sparsity for layer in range(2)) / 2
    # the draw of each pair misses its rate by less than one of the six heads, on both sides; of few pairs by one block
    assert kept == pytest.approx(share, abs=0.2 * min(1, rate * 6) + 1 / blocks**2)
    assert (1 - build_layout(pattern, grid, 16).sparsity) == pytest.approx(share, abs=1 / blocks**2 + 1e-6)
    # no bit that is left out is worth more than one that is taken, if it costs anything
    cost = torch.zeros(about.entries)
    alone = torch.eye(about.entries, dtype=torch.bool)[None]
    if about.entries <= 64:
        for entry in range(about.entries):
            one = About(**{**vars(about), "layers": (0,)})
            mask = Fitted(HeadMasks(packed(alone[:, entry : entry + 1]), one, f"{of} {text} {entry}"))
            cost[entry] = len(mask.of_head(0, 0, 1).video_blocks(grid, 16)) - complete
        used = (rules * cost).sum()
        assert used <= (1 - coverage) * 6 * (share * blocks**2 - blocks**2 + complete**2 - complete) + 1e-3
        left = values[~rules & (cost > 0)]
        taken = values[rules & (cost > 0)]
        assert not len(left) or not len(taken) or left.max() <= taken.min()


@pytest.mark.parametrize("coverage", [0.0, 1.0])
def test_a_longer_clip_keeps_the_same_place_of_neighbouring_frames(coverage):
    """Its scaled distance is 0, where the measured clip has nothing but the diagonal, which every mask keeps."""
    of = VideoGrid(4, 4, 8)
    about = About("raster", 16, 4, 4, 8, (0,), 0.4, coverage, 0.0, 0)
    mass = torch.exp(-torch.arange(-3, 4).abs()[:, None, None] - 0.1 * (1 - torch.eye(2)))
    rules, _ = chosen(torch.cat([mass, torch.zeros(1, 2, 2)]).flatten()[None, None], about, of)
    pattern = Fitted(HeadMasks(packed(rules), about, f"longer {coverage}")).of_head(0, 0, 1)
    kept = torch.zeros(20, 20, dtype=torch.bool)
    kept.view(-1)[pattern.video_blocks(VideoGrid(10, 4, 8), 16)] = True
    neighbours = kept.diagonal(2)[2:]  # of later frames than the first
    assert neighbours.all() if coverage == 0 else not neighbours.any()


def decay_file(path, grid, layers=3, heads=2, block=16, tile=None, seed=0):
    """What python -m train.decay writes."""
    generator = torch.Generator().manual_seed(seed)
    tiles = -(-grid.tokens_per_frame // block)
    tensors = {}
    for sigma in (0.3, 0.6):
        for layer in range(layers):
            shape = (heads, 2 * grid.frames - 1, tiles, tiles)
            tensors[f"sigma_{sigma}/layer_{layer}/mass"] = torch.rand(shape, generator=generator) ** 4
            tensors[f"sigma_{sigma}/layer_{layer}/sink"] = torch.rand(
                heads, grid.frames, tiles, tiles, generator=generator
            )
    about = {
        "grid": vars(grid), "tile": tile or f"strips of {block}", "layers": list(range(layers)), "heads": heads,
        "sigmas": [0.3, 0.6],
    }  # fmt: skip
    save_file(tensors, path, {"about": json.dumps(about)})
    return path


def test_from_masses_to_masks(tmp_path):
    grid, file = VideoGrid(5, 6, 9), tmp_path / "mine.safetensors"
    decay = decay_file(tmp_path / "decay.safetensors", grid)
    about = fit(decay, file, share=0.4, coverage=0.5, dense_layers=1, seed=7)
    masks = HeadMasks.read(file)
    assert masks.about == about and about.layers == (1, 2) and about.seed == 7 and about.tiles == 4 and about.rows == 4
    assert load_file(file)["bits"].shape == (2, 2, 2 * 5 * 16 / 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decay.safetensors", "mine.safetensors"]
    # the value of a bit is the mass of a key token, the first frame's apart: in numpy
    tensors = load_file(decay)
    values = np.zeros((2, 2, 10, 4, 4))
    for layer in (1, 2):
        for sigma in (0.3, 0.6):
            mass, sink = (tensors[f"sigma_{sigma}/layer_{layer}/{name}"].double().numpy() for name in ("mass", "sink"))
            values[layer - 1, :, :9] += mass / 2 / [16, 16, 16, 6]
            values[layer - 1, :, 9] += sink.mean(1) / 2 / [16, 16, 16, 6]
    rules, rate = chosen(torch.tensor(values).float().flatten(2), about, grid)
    assert torch.equal(unpacked(masks.bits).bool()[..., : about.entries], rules) and rate == about.rate
    pattern = make_pattern("fitted", masks=file)
    assert pattern == Fitted(masks) and hash(pattern) == hash(Fitted(masks)) and pattern.by_head
    compact = fit(decay_file(tmp_path / "patches.safetensors", grid, tile="patches of 16"), file, share=0.4)
    assert compact == replace(about, order="patches", layers=(2,), seed=0, rate=compact.rate)
    order = make_pattern("fitted", masks=file).token_order(grid, 16)
    assert torch.equal(order[2 * 54 : 3 * 54] - 2 * 54, frame_order("patches", 6, 9, 16))
    assert not masks.about.separable
    fit(decay, file, share=0.4, coverage=0.5, separable=True, dense_layers=1, seed=7)
    separable, near = nearest_separable(torch.tensor(values).float().flatten(2), about)
    rules, _ = chosen(separable, about, grid)
    assert near.all() and HeadMasks.read(file).about.separable and HeadMasks.read(file).about.not_separable == ()
    assert torch.equal(unpacked(HeadMasks.read(file).bits).bool()[..., : about.entries], rules)
    fit(decay, file, share=0.4, coverage=0.5, dense_layers=1, seed=8)
    assert make_pattern("fitted", masks=file) != pattern


def test_the_command_says_which_share_of_clips_with_text_is_kept(tmp_path, capsys):
    decay = decay_file(tmp_path / "decay.safetensors", VideoGrid(5, 6, 9, 120))
    main.run(["fit", str(decay), "share=0.7", "dense_layers=0", f"out={tmp_path / 'masks.safetensors'}"])
    said = capsys.readouterr().out
    assert "5 frames of 6 x 9 tokens and 120 of text, blocks of 16\n" in said
    assert float(said.split("  blocks")[1].split()[0]) == pytest.approx(0.7, abs=0.002)


@pytest.mark.parametrize("order", ["raster", "patches"])
def test_separable_masses_are_the_nearest(order):
    """Masses that are such come back; of others the residuals' sums over pairs are zero, and so with each distance."""
    about = About(order, 16, 5, 8, 12, (0, 1), 0.3, 0.5, 0.0, 0)
    places = frame_order(order, 8, 12, 16).numpy().reshape(6, 16)
    middles = np.stack([places // 12, places % 12], -1).mean(1)
    in_space = np.sqrt(((middles[:, None] - middles) ** 2).sum(-1))
    in_time = np.abs(np.arange(-4, 5))[:, None, None]
    rates = np.random.default_rng(0).uniform(0.05, 1, (2, 3, 2, 1, 1, 1))
    mass = 1e-3 * np.exp(-rates[:, :, 0] * in_time - rates[:, :, 1] * in_space)
    first = np.full((2, 3, 1, 6, 6), 2e-4)
    exact = torch.tensor(np.concatenate([mass, first], 2)).flatten(2).float()
    torch.testing.assert_close(nearest_separable(exact, about)[0], exact, rtol=1e-4, atol=1e-12)
    values = exact * torch.rand(exact.shape, generator=torch.Generator().manual_seed(0)) ** 3
    found = nearest_separable(values, about)[0].unflatten(-1, (10, 6, 6)).double().numpy()
    given = values.unflatten(-1, (10, 6, 6)).double().numpy()
    weight = 5.0 - in_time
    for term in (1, in_time, in_space):
        left, right = ((weight * term * of[:, :, :-1]).sum((2, 3, 4)) for of in (given, found))
        np.testing.assert_allclose(left, right, rtol=1e-4)
    one = About(order, 96, 5, 8, 12, (0, 1), 0.3, 0.5, 0.0, 0)  # one tile a frame
    fallen = 1e-3 * np.exp(-0.3 * np.abs(np.arange(-4, 6)))
    fallen[-1] = 2e-4
    alone = torch.tensor(fallen).float().expand(2, 3, 10)
    torch.testing.assert_close(nearest_separable(alone, one)[0], alone, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(found[:, :, -1], given[:, :, -1].mean((2, 3), keepdims=True).repeat(6, 2).repeat(6, 3))


def farthest(grid, where):
    """(distances, tiles, tiles) masses in the farthest tiles of the own frame, or in the farthest frames."""
    tiles = -(-grid.tokens_per_frame // 16)
    mass = torch.zeros(2 * grid.frames - 1, tiles, tiles)
    if where == "tiles":
        mass[grid.frames - 1, 0, -1] = mass[grid.frames - 1, -1, 0] = 0.5
    else:
        mass[0] = mass[-1] = 0.5
    return mass


@pytest.mark.parametrize("where", ["tiles", "frames"])
def test_a_head_that_no_separable_masses_are_near_is_fitted_to_its_own(tmp_path, where, capsys):
    """No rates are least for mass at the largest distances alone: the head is named, the others' are what they were."""
    grid, out = VideoGrid(21, 8, 16), tmp_path / "masks.safetensors"
    decay = decay_file(tmp_path / "decay.safetensors", grid)
    tensors = load_file(decay)
    with safe_open(decay, "pt") as file:
        header = file.metadata()
    for sigma in (0.3, 0.6):
        tensors[f"sigma_{sigma}/layer_1/mass"][1] = farthest(grid, where)
    save_file(tensors, decay, header)
    main.run(["fit", f"decay={decay}", "share=0.3", "separable=true", "dense_layers=1", f"out={out}"])
    said = capsys.readouterr().out
    assert "  masses         separable, but as measured where none are near: layer 1 head 1\n" in said
    about = HeadMasks.read(out).about
    assert about.separable and about.not_separable == ((1, 1),)
    values = torch.rand(1, 2, about.entries, generator=torch.Generator().manual_seed(1))
    values[0, 1] = torch.cat([farthest(grid, where), torch.full((1, 8, 8), 0.1)]).flatten()
    found, near = nearest_separable(values, about)
    assert near.tolist() == [[True, False]] and torch.equal(found[0, 1], values[0, 1])
    assert torch.equal(found[:, :1], nearest_separable(values[:, :1], about)[0])


def test_what_cannot_be_fitted(tmp_path):
    grid, out = VideoGrid(5, 6, 9), tmp_path / "out.safetensors"
    decay = decay_file(tmp_path / "decay.safetensors", grid)
    with pytest.raises(RadialError, match="share is 0.01, expected at least 0.17"):
        fit(decay, out, share=0.01, dense_layers=0)
    with pytest.raises(RadialError, match="share is 2, expected at most 1"):
        fit(decay, out, share=2, dense_layers=0)
    with pytest.raises(RadialError, match=r"layers \[0, 1, 2\], dense_layers=3 leaves none"):
        fit(decay, out, share=0.4, dense_layers=3)
    with pytest.raises(RadialError, match="tiles 8x16, expected strips or patches .* tile=patch"):
        fit(decay_file(tmp_path / "tiled.safetensors", grid, tile="8x16"), out, share=0.4)
    with pytest.raises(RadialError, match="the measured masses themselves: give the masks another name"):
        fit(decay, tmp_path / "." / "decay.safetensors", share=0.4, dense_layers=0)
    with pytest.raises(RadialError, match="cannot be read"):
        fit(tmp_path / "none.safetensors", out, share=0.4)
    with safe_open(decay, "pt") as file:
        broken = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        broken["sigma_0.6/layer_2/mass"][1, 0, 0, 0] = torch.nan
        save_file(broken, tmp_path / "broken.safetensors", file.metadata())
    with pytest.raises(RadialError, match="masses of layer 2 are not finite"):
        fit(tmp_path / "broken.safetensors", out, share=0.4, separable=True)
    (tmp_path / "text.safetensors").write_text("no tensors", encoding="utf-8")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other"):
        with pytest.raises(RadialError, match=f"{name}.safetensors is damaged, or no such file"):
            fit(tmp_path / f"{name}.safetensors", out, share=0.4)
    assert not out.exists()


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    file, masks = tmp_path / "masks.safetensors", fitted(VideoGrid(3, 4, 8), 16).masks
    about = {k: v for k, v in vars(masks.about).items() if k not in ("separable", "not_separable", "rows")}
    save_file({"bits": masks.bits}, file, {"radial.masks": json.dumps(about)})
    assert HeadMasks.read(file).about == masks.about and not masks.about.separable and masks.about.rows == 1
    del about["seed"]
    save_file({"bits": masks.bits}, file, {"radial.masks": json.dumps(about)})
    with pytest.raises(RadialError, match="is damaged"):
        HeadMasks.read(file)


def test_files_that_hold_no_masks(tmp_path):
    with pytest.raises(
        RadialError, match=r"masks .*none.safetensors cannot be read .*: expected a file of python -m radial"
    ):
        HeadMasks.read(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RadialError, match="holds no masks of heads"):
        HeadMasks.read(tmp_path / "other.safetensors")
    masks = fitted(VideoGrid(3, 4, 8), 16).masks
    for order, bits, message in (("tiles", 1, "in the order 'tiles'"), ("raster", 2, "damaged")):
        about = About(**{**vars(masks.about), "order": order})
        write(unpacked(masks.bits)[:, ::bits].repeat(1, 1, bits), about, tmp_path / "mine.safetensors")
        with pytest.raises(RadialError, match=message):
            HeadMasks.read(tmp_path / "mine.safetensors")


def test_a_clip_or_model_that_masks_are_not_for():
    grid = VideoGrid(3, 4, 8)
    pattern = fitted(grid, 16, layers=(2, 3), heads=4)
    with pytest.raises(RadialError, match="frames of 4 x 8 tokens, the clip's have 8 x 4"):
        build_layout(pattern, VideoGrid(3, 8, 4), 16)
    with pytest.raises(RadialError, match="blocks of 16 tokens, block is 32: set it to 16"):
        build_layout(pattern, grid, 32)
    with pytest.raises(RadialError, match="layer 1 has none: keep it dense"):
        build_head_layouts(pattern, grid, 16, layers=4, heads=4).layer(1).mask()
    with pytest.raises(RadialError, match="4 heads in each layer, the model has 2"):
        build_head_layouts(pattern, grid, 16, layers=4, heads=2).layer(2).mask()
    pattern.masks.check_model(4, 4, 2)
    for layers, heads, dense in ((3, 4, 2), (5, 4, 2), (4, 4, 1), (4, 3, 2)):
        with pytest.raises(RadialError, match="masks are"):
            pattern.masks.check_model(layers, heads, dense)
    with pytest.raises(RadialError, match="fitted has that of its masks, 0.3"):
        with_share(pattern, grid, 16, 0.2)
    with pytest.raises(RadialError, match="masks is not set, pattern fitted needs the file"):
        make_pattern("fitted")
    with pytest.raises(RadialError, match="masks is of pattern fitted, dense has none"):
        make_pattern("dense", masks="x.safetensors")
