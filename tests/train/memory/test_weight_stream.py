"""Frozen weights that stream: the losses and gradients of resident ones, to the last digit."""

import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import weight_streams
from tests.helpers.family_ranks import Step
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import run_config
from train.config.compose import compose_run, finish
from train.config.schema import ParallelConfig
from train.errors import UserError
from train.memory.weight_stream import WeightStream
from train.models.families import ADAPTERS
from train.run import train
from train.storage.run_folder import RunFolder

FAMILIES = sorted(ADAPTERS)
TOKENS = (3, 4, 5)
POLICIES = {
    "none": ParallelConfig(),
    "none, in chunks": ParallelConfig(ffn_chunk=16),
    "full": ParallelConfig(activations="full", ffn_chunk=16),
    "selective": ParallelConfig(activations="selective"),
    "offload": ParallelConfig(activations="selective", offload_activations=True),
}


def steps(family, parallel, *, compiled=False, count=2):
    """The losses and LoRA gradients of some steps, which change the LoRA, and losses without gradients between them."""
    step = Step(family, TOKENS, "released", 2, parallel, compiled=compiled)
    trained = [p for p in step.transformer.parameters() if p.requires_grad]
    found = []
    for _ in range(count):
        with torch.no_grad():
            found.append(step())
        loss = step()
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in trained)]
        with torch.no_grad():
            for parameter in trained:
                parameter -= parameter.grad
        step.zero_grad()
    return found


def same(parallel, family, **settings):
    streamed = steps(family, dataclasses.replace(parallel, offload_weights=True), **settings)
    resident = steps(family, parallel, **settings)
    assert len(streamed) == len(resident) > 10
    assert all(torch.equal(a, b) for a, b in zip(streamed, resident, strict=True))
    assert all(x.abs().max() > 0 for x in resident)


SLOW = [pytest.param(family, policy, marks=pytest.mark.slow) for family in FAMILIES if family != "wan"
        for policy in ("full", "selective")]  # fmt: skip


@pytest.mark.parametrize(("family", "policy"), [*(("wan", policy) for policy in POLICIES), *SLOW])
def test_losses_and_gradients_are_those_of_resident_weights(family, policy):
    same(POLICIES[policy], family)


@pytest.mark.parametrize(
    ("family", "policy"),
    [("wan", "full"), ("hunyuan", "full"), *(pytest.param(f, "selective", marks=pytest.mark.slow) for f in FAMILIES)],
)
def test_no_layer_computes_with_a_slot_that_is_not_its_own(monkeypatch, family, policy):
    """Whatever is in the ring beside the layer that has arrived turns to NaN at once."""
    arrive = WeightStream.arrive

    def only(stream, layer):
        arrive(stream, layer)
        own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        for slot, weights in enumerate(stream.ring):
            if weights.untyped_storage().data_ptr() not in own:
                weights.fill_(255)  # NaN in every format
                stream.holds[slot] = None

    monkeypatch.setattr(WeightStream, "arrive", only)
    same(POLICIES[policy], family)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "policy"), [("wan", "selective"), ("hunyuan", "full"), ("mochi", "offload")])
def test_compiled_layers_stream_too(family, policy):
    torch._dynamo.reset()
    same(POLICIES[policy], family, compiled=True, count=1)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("slots", [2, 3])
def test_each_copy_is_made_one_layer_ahead_and_once_a_pass(monkeypatch, slots):
    copies = []
    fetch = WeightStream.fetch

    def noted(stream, index):
        if stream.holds[index % stream.slots] != index:
            copies.append(index)
        fetch(stream, index)

    monkeypatch.setattr(WeightStream, "fetch", noted)
    layers = [torch.nn.Linear(8, 8, bias=False).requires_grad_(False) for _ in range(6)]
    weights = [layer.weight.clone() for layer in layers]
    stream = WeightStream([layers], torch.device("cpu"), slots)
    for _ in range(2):
        asked = []
        for index in [*range(6), *reversed(range(6))]:
            stream.arrive(layers[index])
            assert torch.equal(layers[index].weight, weights[index])
            asked.append(len(copies))
        ahead = slots - 1
        assert asked[:6] == [min(6, index + 1 + ahead) for index in range(6)]  # forward: so many ahead
        assert asked[6:] == [min(12 - slots, 6 + max(0, n + 1 + ahead - slots)) for n in range(6)]
        assert copies == [*range(6), *reversed(range(6 - slots))]
        copies[:] = range(slots)  # the first layers, which the backward ended with, are there for the next step
    assert stream.ring_bytes == slots * 256 and stream.slab_bytes == 6 * 256


def test_two_transformers_keep_to_their_own_layers():
    chains = [[torch.nn.Linear(4, 4).requires_grad_(False) for _ in range(3)] for _ in range(2)]
    weights = {layer: layer.weight.clone() for layer in itertools.chain(*chains)}
    stream = WeightStream(chains, torch.device("cpu"))
    for chain in (chains[1], chains[0], chains[1]):
        for layer in [*chain, *reversed(chain)]:
            stream.arrive(layer)
            assert torch.equal(layer.weight, weights[layer])


def test_what_is_trained_stays_and_what_streams_takes_a_ring():
    step = Step("wan", TOKENS, "released", 1, ParallelConfig(offload_weights=True), compiled=False)
    step()
    stores = {}
    for name, parameter in step.transformer.named_parameters():
        stores.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    rings = [names for names in stores.values() if len(names) > 1]
    assert len(rings) == 2
    assert all(".lora_" not in name and name.startswith("blocks.") for names in rings for name in names)
    frozen = [n for n, p in step.transformer.named_parameters() if n.startswith("blocks.") and not p.requires_grad]
    assert sorted(itertools.chain(*rings)) == sorted(frozen)


@pytest.mark.slow
@pytest.mark.parametrize("opened", [True, False])
def test_ranks_of_a_machine_share_one_copy(opened):
    found = run_ranks(2, weight_streams.shared, opened)
    assert [rank["same"] for rank in found] == [True, True]
    assert [rank["shares"] for rank in found] == [opened, opened]
    assert ["each keeps its own copy" in rank["said"] for rank in found] == [not opened, False]


@pytest.mark.slow
def test_groups_that_share_a_clip_stream():
    (one, *_), (two, *_) = run_ranks(1, weight_streams.step, 1, False), run_ranks(2, weight_streams.step, 2, True)
    for name, gradient in one.items():
        assert abs(two[name] - gradient).max() < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"model__storage": "fp8", "parallel__activations": "full"}])
def test_a_whole_run_ends_with_the_same_weights_and_export(tmp_path, changes):
    ends = []
    for streams in (True, False):
        config = run_config(tmp_path, runs=tmp_path / str(streams), parallel__offload_weights=streams, **changes)
        folder = RunFolder.create(config)
        train(config, folder)
        ends.append(
            load_file(folder.path / "checkpoints" / "step-000004" / "weights.safetensors")
            | load_file(folder.path / "export" / "peft" / "adapter_model.safetensors")
        )
    streamed, resident = ends
    assert streamed.keys() == resident.keys()
    assert all(torch.equal(streamed[name], resident[name]) for name in resident)


@pytest.mark.parametrize(
    ("words", "found"), [({"lora": "null"}, "lora=null, which trains them"), ({"parallel": "zero3"}, "parallel=zero3")]
)
def test_weights_that_cannot_stream_are_refused(words, found):
    given = {"conf": "wan_4x", "parallel.offload_weights": "true", "optim.accumulate": "1", **words}
    with pytest.raises(UserError, match=f"parallel.offload_weights is true with {found}"):
        finish(compose_run(given))
