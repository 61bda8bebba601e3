"""What has to be remembered, and whether it comes back: on true clips, on clips where it was swapped, on none."""

import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from data.synth.scenes import PALETTE
from data.synth.worlds import HIDDEN, make_world, render
from train.study.detect import classified, permanence, shape_of, trajectory_error
from train.study.truth import PASSING, actors_of, region, remembered

FRAMES, GIVEN, SIZE = 64, 32, (64, 112)


def clips(count, seed=21):
    for index in range(count):
        pixels, meta = make_world(seed, index, FRAMES, *SIZE)
        found = remembered(meta, FRAMES, GIVEN)
        if found is not None:
            yield pixels, meta, found


def swapped(pixels, meta, found):
    """The clip with another object from where the one was away: another colour, shape, size and lane."""
    unused = [name for name in PALETTE if name not in {c for a in meta["actors"] for c in a["colours"]}]
    actors = actors_of(meta, FRAMES)
    (place,) = [i for i, actor in enumerate(actors) if actor.role == found.actor.role]
    own = actors[place]
    if own.role in PASSING:
        places = own.positions.clone()
        places[:, own.lane] = SIZE[1 - own.lane] - places[:, own.lane]
        shapes = [shape for shape in ("square", "circle", "triangle", "star") if shape != own.shape]
        size = (3.5 if own.size > 4.5 * 2 else 5.5) * 2
        other = replace(own, shape=shapes[0], size=size, colours=[unused[0]] * FRAMES, positions=places)
    else:
        other = replace(own, colours=[colour and unused[0] for colour in own.colours])
    actors[place] = other
    made = render(actors, tuple(meta["ground"]), FRAMES, *SIZE)
    return torch.cat([pixels[:, : found.since], made[:, found.since :]], dim=1)


def scores(change):
    by_world = {}
    for pixels, meta, found in clips(16):
        score = permanence(change(pixels, meta, found), pixels, meta, found)
        if score:
            by_world.setdefault(meta["world"], []).append(score["permanence"])
    assert set(by_world) == {"visitor", "occlusion", "sequence", "cause"}
    assert sum(map(len, by_world.values())) > 8
    return {world: fmean(found) for world, found in by_world.items()}


def test_true_clips_are_near_one():
    assert all(score > 0.95 for score in scores(lambda pixels, *_: pixels).values())


@pytest.mark.slow
def test_noisy_and_blurred_clips_are_found_too():
    def worse(pixels, *_):
        blurred = torch.nn.functional.avg_pool2d(pixels, 3, 1, 1)
        return blurred + 0.1 * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(0))

    assert all(score > 0.9 for score in scores(worse).values())


def test_swapped_clips_are_near_zero():
    assert all(score < 0.12 for score in scores(swapped).values())


def test_an_object_that_never_comes_back_is_zero():
    for pixels, meta, found in clips(8):
        ground = (torch.tensor(meta["ground"]) * 2 - 1)[:, None, None, None].expand_as(pixels)
        assert permanence(ground, pixels, meta, found).get("permanence", 0) == 0


def test_what_is_remembered():
    """Only what the given frames have shown, only after they end, and not while it is away."""
    kinds = set()
    for _, meta, found in clips(24):
        actor = found.actor
        kinds.add(meta["world"])
        assert found.frames[0] >= GIVEN and found.since >= GIVEN
        if actor.role in PASSING:
            assert all(actor.seen[t] != HIDDEN for t in found.frames) and actor.seen[found.since] == HIDDEN
        else:
            assert all(actor.colours[t] for t in found.frames)
        mask = region(found, FRAMES, *SIZE)
        assert set(mask.any(dim=(1, 2)).nonzero().flatten().tolist()) <= set(found.frames)
        assert not mask[: found.frames[0]].any()
    assert len(kinds) == 4
    assert all(remembered(make_world(21, index, 16, *SIZE)[1], 16, 8) is None for index in (2, 3))


