"""From a validated config to what training works on: its precision, its shards, its module."""

from __future__ import annotations

from pathlib import Path

import torch

from data.shards.manifest import Manifest
from data.synth.clips import synthesize
from train.attention.levels import clip_levels, levels_by_size
from train.config.global_batch import micro_batches
from train.config.schema import ParallelConfig, RunConfig
from train.errors import UserError
from train.lora.initial import read_initial
from train.lora.layers import inject_lora, start_from
from train.memory.activations import block_runner, call_block, chunk_tokens, mixed_runner
from train.memory.compiler import compile_blocks
from train.memory.fp8 import use_fp8
from train.memory.offload import Offload
from train.models.base import ModelAdapter
from train.module import LengthExtensionModule
from train.parallel.zero import call_gathered, forward_alone, gather_whole
from train.planning import Budget, this_machine
from train.planning.policies import BlockPolicies, configured
from train.preflight import check_heads
from train.ranks import global_rank


def training_shards(config: RunConfig) -> Manifest:
    """The manifest to train on; synthetic clips are made if the config asks for them and they are not there yet."""
    if config.data.shards is not None:
        return Manifest.load(config.data.shards)
    return synthetic_shards(config, config.data.synthetic_clips, config.clip.frames, config.seed)


def synthetic_shards(config: RunConfig, clips: int, frames: int, seed: int) -> Manifest:
    """A folder of synthetic clips beside the runs, shared by all runs that need the same."""
    height, width = config.clip.height, config.clip.width
    name = f"{clips}-clips-{frames}x{height}x{width}-seed-{seed}"
    folder = Path(config.runs) / "synthetic" / name
    # long sets of short clips are for machines with many cores
    workers = torch.get_num_threads() if clips >= 1024 else 0
    return synthesize(folder, clips, frames, height, width, seed, workers=workers, progress=True)


def chosen_policies(config: RunConfig, layers: int | None = None) -> BlockPolicies | None:
    """With ``parallel.activations=auto``, the policies that fit this machine's memory; None with any other.

    Args:
        layers: another number of blocks than the model's.

    Raises:
        UserError: the model has no dimensions to plan with.
    """
    if config.parallel.activations != "auto":
        return None
    budget = Budget.of(config, this_machine(config.trainer.devices, config.trainer.nodes), layers)
    if budget is None:
        raise UserError("parallel.activations is auto, which needs a local model.path; set none, full or selective")
    return budget.policies


def set_memory_policy(
    adapter: ModelAdapter, parallel: ParallelConfig, *, compiled: bool, policies: BlockPolicies | None = None
) -> None:
    """What the model's blocks keep for the backward, and whether they are compiled; with ZeRO 3, how it gathers them.

    Args:
        policies: of `chosen_policies`; None takes ``parallel.activations`` for all blocks.
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


def build_module(config: RunConfig, adapter: ModelAdapter, shards: Manifest) -> LengthExtensionModule:
    """The LightningModule of a run; injects the LoRA into the adapter's transformer."""
    layers, heads, _ = adapter.attention_shape
    if config.attention.dense_layers > layers:
        raise UserError(f"attention.dense_layers is {config.attention.dense_layers}, the model has {layers} blocks")
    check_heads(config.parallel.sequence, heads)
    if config.lora is not None:
        start = read_initial(config.lora.init, config.model, adapter) if config.lora.init is not None else None
        inject_lora(
            adapter.transformer,
            config.lora.rank,
            config.lora.alpha,
            config.lora.targets or adapter.targets(text=config.lora.text),
            config.seed,
        )
        if start is not None:
            start_from(adapter.transformer, start, config.lora.alpha / config.lora.rank)
            if global_rank() == 0:
                print("\n".join(f"lora.init: {note}" for note in start.notes))
    if config.trainer.fp8:
        use_fp8(adapter.blocks())
    policies = chosen_policies(config)
    set_memory_policy(adapter, config.parallel, compiled=config.trainer.compile, policies=policies)
    adapter.transformer.train()
    attention, objective, optim = config.attention, config.objective, config.optim
    return LengthExtensionModule(
        adapter,
        pattern=config.pattern(),
        block=attention.block,
        dense_layers=attention.dense_layers,
        backend=attention.backend,
        schedule=clip_levels(config).schedule,
        levels=levels_by_size(config),
        caption_dropout=config.caption_dropout(),
        first_frame=objective.first_frame,
        empty_prompt=shards.load_empty_prompt(),
        guidance=objective.guidance,
        seed=config.seed,
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        weight_decay=optim.weight_decay,
        warmup=optim.warmup,
        decay=optim.decay,
        steps=config.trainer.steps,
        accumulate=micro_batches(config),
        lora=config.lora is not None,
        sequence_size=config.parallel.sequence,
        policies=policies,
    )
