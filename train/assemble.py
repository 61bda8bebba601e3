"""From a run's config to its parts: model, module, trainer, callbacks and data, on one page.

`train.run` calls `assemble` and then trains. Every part is made here, and gets what it needs by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.pytorch.callbacks import Callback

from data.shards.manifest import Manifest
from data.shards.order import BatchOrder
from data.shards.stages import load_stages
from data.shards.stream import LatentStream
from radial.cli.ranks import Rank
from train.attention.recipe import AttentionRecipe
from train.attention.sequence import check_heads
from train.callbacks.average import Averaging
from train.callbacks.bad_steps import BadSteps
from train.callbacks.checkpoints import StepCheckpoints
from train.callbacks.clips import PromptClips
from train.callbacks.metrics import StepMetrics
from train.callbacks.progress import Progress
from train.callbacks.stop import StopSignals
from train.callbacks.throughput import Throughput
from train.callbacks.validation import Validation, lengths_of
from train.callbacks.watchdog import Watchdog
from train.config.global_batch import clips_in_words, micro_batches
from train.config.schema import RunConfig
from train.errors import UserError
from train.export.tools import warnings
from train.loggers.services import loggers_of, note_once
from train.lora.initial import read_initial
from train.lora.layers import inject_lora, start_from
from train.lora.scaling import factor
from train.measures.levels import validation_levels
from train.memory.apply import set_memory_policy
from train.memory.fp8 import use_fp8
from train.memory.fp8_storage import store_fp8
from train.models.base import ModelAdapter
from train.models.conditions import check_guidance
from train.models.families import family_of
from train.models.loading import load_adapter
from train.parallel.control_group import ControlGroup
from train.parallel.strategies import strategy_arguments
from train.planning import chosen_policies, resolve_precision
from train.report.held_out_losses import draw_mask
from train.shards import validation_shards
from train.step.average import WeightAverage
from train.step.clip_recipe import Recipes
from train.step.module import LengthExtensionModule
from train.step.objective import Objective
from train.step.optimizer import Optimization
from train.storage.checkpoints import FolderCheckpointIO, Place
from train.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Watch:
    """What looks after a run from before its parts are made until after its last step.

    Attributes:
        control: the ranks' words to each other.
        stop: the signals.
        watchdog: ranks that hang or are gone.
    """

    control: ControlGroup
    stop: StopSignals
    watchdog: Watchdog


def assemble(
    config: RunConfig,
    folder: RunFolder,
    shards: Manifest,
    resumed_step: int,
    watch: Watch,
    extra_callbacks: Sequence[Callback] = (),
) -> tuple[L.Trainer, LengthExtensionModule]:
    """Trainer and module; rank 0 draws the mask, notes the environment and prints what will be trained.

    Args:
        resumed_step: the optimizer step that the run goes on from.
        extra_callbacks: act in every step after its row in the logs, and before its checkpoint.

    Raises:
        UserError: weights that do not load, or processes that were not started as the config has them.
    """
    precision = resolve_precision(config.trainer.precision)
    frozen_dtype = torch.bfloat16 if precision == "bf16" and config.lora is not None else torch.float32
    loggers = loggers_of(config, folder=folder.path, resumed_step=resumed_step, rank=Rank.here().index)
    trainer = L.Trainer(
        accelerator="auto",
        devices=config.trainer.devices,
        num_nodes=config.trainer.nodes,
        **strategy_arguments(
            config.parallel,
            devices=config.trainer.nodes * config.trainer.devices,
            precision=precision,
            frozen=frozen_dtype,
            idle=_leaves_some_alone(config),
            compiled=config.trainer.compile,
        ),
        max_steps=config.trainer.steps,
        accumulate_grad_batches=micro_batches(config),
        gradient_clip_val=config.optim.clip,
        logger=loggers,
        callbacks=callbacks_of(config, folder=folder.path, watch=watch, extra=extra_callbacks),
        plugins=[FolderCheckpointIO(), *_started_by(config)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder.path,
        use_distributed_sampler=False,
    )
    # stage 3 spreads the weights over the ranks straight from their files
    spread = resumed_step < config.trainer.steps and config.parallel.strategy == "zero3"
    adapter = load_adapter(
        config.model,
        dtype=None if spread else frozen_dtype,
        seed=config.seed,
        device=trainer.strategy.root_device,
        layers_on_cpu=config.parallel.offload_weights or config.model.storage is not None,
        as_stored=config.model.storage is not None,
    )
    module = build_module(config, adapter, shards)
    if trainer.is_global_zero:
        draw_mask(module, shards, folder.path)
        note_once(config, folder.path, loggers)
        _print_run(config, folder, module, precision)
    return trainer, module


def _leaves_some_alone(config: RunConfig) -> bool:
    """Whether a step may give some of what is trained no gradient."""
    if config.lora is None:
        return family_of(config.model).idle_weights
    return config.model.expert == "both" or config.lora.targets is not None  # which may name any layer


def build_module(config: RunConfig, adapter: ModelAdapter, shards: Manifest) -> LengthExtensionModule:
    """The LightningModule of a run; puts the LoRA into the adapter's transformer.

    Raises:
        UserError: dense layers, ranks or an initial LoRA that do not fit the model.
    """
    layers, heads, _ = adapter.attention_shape
    AttentionRecipe.of(config).check_model(layers, heads)
    check_guidance(config.objective.guidance, adapter.takes_guidance)
    check_heads(config.parallel.sequence, heads)
    if config.lora is not None:
        _add_lora(config, adapter)
    if config.model.storage is not None:
        home = torch.device("cpu") if config.parallel.offload_weights else adapter.device
        store_fp8(adapter.layers(), adapter.device, home)
    if config.trainer.fp8:
        use_fp8(adapter.layers(), adapter.device)
    policies = chosen_policies(config)
    stream = set_memory_policy(adapter, config.parallel, compiled=config.trainer.compile, policies=policies)
    adapter.transformer.train()
    return LengthExtensionModule(
        adapter,
        recipes=Recipes(config),
        objective=Objective.of(config, shards.load_empty_prompt()),
        optimization=Optimization.of(config),
        seed=config.seed,
        lora=config.lora is not None,
        sequence_size=config.parallel.sequence,
        policies=policies,
        stream=stream,
        average=None if config.optim.ema is None else WeightAverage(config.optim.ema),
    )


def _add_lora(config: RunConfig, adapter: ModelAdapter) -> None:
    lora = config.lora
    assert lora is not None
    start = read_initial(lora.init, config.model, adapter) if lora.init is not None else None
    targets = lora.targets or adapter.targets(text=lora.text)
    inject_lora(adapter.transformer, lora.rank, lora.alpha, targets, config.seed, rslora=lora.rslora, dora=lora.dora)
    if start is not None:
        start_from(adapter.transformer, start, factor(lora.alpha, lora.rank, rslora=lora.rslora))
        if Rank.here().index == 0:
            print("\n".join(f"lora.init: {note}" for note in start.notes))


def callbacks_of(config: RunConfig, folder: Path, watch: Watch, extra: Sequence[Callback] = ()) -> list[Callback]:
    """The callbacks in their order: the average of weights, what measures, shows and saves, then clips, for which
    nothing waits; the watchdog comes last in every step."""
    control, stop, watchdog = watch.control, watch.stop, watch.watchdog
    throughput = Throughput()
    bad_steps = BadSteps(limit=config.trainer.max_skipped, control=control)
    validation = Validation(
        every=config.validation.every,
        shards=validation_shards(config),
        count=config.validation.clips,
        stages=load_stages(config.data.stages),
        levels=validation_levels(config) if config.validation.every else {},
        lengths=lengths_of(config.clip.frames, config.model.time),
        control=control,
        watchdog=watchdog,
        throughput=throughput,
        stop=stop,
    )
    figures = StepMetrics(
        every=config.log.every,
        norms_every=config.log.norms_every,
        throughput=throughput,
        control=control,
        more=lambda: {"skipped": float(bad_steps.skipped), **validation.row},
    )
    checkpoints = StepCheckpoints(
        folder=folder / "checkpoints",
        every=config.trainer.checkpoint_every,
        minutes=config.trainer.checkpoint_minutes,
        keep=config.trainer.keep,
        control=control,
        figures=figures,
        throughput=throughput,
    )
    clips = PromptClips(config, folder, control=control, watchdog=watchdog, throughput=throughput, stop=stop)
    measured = [Averaging(), throughput, validation, bad_steps, figures, Progress(figures)]
    return [*measured, *extra, stop, checkpoints, clips, watchdog]


def loader(config: RunConfig, shards: Manifest, trainer: L.Trainer, start: Place) -> LatentStream:
    """This rank's batches, from where the training stands to its end."""
    sequence = config.parallel.sequence  # ranks that get the same samples
    order = BatchOrder(
        shards.shapes(),
        seed=config.seed,
        global_batch=int(config.clips_at_once()),
        shuffle_window=config.data.shuffle_window,
        weights=shards.weights or None,
        taken=start.taken,
        first=0 if start.taken is None else start.position,
    )
    return LatentStream(
        shards,
        order,
        rank=trainer.global_rank // sequence,
        world=trainer.world_size // sequence,
        start_step=start.position,
        num_steps=(config.trainer.steps - start.step) * micro_batches(config),
        cache=config.data.cache,
        max_bad=config.data.max_bad,
        stages=load_stages(config.data.stages),
        workers=config.data.workers,
        pin_memory=torch.cuda.is_available(),
    )


