"""The table of held-out clips: paired intervals, and sentences that follow the figures."""

import math

import pytest
import torch

from data.shards.sample import Prompt, Sample, TextTokens
from radial import Dense, Paper, Released, build_layout
from tests.helpers.attention import step_attention
from tests.helpers.sequence_ranks import tiny_adapter
from train.config.compose import compose_run, finish
from train.flow import SigmaSchedule
from train.measures.losses import Interval, clip_losses, student_95
from train.measures.results import Row, findings, read_results, write_results
from train.step.objective import Objective


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (8, 2.30600), (31, 2.03951), (200, 1.97190)]
)
def test_students_quantile_is_that_of_the_tables(freedom, quantile):
    assert student_95(freedom) == pytest.approx(quantile, rel=1e-5)


def test_an_interval_holds_the_mean_in_95_of_100_draws():
    draws = torch.randn(4000, 12, generator=torch.Generator().manual_seed(0)).tolist()
    intervals = [Interval.of(values) for values in draws]
    assert 0.94 < sum(abs(i.mean) <= i.half for i in intervals) / len(intervals) < 0.96


@pytest.mark.parametrize(
    ("values", "quantile"), [([0.5, 2.0], 12.7062), ([1.0, -2.0, 7.0], 4.30265), ([0.1, 0.4, 0.2, 0.9], 3.18245)]
)
def test_an_intervals_half_width_is_that_of_the_textbook(values, quantile):
    """t with n - 1 degrees of freedom, s with n - 1, over the root of n."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    interval = Interval.of(values)
    assert interval.mean == pytest.approx(mean)
    assert interval.half == pytest.approx(quantile * spread / math.sqrt(len(values)), rel=1e-5)


def test_an_interval_of_a_value_that_is_not_finite_is_none():
    for bad in (math.nan, math.inf):
        interval = Interval.of([0.1, bad, 0.3])
        assert math.isnan(interval.mean) and math.isnan(interval.half)


@pytest.mark.parametrize("count", [12, 14, 21])
def test_every_clip_has_a_noise_level_of_its_own(count):
    adapter, seen = tiny_adapter(), []

    def attention(x, sigma):
        seen.append(sigma)
        return step_attention(Dense(), adapter.grid(x), block=16)

    text, schedule = TextTokens(torch.randn(32, 64), torch.ones(32, dtype=torch.bool)), SigmaSchedule(3.0)
    clips = [Sample(f"clip-{n}", torch.randn(3, 2, 4, 4), {"text": text}, {}, {}, {}) for n in range(count)]
    clip_losses(adapter, clips, attention, schedule, Objective(0, Prompt({}, {})), label="")
    expected = [schedule.at_quantile((n + 0.5) / count) for n in range(count)]
    assert sorted(seen) == pytest.approx(expected) and seen != sorted(seen)


def rows(tuned):
    clips = [0.05 + 0.001 * math.sin(i) for i in range(16)]
    return [
        Row("base, dense, own length", 16, clips, 1.0),
        Row("base, dense", 64, clips, 9.0),
        Row("base, released", 64, [loss + 0.1 for loss in clips], 2.0),
        Row("released + LoRA", 64, [loss + tuned for loss in clips], 2.0),
    ]


def test_the_sentences_follow_the_figures():
    better, same = findings(rows(-0.01)), findings(rows(0.0))
    assert better == [
        "The loss of base, released is 0.1000 ± 0.0000 above that of base, dense.",
        "Tuned, the loss of released + LoRA is 0.0100 ± 0.0000 below that of base, dense.",
        "Tuned, the loss of released + LoRA is 0.1100 ± 0.0000 below that of base, released.",
    ]
    assert "not distinguishable (+0.0000 ± 0.0000) from that of base, dense" in same[1]
    assert findings(rows(math.nan))[1:] == [
        f"Tuned, the loss of released + LoRA is not comparable (a value is not finite) with that of base, {mask}."
        for mask in ("dense", "released")
    ]


def test_what_is_written_is_read_back(tmp_path, capsys):
    assert read_results(tmp_path) == []
    write_results(rows(-0.01), tmp_path)
    assert read_results(tmp_path) == rows(-0.01)
    text = (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"\n{text}"
    assert [line.split()[-3:] for line in text.splitlines() if line.startswith("base, dense  ")] == [
        ["-0.0100", "±", "0.0000"]
    ]


def test_the_default_runs_mask_has_windows_within_a_frame():
    """Otherwise the decay means nothing there, and Eq. 4 of the paper is dense."""
    config = finish(compose_run({}))
    assert config.model.rope == "interpolate"
    sparsities = [
        build_layout(pattern, config.grid(), config.attention.block).sparsity
        for pattern in (Released(0.5), Released(1.0), Paper(), Dense())
    ]
    assert sparsities == sorted(set(sparsities), reverse=True)
