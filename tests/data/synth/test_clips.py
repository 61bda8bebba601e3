"""The synthetic clips: deterministic, as described, and with something to remember."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import DataError
from data.shards.manifest import Manifest
from data.shards.stream import read_samples
from data.synth import clips as synth
from data.synth.clips import main, synthesize
from data.synth.outlines import signed_distance
from data.synth.scenes import PALETTE, make_clip
from data.text import TinyTextEncoder
from radial.errors import Mistake


def area_of(colour: str, pixels: torch.Tensor) -> torch.Tensor:
    """How many pixels of each frame of (3, F, H, W) have this colour: (F,)."""
    target = torch.tensor(PALETTE[colour])[:, None, None, None] * 2 - 1
    return ((pixels - target).abs().amax(0) < 0.02).sum(dim=(1, 2))


def test_the_visitor_leaves_and_returns_unchanged() -> None:
    for index in range(24):
        pixels, meta = make_clip(5, index, 64, 32, 64)
        visitor = meta["objects"][-1]
        assert visitor["role"] == "visits"
        area = area_of(visitor["colour"], pixels)
        inner = [(first, last) for first, last in meta["absent"] if first > 0 and last < 64]
        assert inner, meta
        for first, last in inner:
            assert 12 <= last - first <= 28
            assert (area[first:last] == 0).all()
        first, last = inner[0]
        # It is drawn on top of all others, so its area in full view is its own.
        assert area[:first].max() > 20 and area[last:].max() > 10
        residents = [area_of(thing["colour"], pixels).max() for thing in meta["objects"][:-1]]
        assert min(residents) > 20


def test_it_comes_back_through_the_same_side_in_the_same_lane() -> None:
    for index in range(8):
        pixels, meta = make_clip(9, index, 64, 32, 64)
        target = torch.tensor(PALETTE[meta["objects"][-1]["colour"]])[:, None, None] * 2 - 1
        first, last = next(run for run in meta["absent"] if run[0] > 0 and run[1] < 64)

        def box(frame: int, pixels: torch.Tensor = pixels, target: torch.Tensor = target) -> torch.Tensor:
            return ((pixels[:, frame] - target).abs().amax(0) < 0.02).nonzero().float().mean(dim=0)

        leaving = next(box(t) for t in range(first - 1, -1, -1) if not box(t).isnan().any())
        coming = next(box(t) for t in range(last, 64) if not box(t).isnan().any())
        assert (leaving - coming).abs().max() < 6, (index, leaving, coming)


def test_short_clips_show_all_phases_of_the_same_scenes() -> None:
    short = [make_clip(0, i, 16, 32, 64)[1] for i in range(40)]
    long = [make_clip(0, i, 64, 32, 64)[1] for i in range(40)]
    assert [meta["caption"] for meta in short] == [meta["caption"] for meta in long]
    gone = [sum(last - first for first, last in meta["absent"]) for meta in short]
    assert gone.count(0) > 5 and gone.count(16) > 0 and sum(0 < frames < 16 for frames in gone) > 5
    for meta in short:
        assert 2 <= len(meta["objects"]) <= 3 and len(meta["caption"].split()) <= 30
        assert all(f"a {x['colour']} {x['shape']} {x['role']}" in meta["caption"] for x in meta["objects"])


def test_the_sun_rises_once_a_clip_whatever_its_length() -> None:
    short, long = (make_clip(3, 4, frames, 32, 64)[0].flatten(2).median(-1).values for frames in (16, 64))
    torch.testing.assert_close(short[:, [0, -1]], long[:, [0, -1]], rtol=0, atol=1e-6)
    brightness = long.mean(0)
    assert torch.equal(long[:, 0], long[:, 12])
    assert brightness[0] < -0.7 and brightness[-1] > 0
    assert (brightness.diff() >= -0.02).all()
    # red first, blue later
    assert long[0, 31] > long[2, 31] and long[2, -1] > long[0, -1]
    torch.testing.assert_close(short[:, 5], long[:, 21], rtol=0, atol=1e-5)


def test_pixels_are_in_range_and_move_smoothly() -> None:
    pixels, _ = make_clip(1, 2, 64, 32, 64)
    assert pixels.shape == (3, 64, 32, 64) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    change = (pixels[:, 1:] - pixels[:, :-1]).abs().mean(dim=(0, 2, 3))
    assert change.min() > 0 and change.max() < 0.15


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "star"])
def test_signed_distances(shape: str) -> None:
    """Against brute force: the distance to the outline is that to the nearest point of the other side."""
    axis = torch.linspace(-12, 12, 97)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = signed_distance(shape, x, y, 5.0)
    points = torch.stack([x, y], dim=-1).reshape(-1, 2)
    inside = (distance < 0).reshape(-1)
    assert 3.14 * 25 * 0.7 < inside.sum() * 0.25**2 < 3.14 * 25 * 1.3
    to_inside = torch.cdist(points, points[inside]).amin(1)
    to_outside = torch.cdist(points, points[~inside]).amin(1)
    brute = torch.where(inside, -to_outside, to_inside)
    assert (distance.reshape(-1) - brute).abs().max() < 0.36


def test_impossible_clips() -> None:
    with pytest.raises(DataError, match="0 frames"):
        make_clip(0, 0, 0, 32, 64)
    with pytest.raises(DataError, match="sides >= 16"):
        make_clip(0, 0, 4, 8, 64)
    assert make_clip(0, 0, 4, 16, 16)[0].shape == (3, 4, 16, 16)


@pytest.mark.slow
def test_folders_do_not_depend_on_number_or_processes(tmp_path: Path) -> None:
    one = synthesize(tmp_path / "one", clips=6, frames=5, per_shard=4)
    two = synthesize(tmp_path / "two", clips=6, frames=5, per_shard=4, workers=2)
    assert one == two and [len(shard.samples) for shard in one.shards] == [4, 2]
    few = synthesize(tmp_path / "few", clips=3, frames=5, per_shard=4)
    for a, b in zip(read_samples(one, 3), read_samples(few), strict=True):
        assert a.meta == b.meta and torch.equal(a.latent, b.latent)
        expected, _ = make_clip(0, int(a.key[-6:]), 5, 32, 64)
        assert a.latent.dtype == torch.bfloat16 and torch.equal(a.latent, expected.bfloat16())
        assert torch.equal(a.text["text"].tokens, TinyTextEncoder()(a.caption).tokens)
    assert not one.load_empty_prompt().text["text"].mask.any()
    assert one.encoder == "pixels-v1+tiny-text-v1-32x64"


def test_a_finished_folder_is_kept_and_another_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"out={tmp_path / 'out'}", "clips=3", "frames=4"]
    main([*arguments, f"preview={tmp_path / 'p.gif'}"])
    assert "3 clips in 1 shards, made" in capsys.readouterr().out
    assert (tmp_path / "p.gif").read_bytes()[:6] == b"GIF89a"
    before = (tmp_path / "out" / "shard-00000.tar").stat().st_mtime_ns
    main(arguments)
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "out" / "shard-00000.tar").stat().st_mtime_ns == before
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    rendered: list[int] = []
    monkeypatch.setattr(synth, "make_clip", lambda seed, i, *size: rendered.append(i) or make_clip(seed, i, *size))
    mistakes: list[tuple[list[str], str]] = [
        ([*arguments[:2], "frames=5"], "made with frames=4 (asked: 5)"),
        ([f"out={tmp_path / 'new'}", "clips=0"], "clips is 0, expected at least 1"),
        ([f"out={tmp_path / 'new'}", "height=3"], "sides >= 16"),
        ([f"out={tmp_path / 'new'}", "clips=many"], "clips is 'many', expected a whole number"),
        ([f"out={tmp_path / 'new'}", "fames=3"], "fames is not a known key; did you mean frames?"),
        ([f"out={tmp_path / 'file'}", "clips=1"], "is a file, expected a folder"),
        ([f"out={tmp_path / 'full'}", "clips=2"], "full: holds files, but no manifest.json"),
        ([f"out={tmp_path / 'new'}", f"preview={tmp_path / 'p.png'}"], "expected a name that ends in .gif"),
        ([f"out={tmp_path / 'new'}", f"preview={tmp_path / 'no' / 'p.gif'}"], "no folder"),
        ([], "out is not set, give out=VALUE; folder for the shards"),
    ]
    for words, message in mistakes:
        with pytest.raises(Mistake) as caught:
            main(words)
        assert message in str(caught.value)
    assert not (tmp_path / "new").exists() and set(rendered) == {0}, "told before the clips are rendered"


def test_the_command_exits_with_2_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "latent-shards", "version": 99}), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "data.synth", f"out={tmp_path}"], capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "version is 99, this code reads 2" in done.stderr


def test_tiny_text_encoder() -> None:
    encode = TinyTextEncoder(length=4, dim=8)
    text = encode("A red, RED circle!")
    assert text.tokens.shape == (4, 8) and text.tokens.dtype == torch.float32 and text.mask.tolist() == [True] * 4
    position = encode.positions
    assert torch.allclose(text.tokens[1] - position[1], text.tokens[2] - position[2], atol=1e-6)
    assert encode("red").mask.tolist() == [True, False, False, False] and not encode("red").tokens[1:].any()
    assert encode("one two three four five six").mask.all()
    empty = encode("")
    assert not empty.mask.any() and not empty.tokens.any()
    words: list[Any] = [
        TinyTextEncoder(1, 64)(f"w{i}").tokens[0] - TinyTextEncoder(1, 64).positions[0] for i in range(99)
    ]
    assert abs(torch.cat(words).var().item() - 1) < 0.05
    # Bits that must hold on every machine.
    assert encode.word("red")[:3].tolist() == [-0.3430609703063965, -1.384053349494934, -1.460512399673462]
    with pytest.raises(DataError, match="even dim"):
        TinyTextEncoder(dim=7)


def test_url_manifest_of_synth_loads(tmp_path: Path) -> None:
    made = synthesize(tmp_path / "a", clips=2, frames=3, height=16, width=16)
    assert Manifest.load(tmp_path / "a") == made and made.arguments["clips"] == 2
