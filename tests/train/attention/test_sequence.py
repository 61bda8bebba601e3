"""Sequence parallelism in real processes: losses, gradients and samples are the single process's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import sequence_ranks
from tests.helpers.ranks import run_ranks
from train.attention.sequence import SequenceGroup, SequenceShard
from train.flow import flow_loss

ODD = (3, 12, 20)  # 3 x 3 x 5 = 45 tokens: uneven on 2 and on 4 ranks


def close(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("pattern", ["dense", "released"])
@pytest.mark.parametrize(
    ("world", "size", "samples", "checkpointing", "trained"),
    [
        (2, 2, 2, True, "text"),
        (4, 2, 2, False, "lora"),
        (4, 4, 1, False, "all"),
        pytest.param(4, 4, 1, True, "text", marks=pytest.mark.slow),
        pytest.param(8, 4, 2, False, "text", marks=pytest.mark.slow),
        pytest.param(8, 8, 1, True, "eight", marks=pytest.mark.slow),
    ],
)
def test_gradients_and_losses_are_the_single_processs(pattern, world, size, samples, checkpointing, trained):
    """45 tokens, which no group divides evenly: of 8 ranks the last one holds three of them, and three of padding."""
    settings = (pattern, ODD)
    ranks = run_ranks(world, sequence_ranks.wan_gradients, *settings, size, samples, checkpointing, trained)
    expected = sequence_ranks.wan_gradients(*settings, 1, samples, checkpointing, trained)
    counts = {"lora": 24, "eight": 24, "text": 52, "all": 120}
    assert len(expected["gradients"]) == counts[trained]
    for got in ranks:
        close(got["loss"], expected["loss"].numpy())
        for name, gradient in expected["gradients"].items():
            assert gradient.abs().max() > 0
            close(got["gradients"][name], gradient.numpy(), 1e-4)


@pytest.mark.parametrize(
    ("pattern", "world", "size"),
    [("by_head", 2, 2), ("fitted", 2, 2), pytest.param("by_head", 4, 2, marks=pytest.mark.slow)],
)
def test_masks_that_differ_by_head_are_those_of_a_ranks_own_heads(pattern, world, size):
    """Each of four heads has a mask of its own in each layer; by_head's are in an order of tokens of its own."""
    settings = (pattern, ODD)
    ranks = run_ranks(world, sequence_ranks.wan_gradients, *settings, size, 2, True, "lora")
    expected = sequence_ranks.wan_gradients(*settings, 1, 2, True, "lora")
    shared = sequence_ranks.wan_gradients("released", ODD, 1, 2, True, "lora")
    assert any(not torch.equal(expected["gradients"][n], shared["gradients"][n]) for n in shared["gradients"])
    for got in ranks:
        close(got["loss"], expected["loss"].numpy())
        for name, gradient in expected["gradients"].items():
            close(got["gradients"][name], gradient.numpy(), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "kept"), [("full", 4), ("selective", 7)])
def test_compiled_layers_hold_the_collectives_without_a_graph_break(policy, kept):
    """Layers and the last norm keep their inputs, and a layer attention's output if that is not computed again."""
    for rank in run_ranks(2, sequence_ranks.compiled_gradients, policy, 2):
        assert rank["breaks"] == {}
        assert rank["kept"] == kept
        assert rank["graphs"] == 2  # the first layer's input has no gradient
        for got, expected in zip(rank["compiled"], rank["eager"], strict=True):
            close(got, expected, 1e-4)


def test_validation_gives_the_single_processs_losses():
    expected = sequence_ranks.wan_validation(ODD, 1)
    assert len(set(expected)) == 2
    for got in run_ranks(4, sequence_ranks.wan_validation, ODD, 4):
        close(got, expected)


def test_sampling_gives_the_single_processs_latent():
    expected = sequence_ranks.wan_sample(ODD, 1).numpy()
    for got in run_ranks(2, sequence_ranks.wan_sample, ODD, 2):
        close(got, expected)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("text", [0, 7])
def test_attention_with_text_tokens(size, text):
    expected = sequence_ranks.joint_attention(1, (3, 5, 3), text)
    for got in run_ranks(size, sequence_ranks.joint_attention, size, (3, 5, 3), text):
        for name, value in expected.items():
            close(got[name], value.detach().numpy(), 1e-12)


def test_ranks_that_would_keep_different_things_stop():
    same, other = ("full", "none"), ("selective", "none")
    assert run_ranks(2, sequence_ranks.agreement, [same, same]) == ["", ""]
    for said in run_ranks(2, sequence_ranks.agreement, [same, other]):
        assert "1 full + 1 none on rank 0 but 1 selective + 1 none on rank 1" in said
        assert "set parallel.offload_gib" in said


@pytest.mark.parametrize("world", [2, 4])
def test_each_collectives_backward_is_its_adjoint(world):
    for errors in run_ranks(world, sequence_ranks.adjoints):
        assert len(errors) == 6
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize(("world", "tokens"), [(2, 7), (4, 8), (4, 9), (4, 2)])
def test_moves_and_their_inverses(world, tokens):
    for rank in run_ranks(world, sequence_ranks.round_trips, tokens):
        assert all(rank.values()), rank


@given(tokens=st.integers(1, 400), size=st.integers(1, 64))
def test_the_split_covers_every_token_once(tokens, size):
    shards = [SequenceShard(tokens, SequenceGroup(None, size, rank)) for rank in range(size)]
    assert [t for shard in shards for t in range(shard.start, shard.stop)] == list(range(tokens))
    assert len({shard.length for shard in shards}) == 1
    assert 0 <= size * shards[0].length - tokens < size
    x = torch.arange(1, tokens + 1)[None, :, None]
    parts = [shard.slice(x) for shard in shards]
    assert all(part.shape == (1, shards[0].length, 1) for part in parts)
    joined = torch.cat(parts, dim=1)
    assert torch.equal(joined[:, :tokens], x)
    assert not joined[:, tokens:].any()


@given(
    frames=st.integers(1, 4), height=st.integers(1, 4), width=st.integers(1, 4), size=st.integers(1, 9),
    patch=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)),
)  # fmt: skip
def test_the_groups_mean_loss_is_the_samples(frames, height, width, size, patch):
    cells = [frames * patch[0], height * patch[1], width * patch[2]]
    torch.manual_seed(0)
    velocity, target = torch.randn(2, 3, *cells).double(), torch.randn(2, 3, *cells).double()
    tokens = frames * height * width
    shards = [SequenceShard(tokens, SequenceGroup(None, size, rank)) for rank in range(size)]
    losses = [flow_loss(velocity, target, shard, patch) for shard in shards]
    torch.testing.assert_close(torch.stack(losses).mean(), flow_loss(velocity, target, None, patch))