def _started_by(config: RunConfig) -> list[ClusterEnvironment]:
    """What started the processes: srun, torchrun (which Lightning sees by itself), or nobody yet."""
    rank, wanted = Rank.here(), config.trainer.nodes * config.trainer.devices
    if rank.started_by == "srun":
        if rank.world != wanted:
            raise UserError(
                f"srun started {rank.world} tasks, the run has trainer.nodes={config.trainer.nodes} x "
                f"trainer.devices={config.trainer.devices}: one task a GPU is expected"
            )
        return [SLURMEnvironment(auto_requeue=False)]
    if rank.started_by == "torchrun":
        return []
    if config.trainer.nodes > 1:
        raise UserError(
            f"trainer.nodes is {config.trainer.nodes}, but nothing started processes on other nodes: "
            "use python -m launch slurm, or torchrun"
        )
    return [LightningEnvironment()]  # inside an allocation too: without srun there is one process


def _print_run(config: RunConfig, folder: RunFolder, module: LengthExtensionModule, precision: str) -> None:
    trained = sum(p.numel() for p in module.transformer.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.transformer.parameters())
    grid, attention = config.grid(), config.attention
    goes_on = f", going on from {folder.checkpoint.name}" if folder.checkpoint else ""
    print(f"{config.conf}: {folder.path}{goes_on}")
    print(f"  model      {config.model.family}, {total / 1e6:,.2f} M parameters, {trained / 1e6:,.2f} M trained")
    print(f"  clip       {grid.frames} latent frames x {grid.tokens_per_frame} tokens = {grid.tokens:,} tokens")
    print(f"  clips      {clips_in_words(config)}")
    print(f"  attention  {config.pattern_in_words()}, first {attention.dense_layers} layers dense, {precision}")
    if config.lora is not None and config.lora.init is not None:
        print(f"  LoRA       starts from {config.lora.init}")
    for line in warnings(config):
        print(line)
