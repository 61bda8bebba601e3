"""Intervals, conclusions, the sign of a base, the rows and Fréchet's distance, on figures that are known."""

import math
from dataclasses import replace

import pytest
import torch

from radial import Released, build_layout
from radial.patterns.head_masks import unpacked, write
from tests.helpers.patterns import fitted
from tests.helpers.studies import study_settings
from train.errors import UserError
from train.measures.losses import Interval
from train.study.__main__ import Settings
from train.study.base import BaseSign, pixels_leave
from train.study.fits import Fit
from train.study.frechet import frechet_distance
from train.study.losses import mean_over_sigmas
from train.study.masks import masks_file
from train.study.results import RowResult, conclusions, table
from train.study.rows import RIVALS, Row, released_share, rows_of
from train.study.settings import Job


def result(name, offset, seeds=(0, 1), tuned=True, clips=6):
    """Losses that differ by clip and seed alike in all rows, and by the offset from row to row."""
    losses = {
        seed: {"4x": {"0.5": [0.1 + 0.01 * i + 0.002 * seed + offset * (1 + 0.01 * i) for i in range(clips)]}}
        for seed in seeds
    }
    validation = {seed: [(1.0, 0.5), (2.0, 0.4 + offset), (3.0, 0.3 + offset)] for seed in seeds}
    return RowResult(Row(name, name, tuned), losses=losses, again=losses, validation=validation, blocks=0.2)


def test_differences_are_paired():
    released, worse = result("released", 0.0), result("local", 0.02)
    minus = worse.minus(released, "4x")
    assert minus.mean == pytest.approx(0.02 * 1.025) and minus.half < 0.001
    assert minus.half == pytest.approx(Interval.of([0.02 * (1 + 0.01 * i) for i in range(6)]).half)
    over = worse.minus_over_seeds(released, "4x")
    assert over.mean == pytest.approx(0.0205) and over.half == pytest.approx(0, abs=1e-12)
    assert released.minus(released, "4x") is None and result("a", 0, (0,)).minus_over_seeds(released, "4x") is None
    untuned = result("untuned_dense", 0.1, (0,), tuned=False)
    assert untuned.minus(released, "4x").mean == pytest.approx(0.1025 - 0.001)  # beside the mean over the seeds
    others = result("local", 0.02, (1, 2)).minus(released, "4x")  # seed 1 alone: seeds differ by what masks do not
    assert others.mean == pytest.approx(0.0205) and others.half == pytest.approx(minus.half)


def test_measures_of_generated_clips_are_paired_by_the_clip():
    released, local = result("released", 0.0), result("local", 0.0)
    released.clips = [{"clip": f"c{i}", "permanence": 0.1 * i**2} for i in range(5)]
    local.clips = [{"clip": f"c{i}", "permanence": 0.1 * i**2 - 0.01 * i} for i in (4, 2, 0, 3)]
    local.clips.append({"clip": "c1", "permanence": None})  # shows too little to be judged
    minus = local.measure_minus(released, "permanence")
    expected = Interval.of([-0.04, -0.02, 0.0, -0.03])
    assert (minus.mean, minus.half) == pytest.approx((expected.mean, expected.half))
    assert local.measure("permanence").mean == pytest.approx((1.6 + 0.4 + 0.9 - 0.09) / 4)
    assert released.measure_minus(released, "permanence") is None
    local.clips = local.clips[-2:]
    assert local.measure_minus(released, "permanence") is None and local.measure("permanence") is None


def test_a_clip_without_one_of_its_losses_has_none():
    assert mean_over_sigmas({"0.3": [0.1, None, 0.4], "0.6": [0.3, 0.2, None]}) == [pytest.approx(0.2), None, None]


