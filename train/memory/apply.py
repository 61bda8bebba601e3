"""Applies a run's memory policy to a model: what its blocks keep, and whether they are compiled."""

from __future__ import annotations

from train.config.schema import ParallelConfig
from train.memory.block_policies import BlockPolicies, configured
from train.memory.block_runners import block_runner, call_block, chunk_tokens, mixed_runner
from train.memory.compiler import compile_blocks
from train.memory.offload import Offload
from train.models.base import ModelAdapter
from train.parallel.zero import call_gathered, forward_alone, gather_whole


def set_memory_policy(
    adapter: ModelAdapter, parallel: ParallelConfig, *, compiled: bool, policies: BlockPolicies | None = None
) -> None:
    """What the model's blocks keep for the backward, and whether they are compiled; with ZeRO 3, how it gathers them.

    Args:
        policies: of `train.planning.chosen_policies`; None takes ``parallel.activations`` for all blocks.
    """
    if parallel.ffn_chunk is not None:
        for layer in adapter.feed_forwards():
            chunk_tokens(layer, parallel.ffn_chunk)
    blocks = adapter.blocks()
    policies = policies or configured(parallel, adapter.attention_shape[0])
    gathered = compiled and parallel.strategy == "zero3"
    if set(policies.names) != {"none"} or gathered:
        offload = Offload(limit=policies.offload) if policies.offload else None
        call = forward_alone if gathered else call_block
        runners = {name: block_runner(name, offload, compiled=compiled, call=call) for name in set(policies.names)}
        names = policies.names * len(adapter.transformers)  # of each expert, where there are two
        runner_of = dict(zip(blocks, (runners[name] for name in names), strict=True))
        if gathered:
            gather_whole(runner_of)
        for transformer in adapter.transformers:
            transformer.enable_gradient_checkpointing(call_gathered if gathered else mixed_runner(runner_of))
    elif compiled:
        compile_blocks(blocks)