def again_of(meta, given):
    """The frames that show what the given ones have shown, restated world by world; none where nothing comes back."""
    actors = {actor.role: actor for actor in actors_of(meta, FRAMES)}
    passing = next((actors[role] for role in PASSING if role in actors), None)
    if passing is not None:
        hidden = [seen == HIDDEN for seen in passing.seen]
        for start in range(1, FRAMES):
            if hidden[start] and not hidden[start - 1] and 2 in passing.seen[:given]:
                back = [t for t in range(start, FRAMES) if not hidden[t]]
                if 2 in passing.seen[:start] and all(hidden[start : given + 1]):
                    return [t for t in back if t >= given]
        return []
    lamp = actors["lamp"].colours
    if "signal" in actors:
        return [t for t in range(given, FRAMES) if lamp[t] and 28 <= t < given + 28]
    rounds = [n for n in range(21, 31) if all(lamp[t] == lamp[t + n] for t in range(FRAMES - n))]
    return list(range(given, FRAMES)) if rounds[0] <= given else []


def test_what_is_remembered_follows_what_was_given():
    """For every number of given frames, those too in which something goes or comes back just there."""
    shown = {}
    for index in range(8):
        meta = make_world(21, index, FRAMES, *SIZE)[1]
        for given in range(4, FRAMES - 1):
            found, expected = remembered(meta, FRAMES, given), again_of(meta, given)
            assert (found.frames if found else []) == expected, (meta["world"], index, given)
            shown.setdefault((meta["world"], bool(expected)), given)
    assert len(shown) == 8  # each world with something to remember, and with nothing


def test_an_object_far_from_its_place_counts_half_of_the_height_at_most():
    pixels, meta = make_world(4, 0, FRAMES, *SIZE)
    resident = actors_of(meta, FRAMES)[0]
    corner = (torch.tensor(meta["ground"]) * 2 - 1)[:, None, None, None].repeat(1, *pixels.shape[1:])
    corner[:, :, :12, :12] = torch.tensor(PALETTE[resident.colours[0]])[:, None, None, None] * 2 - 1
    apart = [math.dist((6, 6), resident.positions[t].tolist()) for t in range(GIVEN, FRAMES) if resident.seen[t] == 2]
    assert min(apart) < SIZE[0] / 2 < max(apart)
    expected = fmean(min(distance, SIZE[0] / 2) for distance in apart)
    assert trajectory_error(corner, meta, GIVEN) == pytest.approx(expected)


def test_trajectories():
    """A true clip has an error below a pixel; one that stands still, another; none of it is half a height."""
    exact, still = [], []
    for index in range(0, 12, 2):
        pixels, meta = make_world(4, index, FRAMES, *SIZE)
        error = trajectory_error(pixels, meta, GIVEN)
        if error is not None:
            exact.append(error)
            stopped = torch.cat([pixels[:, :GIVEN], pixels[:, GIVEN - 1 : GIVEN].expand(-1, FRAMES - GIVEN, -1, -1)], 1)
            still.append(trajectory_error(stopped, meta, GIVEN))
            nothing = (torch.tensor(meta["ground"]) * 2 - 1)[:, None, None, None].expand_as(pixels)
            assert trajectory_error(nothing, meta, GIVEN) == SIZE[0] / 2
    assert len(exact) > 2 and fmean(exact) < 1 and fmean(still) > 8


def test_shapes_are_told_apart():
    for index in range(16):
        pixels, meta = make_world(6, index, 1, *SIZE)
        resident = actors_of(meta, 1)[0]
        mask = classified(pixels, meta["ground"])[0] == list(PALETTE).index(resident.colours[0])
        if resident.seen[0] == 2:
            centre = mask.nonzero().float().mean(0).flip(0) + 0.5
            assert math.dist(centre.tolist(), resident.positions[0].tolist()) < 1
            assert shape_of(mask, centre) == resident.shape
