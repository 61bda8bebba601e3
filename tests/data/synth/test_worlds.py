"""The worlds where length matters: deterministic, as described, and alike in every window of 16 frames."""

import math
from itertools import pairwise
from statistics import fmean, pstdev

import pytest
import torch

from data.errors import DataError
from data.shards.stream import read_samples
from data.synth.clips import synthesize
from data.synth.scenes import PALETTE
from data.synth.worlds import DELAY, HIDDEN, IN_PART, SIGNAL, WALL, WHOLE, WORLDS, draw_world, make_world

SIZE = 48, 80


def pixels_of(colour, pixels):
    """How many pixels of each frame of (3, F, H, W) have this colour: (F,)."""
    target = torch.tensor(WALL if colour is None else PALETTE[colour])[:, None, None, None] * 2 - 1
    return ((pixels - target).abs().amax(0) < 0.02).sum(dim=(1, 2))


def test_a_short_clip_is_the_beginning_of_the_long_one():
    for index in range(8):
        long, about = make_world(3, index, 40, *SIZE)
        short, its = make_world(3, index, 16, *SIZE)
        assert torch.equal(short, long[:, :16]) and long.min() >= -1 and long.max() <= 1
        assert about["caption"] == its["caption"] and about["world"] == WORLDS[index % 4]
        assert [a["seen"][:16] for a in about["actors"]] == [a["seen"] for a in its["actors"]]


def test_pixels_are_what_the_truth_has():
    """Where an actor is whole, as many pixels have its colour as its outline holds; where it is hidden, none."""
    seen = set()
    for index in range(16):
        pixels, about = make_world(5, index, 64, 96, 160)
        for actor in about["actors"]:
            colours = {other["colours"][0] for other in about["actors"]}
            if actor["role"] not in ("visitor", "mover") or len(colours) < len(about["actors"]):
                continue
            area = pixels_of(actor["colours"][0], pixels)
            for state, count in zip(actor["seen"], area.tolist(), strict=True):
                seen.add((actor["role"], state))
                assert count == 0 if state == HIDDEN else True
                if state == WHOLE:
                    assert 0.7 < count / (math.pi * actor["size"] ** 2) < 1.1, (actor, count)
    assert seen == {(role, state) for role in ("visitor", "mover") for state in (HIDDEN, IN_PART, WHOLE)}


def test_the_visitor_comes_back_the_same():
    returns = 0
    for index in range(0, 80, 4):
        *_, (_, visitor) = draw_world(1, index, 64, *SIZE)
        away = "".join("-" if state == HIDDEN else "x" for state in visitor.seen).strip("-").split("x")
        for run in filter(None, away):
            returns += 1
            assert 12 <= len(run) <= 27
        lanes = visitor.positions[:, visitor.lane]
        assert (lanes == lanes[0]).all() and WHOLE in visitor.seen
    assert returns >= 15


def test_a_mover_is_hidden_for_so_long():
    for index in range(1, 81, 4):
        *_, (_, mover, wall) = draw_world(1, index, 64, 96, 160)
        away = "".join("-" if state == HIDDEN else "x" for state in mover.seen).strip("-").split("x")
        assert all(9 <= len(run) <= 19 for run in away if run) and wall.shape == "box"


def test_a_lamp_repeats_and_a_lamp_answers():
    for index in range(2, 42, 4):
        *_, (_, lamp) = draw_world(1, index, 64, *SIZE)
        rounds = [n for n in range(1, 40) if lamp.colours[n:] == lamp.colours[:-n]]
        assert rounds and rounds[0] in (21, 24, 27, 30) and len(set(lamp.colours)) == 3
        *_, (resident, signal, lamp) = draw_world(1, index + 1, 96, *SIZE)
        assert lamp.colours[DELAY:] == signal.colours[:-DELAY] and resident.colours[0] not in signal.colours
        shown = [frame for frame, colour in enumerate(signal.colours) if colour]
        assert 2 * SIGNAL <= len(shown) <= 3 * SIGNAL
    answers = {tuple(draw_world(1, index, 96, *SIZE)[3][1].colours) for index in range(3, 83, 4)}
    assert len(answers) == 20


def test_captions_have_nothing_to_remember():
    for index in range(8):
        _, caption, _, (resident, *others) = draw_world(2, index, 64, *SIZE)
        assert caption.startswith(f"a {resident.colours[0]} {resident.shape} bounces, ")
        remembered = {colour for actor in others for colour in actor.colours if colour}
        assert not remembered & set(caption.split())


def figures(actors, first):
    """What a window of 16 frames shows, as numbers."""
    found = {}
    window = slice(first, first + 16)
    for actor in actors:
        (x, y), shown, seen = actor.positions[window].T, actor.colours[window], actor.seen[window]
        of = {
            "x": float(x[0]), "y": float(y[15]), "path": float(x[15] - x[0]),
            "angle": math.cos(float(actor.angles[first])),
            "whole": seen.count(WHOLE), "hidden": seen.count(HIDDEN),
            "red": shown.count("red"), "off": shown.count(None),
            "changes": sum(a != b for a, b in pairwise(shown)),
        }  # fmt: skip
        found |= {f"{actor.role} {name}": value for name, value in of.items()}
    return found


@pytest.mark.parametrize("world", range(4))
def test_windows_of_long_clips_are_like_short_clips(world):
    """Means and distributions of every figure of the last 16 frames of 64 against those of other clips of 16 frames."""
    indices = range(world, 4 * 300, 4)
    short = [figures(draw_world(11, index, 16, *SIZE)[3], 0) for index in indices]
    long = [figures(draw_world(12, index, 64, *SIZE)[3], 48) for index in indices]
    assert short[0].keys() == long[0].keys()
    for name in short[0]:
        a, b = ([float(one[name]) for one in side] for side in (short, long))
        error = math.hypot(pstdev(a), pstdev(b)) / math.sqrt(len(a))
        assert abs(fmean(a) - fmean(b)) <= 4.5 * error, name
        if len(set(a)) > 50:  # a continuous figure: Kolmogorov and Smirnov's distance, at one in 100,000
            places = torch.tensor(sorted(a + b))
            shares = [torch.searchsorted(torch.tensor(sorted(side)), places, right=True) / len(side) for side in (a, b)]
            assert float((shares[0] - shares[1]).abs().max()) <= 2.47 * math.sqrt(2 / len(a)), name


def test_shards_have_the_truth(tmp_path):
    made = synthesize(tmp_path / "clips", 4, 5, *SIZE, seed=7, scenes="memory")
    for index, clip in enumerate(read_samples(made)):
        expected, about = make_world(7, index, 5, *SIZE)
        assert torch.equal(clip.latent, expected.bfloat16())
        assert clip.meta["actors"] == about["actors"] and clip.meta["world"] == WORLDS[index]
    with pytest.raises(DataError, match=r"made with made_by=data.synth memory-v1 \(asked: data.synth synth-v2\)"):
        synthesize(tmp_path / "clips", 4, 5, *SIZE, seed=7)
    with pytest.raises(DataError, match="sides >= 48"):
        synthesize(tmp_path / "small", 4, 5, 32, 80, scenes="memory")
