"""Measures of generated clips, on clips that are made to have what each of them looks for."""

import pytest
import torch

from data.synth.scenes import make_clip
from train.measures.clip_measures import colour_drift, colour_trend, measure_clip, repetition

NATIVE, FRAMES = 16, 64


def moving(index: int, frames: int = FRAMES) -> torch.Tensor:
    return make_clip(0, index, frames, 32, 32)[0]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("index", range(6))
def test_real_motion_is_no_repetition(index):
    measured = measure_clip(moving(index), NATIVE)
    assert measured.repetition < 0.15
    assert measured.frozen < 0.05
    assert measured.consistency > 0.9
    assert measured.worst_step > 0.7
    assert measured.drift > 1.5 and measured.trend > 1.5  # from night to day


@pytest.mark.parametrize("times", [2, 4])
def test_a_loop_is_explained_by_its_first_turn(times):
    loop = torch.cat([moving(3, NATIVE)] * times, dim=1)
    measured = measure_clip(loop, NATIVE)
    assert measured.repetition == pytest.approx(1, abs=1e-9)
    assert measured.frozen == 0
    assert measured.worst_step < 0  # the seam is a cut, from day to night
    assert repetition(loop + 0.1 * noise(*loop.shape), NATIVE) > 0.8  # near 1 under noise


def test_a_loop_whose_colours_drift_is_a_loop_still():
    loop = torch.cat([moving(3, NATIVE)] * 4, dim=1)
    tint = torch.linspace(0, 2, FRAMES) * torch.tensor([[1.0], [-1.0], [0.5]])
    assert repetition(loop + tint[:, :, None, None], NATIVE) == pytest.approx(1, abs=1e-9)


def test_a_clip_that_repeats_itself_in_part():
    start = moving(3, 2 * NATIVE)
    clip = torch.cat([start, start[:, :NATIVE], moving(5, NATIVE)], dim=1)
    assert 0.25 < repetition(clip, NATIVE) < 0.45  # 16 of the 48 frames beyond the native ones
    assert repetition(clip, 3 * NATIVE) == repetition(clip)  # never asked for beyond more than half the clip


def test_a_still_is_named_apart():
    still = moving(0, NATIVE)[:, :1].expand(-1, FRAMES, -1, -1)
    for clip in (still, still + 0.01 * noise(3, FRAMES, 32, 32)):
        measured = measure_clip(clip, NATIVE)
        assert (measured.repetition, measured.frozen) == (0, 1)
        assert measured.consistency > 0.99
    half = torch.cat([moving(0)[:, :32], moving(0)[:, 31:32].expand(-1, 32, -1, -1)], dim=1)
    assert measure_clip(half, NATIVE).frozen == pytest.approx(32 / 63)
    assert measure_clip(half, NATIVE).repetition < 0.2
    flat = torch.full((3, FRAMES, 8, 8), 0.25)
    assert (measure_clip(flat).frozen, measure_clip(flat).drift) == (1, 0)


def test_independent_noise_has_nothing_in_common():
    measured = measure_clip(noise(16, 21, 8, 8))
    assert measured.repetition < 0.06
    assert measured.frozen == 0
    assert measured.consistency == pytest.approx(0, abs=0.02)
    assert measured.drift < 0.3 and measured.trend < 0.3


def test_drift_is_in_standard_deviations_of_a_frame():
    clip = noise(4, FRAMES, 32, 32) * torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None]
    assert colour_drift(clip) < 0.05
    time = torch.linspace(0, 1, FRAMES)[None, :, None, None]
    steady = clip + 3 * clip.std(dim=(1, 2, 3), keepdim=True) * time
    assert colour_trend(steady) == pytest.approx(3, rel=0.02)
    assert colour_drift(steady) == pytest.approx(3 * 56 / 63, rel=0.02)  # the first and last 8 frames' means
    there_and_back = clip + 3 * torch.sin(torch.pi * time)
    assert colour_trend(there_and_back) < 0.1
    late = clip + 3 * clip.std(dim=(1, 2, 3), keepdim=True) * (time > 0.75)
    assert colour_drift(late) == pytest.approx(3, rel=0.02)


def test_the_scale_of_the_values_does_not_matter():
    clip = moving(2)
    for other in (clip * 0.01, ((clip + 1) * 127.5).double()):
        assert vars(measure_clip(other, NATIVE)) == pytest.approx(vars(measure_clip(clip, NATIVE)), rel=1e-3, abs=1e-5)


def test_arrays_that_are_no_clips():
    with pytest.raises(ValueError, match=r"at least 4 frames, this one is \(3, 3, 8, 8\)"):
        measure_clip(torch.zeros(3, 3, 8, 8))
    with pytest.raises(ValueError, match="4 frames"):
        repetition(torch.zeros(3, 2, 8, 8))
    with pytest.raises(ValueError, match="not finite"):
        measure_clip(torch.full((3, 8, 8, 8), float("nan")))