def test_steps_to_a_rows_loss_are_of_the_seeds_that_both_have_finished():
    """Validation clips are a seed's own: its losses say nothing beside another's."""
    released, dense = result("released", 0.0, (0, 1)), result("dense", -0.15, (0, 1))
    assert dense.steps_to(released) == 2 and released.steps_to(dense) is None and released.steps_to(released) == 3
    released.validation[1] = [(step, loss + 9) for step, loss in released.validation[1]]
    alone = result("dense", -0.15, (0,))
    assert alone.steps_to(released) == 2 and result("dense", 0.05, (0,)).steps_to(released) is None
    assert result("dense", -0.15, (2,)).steps_to(released) is None
    del released.losses[0]  # under way: its last point is not its end
    assert alone.steps_to(released) is None


def test_a_row_that_has_diverged_says_so():
    released, worse = result("released", 0.0), result("local", 0.02)
    worse.losses[1]["4x"]["0.5"][2] = math.nan
    assert math.isnan(worse.loss("4x")) and math.isnan(worse.minus(released, "4x").half)
    said = conclusions([released, worse], "4x")
    assert said == [
        "At 4x the loss of local at 1.00 of its blocks is not comparable (a value is not finite) with that of released."
    ]
    _, cells = table([released, worse], ["4x"])
    assert "nan" in cells[1]
    worse.again = {seed: {"4x": {"0.5": [0.1, None, 0.3, None, None, None]}} for seed in (0, 1)}
    assert worse.loss("4x", again=True) == pytest.approx(0.2)  # of the clips that have something to remember
    worse.again[0]["4x"]["0.5"][0] = math.inf
    assert worse.loss("4x", again=True) == math.inf


def test_another_released_mask_gets_masks_of_its_own(tmp_path):
    from radial.cli.reader import read_some

    def file(**changes):
        job = Job.made_of(*read_some(Settings, study_settings(tmp_path, **changes)))
        return masks_file(job, Fit(0.6))

    own = file()
    assert own == file(seeds="0,1")
    assert len({own, file(attention__decay=0.1), file(attention__block=16), file(attention__rule="hunyuan")}) == 4


def test_conclusions_follow_the_numbers():
    rows = [result("released", 0.0), result("random", 0.03), result("local", -0.01)]
    said = conclusions(rows, "4x")
    assert said[0].startswith("At 4x the loss of random at 1.00 of its blocks is 0.03") and "above" in said[0]
    assert "below that of released" in said[1] and len(said) == 2
    rows[1] = result("random", -0.001)
    assert conclusions(rows, "4x")[0].startswith("Tuned random blocks are not above released")
    noisy = result("random", 0.003)  # above in the mean, by less than the clips differ
    for seed in (0, 1):
        noisy.losses[seed]["4x"]["0.5"] = [x + 0.02 * (-1) ** i for i, x in enumerate(noisy.losses[seed]["4x"]["0.5"])]
    told = conclusions([rows[0], noisy, rows[2]], "4x")
    assert told[0].startswith("Tuned random blocks are not above released") and "not distinguishable" in told[1]
    assert conclusions(rows[1:], "4x") == []
    head, cells = table([*rows, RowResult(Row("x", "x", True), "left out: why")], ["4x"])
    assert all(len(row) == len(head) for row in cells) and cells[-1][-1] == "left out: why"


def test_what_single_pixels_leave():
    """Against the least-squares line of the velocity over the noised pixel."""
    generator = torch.Generator().manual_seed(0)
    clips = [0.7 * torch.randn(1, 8, 40, 40, generator=generator) + 0.3 for _ in range(4)]
    x0 = torch.stack(clips).flatten().double()
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    for sigma in (0.3, 0.8):
        x, v = (1 - sigma) * x0 + sigma * noise, noise - x0
        both = torch.stack([x, v]).cov()
        left = both[1, 1] - both[0, 1] ** 2 / both[0, 0]
        assert pixels_leave(clips, [sigma]) == pytest.approx(float(left), rel=0.03)


