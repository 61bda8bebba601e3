"""Frozen weights: how they get from the files to where they are used."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.helpers import weights_ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import ARCHITECTURE, save_model
from train.config.compose import compose_run, finish
from train.lora.layers import inject_lora
from train.models.families import ADAPTERS
from train.models.families.wan import WanAdapter
from train.models.loading import benchmark_adapter
from train.models.weights import settle, stored_dtype


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def large(request, tmp_path_factory):
    """A model of about 30 M weights, stored in one dtype."""
    folder = tmp_path_factory.mktemp("large")
    shape = {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 2048, "num_layers": 2}
    WanTransformer3DModel(**{**ARCHITECTURE, **shape}).to(request.param).save_pretrained(folder)
    return folder, request.param


def test_a_model_in_the_dtype_of_its_files_is_no_private_copy(large):
    """Mapped, not read: what a node's ranks load is there once. Layers kept in fp32 are converted, and small."""
    folder, dtype = large
    assert stored_dtype(folder) == dtype
    for wanted in (None, dtype):
        (memory,) = run_ranks(1, weights_ranks.private_memory, folder, wanted)
        assert memory["size"] > 5e7
        assert memory["grown"] < 0.3 * memory["size"]


def test_the_ranks_of_a_node_load_the_weights_once(large):
    """Four processes that each hold the whole model take one model of memory together."""
    folder, _ = large
    ranks = run_ranks(4, weights_ranks.shared_memory, folder)
    assert len({rank["sum"] for rank in ranks}) == 1
    size = ranks[0]["size"]
    assert 0.5 * size < sum(rank["grown"] for rank in ranks) < 1.7 * size


def test_weights_that_are_stored_in_float8_are_never_there_in_16_bits(large):
    """A matrix is rounded from its file, and gone before the next one is: on the way to a small GPU, or to a slab."""
    (memory,) = run_ranks(1, weights_ranks.rounded_memory, large[0])
    # beside the result some matrices, which the allocator keeps; in 16 bits it is four times as much
    assert memory["size"] < memory["end"] * 1.2 and memory["most"] < 3 * memory["size"], memory


@pytest.mark.slow
def test_zero_3_spreads_weights_that_no_rank_ever_holds(large):
    """Straight from the files: a rank's own memory grows by its share, and by one layer on the way."""
    folder, _ = large
    ranks = run_ranks(4, weights_ranks.spread_memory, folder)
    size = ranks[0]["size"]
    assert sum(rank["own"] for rank in ranks) == pytest.approx(size, rel=0.01)
    for rank in ranks:
        assert rank["most"] < 0.9 * size  # a quarter, a layer of 0.37, and what the process takes for itself


def test_settling_gives_what_diffusers_loads(tmp_path):
    folder = save_model(tmp_path / "model")
    expected = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    adapter = WanAdapter.load(folder, text_tokens=32, dtype=stored_dtype(folder))
    parts = []
    settle(adapter.transformer, torch.bfloat16, "cpu", parts.append)
    for (name, got), (_, want) in zip(adapter.transformer.named_parameters(), expected.named_parameters(), strict=True):
        assert got.dtype == want.dtype, name
        assert torch.equal(got, want), name
    layers = list(adapter.transformer.blocks)
    assert [part for part in parts if part in layers] == layers
    assert {got.dtype for got in adapter.transformer.parameters()} == {torch.bfloat16, torch.float32}


def test_settling_leaves_a_lora_in_fp32(tmp_path):
    adapter = WanAdapter.load(save_model(tmp_path / "model"), text_tokens=32, dtype=torch.float32)
    inject_lora(adapter.transformer, 4, 8, adapter.lora_targets, seed=0)
    settle(adapter.transformer, torch.bfloat16, "cpu")
    assert {p.dtype for p in adapter.transformer.parameters() if p.requires_grad} == {torch.float32}
    assert adapter.transformer.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", sorted(ADAPTERS))
def test_a_benchmarks_layers_share_the_weights_of_one_of_their_kind(family):
    """Of seven layers, whose weights stream: no weight is without data, and they take the memory of a few."""
    cls = ADAPTERS[family]
    config = finish(compose_run({"model.family": family, "model.text_tokens": "20"})).model
    config.architecture = cls.cut(cls.tiny_config, 7)
    adapter = benchmark_adapter(config, None, torch.float32, "cpu", layers_on_cpu=True)
    weights = [weight for layer in adapter.layers() for weight in layer.parameters()]
    assert len(adapter.layers()) == 7 and not any(weight.is_meta for weight in adapter.transformer.parameters())
    assert len({weight.data_ptr() for weight in weights}) < 0.5 * len(weights)
