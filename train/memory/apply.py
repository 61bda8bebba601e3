"""Applies a run's memory policy to a model: what its layers keep, and whether they are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from train.config.schema import ParallelConfig
from train.memory.compiler import compile_call, compile_layers
from train.memory.layer_policies import LayerPolicies, configured
from train.memory.layer_runners import call_layer, chunk_tokens, layer_runner, mixed_runner
from train.memory.offload import Offload
from train.memory.weight_stream import WeightStream, stream_layer
from train.models.base import ModelAdapter
from train.models.layer_calls import forward_alone
from train.parallel.zero import call_gathered, gather_whole


def set_memory_policy(
    adapter: ModelAdapter, parallel: ParallelConfig, *, compiled: bool, policies: LayerPolicies | None = None
) -> WeightStream | None:
    """What the model's layers keep for the backward, and whether they are compiled; with ZeRO 3, how it gathers them.

    With ``parallel.offload_weights`` also what has the layers' frozen weights come, which is returned.

    Args:
        policies: of `train.planning.chosen_policies`; None takes ``parallel.activations`` for all layers.
    """
    if parallel.ffn_chunk is not None:
        for feed_forward in adapter.feed_forwards():
            chunk_tokens(feed_forward, parallel.ffn_chunk)
    layers = adapter.layers()
    policies = policies or configured(parallel, adapter.attention_shape[0])
    gathered = compiled and parallel.strategy == "zero3"
    streamed = parallel.offload_weights
    if set(policies.names) != {"none"} or gathered or streamed:
        offload = Offload(limit=policies.offload) if policies.offload else None
        call = forward_alone if gathered or streamed else call_layer
        runners = {name: layer_runner(name, offload, compiled=compiled, call=call) for name in set(policies.names)}
        names = policies.names * len(adapter.transformers)  # of each expert, where there are two
        runner_of = dict(zip(layers, (runners[name] for name in names), strict=True))
        if gathered:
            gather_whole(runner_of)
        if streamed:
            alone = compile_call(forward_alone) if compiled and set(policies.names) == {"none"} else forward_alone
            each = len(layers) // len(adapter.transformers)
            chains = [layers[start : start + each] for start in range(0, len(layers), each)]
            stream = WeightStream(chains, adapter.device)
            for layer in layers:
                stream_layer(layer, stream, runner_of[layer], alone)
        for transformer in adapter.transformers:
            transformer.enable_gradient_checkpointing(
                call_gathered if gathered else call_layer if streamed else mixed_runner(runner_of)
            )
        return stream if streamed else None
    if compiled:
        compile_layers(layers)
    return None


def stream_models(adapters: Sequence[ModelAdapter], device: torch.device, *, compiled: bool) -> None:
    """Moves models that only generate to a device, all but their layers' weights, which come from the CPU one by one.

    Every rank must call it.
    """
    stream = WeightStream([adapter.layers() for adapter in adapters], device)
    alone = compile_call(forward_alone) if compiled else forward_alone
    stream.place()
    for adapter in adapters:
        adapter.transformer.to(device)
        for layer in adapter.layers():
            stream_layer(layer, stream, forward_alone, alone)