def test_a_base_that_is_not_trained_enough_is_refused(tmp_path):
    BaseSign(loss=0.02, pixels=0.5, enough=0.05).check(tmp_path)
    with pytest.raises(UserError, match=r"not trained enough.*loss 0.0300 .* 6.0% of the 0.500.*at most 5.0%"):
        BaseSign(loss=0.03, pixels=0.5, enough=0.05).check(tmp_path)
    with pytest.raises(UserError, match="held-out loss nan"):
        BaseSign(loss=math.nan, pixels=0.5, enough=0.05).check(tmp_path)


def test_rows(tmp_path):
    from radial.cli.reader import read_some

    masks = tmp_path / "masks"
    masks.mkdir()
    with pytest.raises(UserError, match=r"masks has no \*.safetensors"):
        rows_of(Job.made_of(*read_some(Settings, study_settings(tmp_path, masks=masks))))
    job = Job.made_of(*read_some(Settings, study_settings(tmp_path)))
    share = released_share(job)
    for name, part in (("few", 0.6), ("many", 1.0)):
        pattern = fitted(job.config.grid(), 32)
        about = replace(pattern.masks.about, share=part * share, order="patches", separable=name == "many")
        write(unpacked(pattern.masks.bits).bool(), about, masks / f"{name}.safetensors")
    job = Job.made_of(*read_some(Settings, study_settings(tmp_path, masks=masks)))
    rows = {row.name: row for row in rows_of(job)}
    assert {*RIVALS, "fitted_few", "fitted_many", "released", "dense", "paper", "random", "full"} <= set(rows)
    assert [name for name in rows if name.startswith("fitted")] == ["fitted_many", "fitted_few"]
    assert rows["fitted_few"].words == "fitted, 0.6 of released's blocks, 50% drawn, patches"
    assert rows["fitted_many"].words == "fitted, 1 of released's blocks, 50% drawn, patches, separable"
    words = study_settings(tmp_path, masks=masks, rows="random,fitted_few,dense")
    assert [row.name for row in rows_of(Job.made_of(*read_some(Settings, words)))] == ["random", "fitted_few", "dense"]
    assert share == 1 - build_layout(Released(), job.config.grid(), 32).sparsity
    assert all(float(rows[name].settings["attention.share"]) == pytest.approx(share, abs=1e-6) for name in RIVALS)
    assert job.lengths == {"1x": 4, "2x": 8, "4x": 16} and job.seeds == (0,)
    assert {name for name, row in rows.items() if row.settings.get("rope")} == {
        "untuned_dense", "untuned_riflex", "released_default",
    }  # fmt: skip


def test_frechet_distance():
    generator = torch.Generator().manual_seed(1)
    true = torch.randn(3200, 4, generator=generator, dtype=torch.float64) * torch.tensor([4.0, 2.0, 1.0, 0.5])
    assert frechet_distance(true, true) == pytest.approx(0, abs=1e-6)
    moved = true + torch.tensor([3.0, 0, 0, 0])
    assert frechet_distance(moved, true) == pytest.approx(9, rel=1e-6)
    # covariances that commute: the sum of (s - s')²
    wider = (true - true.mean(0)) * 2 + true.mean(0)
    spread = torch.linalg.eigvalsh(true.T.cov()).sum()
    assert frechet_distance(wider, true) == pytest.approx(float(spread), rel=1e-6)
    assert math.isfinite(frechet_distance(true[:10], true[10:20]))


def test_frechet_distance_sees_as_many_components_as_sixteen_windows_each_carry():
    """40 windows carry two: what differs along the others counts for nothing, however far it is."""
    generator = torch.Generator().manual_seed(2)
    true = torch.randn(40, 5, generator=generator, dtype=torch.float64) * torch.tensor([4.0, 3.0, 1.0, 0.5, 0.2])
    axes = torch.linalg.eigh(true.T.cov()).eigenvectors.flip(1)  # the widest first
    for axis, expected in enumerate([9, 9, 0, 0, 0]):
        assert frechet_distance(true + 3 * axes[:, axis], true) == pytest.approx(expected, abs=1e-6)
    few = true[:20]  # they carry one
    assert frechet_distance(few + 3 * axes[:, 1], true) == pytest.approx(frechet_distance(few, true))
