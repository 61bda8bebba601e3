"""ZeRO's numbers and checkpoints, with DeepSpeed on the CPU in real processes; Lightning's part is in tests/gpu."""

import pytest
import torch
import zero_ranks
from ranks import run_ranks

from train.checkpoint import load_state, load_weights


def same(a, b):
    """Two checkpoints hold the same weights, moments and step; Adam's steps magnify rounding, the moments do not."""
    got, expected = load_weights(a), load_weights(b)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-4)
    got, expected = (load_state(folder)["optimizer_states"][0] for folder in (a, b))
    assert got["state"].keys() == expected["state"].keys()
    assert got["param_groups"] == expected["param_groups"]
    for index, entry in expected["state"].items():
        assert got["state"][index].keys() == entry.keys()
        assert got["state"][index]["step"] == entry["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            peak = entry[key].abs().max().item()
            assert peak > 0
            torch.testing.assert_close(got["state"][index][key], entry[key], rtol=1e-3, atol=1e-4 * peak)


@pytest.mark.parametrize(("stage", "world", "size"), [(1, 2, 1), (2, 2, 2), (3, 3, 1), (3, 4, 2)])
def test_steps_and_checkpoints_are_the_single_processs(tmp_path, stage, world, size):
    """Two steps; then the second one again from the single process's checkpoint; then a third, without ZeRO, from ours.

    Three ranks do not divide the parameters evenly, and sequence parallelism is inside the world that ZeRO shards over.
    """
    samples = world // size
    expected = zero_ranks.plain(3, samples, tmp_path / "plain")
    for losses in run_ranks(world, zero_ranks.zero, stage, size, 2, samples, tmp_path / "zero"):
        assert losses == pytest.approx(expected[:2], rel=1e-5)
    same(tmp_path / "zero", tmp_path / "plain" / "step-2")

    start = tmp_path / "plain" / "step-1"
    for losses in run_ranks(world, zero_ranks.zero, stage, size, 1, samples, tmp_path / "resumed", start):
        assert losses == pytest.approx(expected[1:2], rel=1e-5)
    same(tmp_path / "resumed", tmp_path / "plain" / "step-2")

    assert zero_ranks.plain(1, samples, tmp_path / "on", tmp_path / "zero") == pytest.approx(expected[2:], rel=1e-4)
