"""The parts of a training run: loader, trainer, module and callbacks, as its config asks for them."""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.pytorch.callbacks import Callback

from data.shards.manifest import Manifest
from data.shards.order import BatchOrder
from data.shards.stages import load_stages
from data.shards.stream import LatentStream
from train.build import build_module, synthetic_shards
from train.callbacks.bad_steps import BadSteps
from train.callbacks.checkpoints import StepCheckpoints
from train.callbacks.clips import Samples
from train.callbacks.metrics import Figures
from train.callbacks.progress import Progress
from train.callbacks.stop import StopSignals
from train.callbacks.throughput import Throughput
from train.callbacks.validation import Validation, lengths_of, validation_levels
from train.callbacks.watchdog import Watchdog
from train.config.global_batch import clips_in_words, micro_batches
from train.config.schema import RunConfig
from train.errors import UserError
from train.loggers.services import loggers_of, note_once
from train.models.loading import load_adapter
from train.module import LengthExtensionModule
from train.parallel.control_group import ControlGroup
from train.parallel.strategies import trainer_plan
from train.planning import resolve_precision
from train.ranks import global_rank, slurm_tasks
from train.report.held_out import draw_mask
from train.storage.checkpoints import FolderCheckpointIO, Place
from train.storage.run_folder import RunFolder


def loader(config: RunConfig, shards: Manifest, trainer: L.Trainer, start: Place) -> LatentStream:
    """This rank's batches, from where the training stands to its end."""
    sequence = config.parallel.sequence  # ranks that get the same samples
    order = BatchOrder(
        shards.shapes(),
        seed=config.seed,
        global_batch=int(config.clips_at_once()),
        shuffle_window=config.data.shuffle_window,
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


def assemble(
    config: RunConfig,
    folder: RunFolder,
    shards: Manifest,
    resumed_step: int,
    control: ControlGroup,
    stop: StopSignals,
    watchdog: Watchdog,
) -> tuple[L.Trainer, LengthExtensionModule]:
    """Trainer and module; rank 0 draws the mask, notes the environment and says what will be trained.

    Args:
        resumed_step: the optimizer step that the run goes on from.

    Raises:
        UserError: weights that do not load, or processes that were not started as the config has them.
    """
    precision = resolve_precision(config.trainer.precision)
    frozen_dtype = torch.bfloat16 if precision == "bf16" and config.lora is not None else torch.float32
    loggers = loggers_of(config, folder.path, resumed_step, global_rank())
    trainer = L.Trainer(
        accelerator="auto",
        devices=config.trainer.devices,
        num_nodes=config.trainer.nodes,
        **trainer_plan(
            config.parallel,
            config.trainer.nodes * config.trainer.devices,
            precision,
            frozen_dtype,
            idle=config.model.expert == "both",
            compiled=config.trainer.compile,
        ),
        max_steps=config.trainer.steps,
        accumulate_grad_batches=micro_batches(config),
        gradient_clip_val=config.optim.clip,
        logger=loggers,
        callbacks=_callbacks(config, folder.path, control, stop, watchdog),
        plugins=[FolderCheckpointIO(), *_environment(config)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder.path,
        use_distributed_sampler=False,
    )
    # stage 3 spreads the weights over the ranks straight from their files
    spread = resumed_step < config.trainer.steps and config.parallel.strategy == "zero3"
    adapter = load_adapter(config.model, None if spread else frozen_dtype, config.seed, trainer.strategy.root_device)
    module = build_module(config, adapter, shards)
    if trainer.is_global_zero:
        draw_mask(module, shards, folder.path)
        note_once(config, folder.path, loggers)
        _say_hello(config, folder, module, precision)
    return trainer, module


def _callbacks(
    config: RunConfig, folder: Path, control: ControlGroup, stop: StopSignals, watchdog: Watchdog
) -> list[Callback]:
    """In their order: what measures, shows and saves, then clips, for which nothing waits; the watchdog has the last
    word of a step."""
    throughput = Throughput()
    bad = BadSteps(config.trainer.max_skipped, control)
    validation = Validation(
        config.validation.every,
        _validation_shards(config),
        config.validation.clips,
        load_stages(config.data.stages),
        validation_levels(config) if config.validation.every else {},
        lengths_of(config.grid().frames * config.model.patch[0]),
        config.seed,
        control,
        watchdog,
        throughput,
        stop,
    )
    samples = Samples(config, folder, control, watchdog, throughput, stop)

    def more() -> dict[str, float]:
        return {"skipped": float(bad.skipped), **validation.row}

    figures = Figures(config.log.every, config.log.norms_every, throughput, control, more)
    checkpoints = StepCheckpoints(
        folder / "checkpoints",
        config.trainer.checkpoint_every,
        config.trainer.checkpoint_minutes,
        config.trainer.keep,
        control,
        figures,
        throughput,
    )
    progress = Progress(figures)
    return [throughput, validation, bad, figures, progress, stop, checkpoints, samples, watchdog]


def _validation_shards(config: RunConfig) -> Manifest | None:
    if not config.validation.every:
        return None
    if config.validation.shards is not None:
        return Manifest.load(config.validation.shards)
    return held_out(config, config.validation.clips, config.clip.frames)


def held_out(config: RunConfig, clips: int, frames: int) -> Manifest:
    """Synthetic clips that training does not see."""
    # far from any training seed a person would choose
    return synthetic_shards(config, clips, frames, config.seed + 1_000_003)


def _environment(config: RunConfig) -> list[ClusterEnvironment]:
    """What started the processes: srun, torchrun (which Lightning sees by itself), or nobody yet."""
    tasks, wanted = slurm_tasks(), config.trainer.nodes * config.trainer.devices
    if tasks > 1:
        if tasks != wanted:
            raise UserError(
                f"srun started {tasks} tasks, the run has trainer.nodes={config.trainer.nodes} x "
                f"trainer.devices={config.trainer.devices}: one task a GPU is expected"
            )
        return [SLURMEnvironment(auto_requeue=False)]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return []
    if config.trainer.nodes > 1:
        raise UserError(
            f"trainer.nodes is {config.trainer.nodes}, but nothing started processes on other nodes: "
            "use python -m launch slurm, or torchrun"
        )
    return [LightningEnvironment()]  # inside an allocation too: without srun there is one process


def _say_hello(config: RunConfig, folder: RunFolder, module: LengthExtensionModule, precision: str) -> None:
    trained = sum(p.numel() for p in module.transformer.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.transformer.parameters())
    grid = config.grid()
    attention = config.attention
    goes_on = f", going on from {folder.checkpoint.name}" if folder.checkpoint else ""
    print(f"{config.conf}: {folder.path}{goes_on}")
    print(f"  model      {config.model.family}, {total / 1e6:,.2f} M parameters, {trained / 1e6:,.2f} M trained")
    print(f"  clip       {grid.frames} latent frames x {grid.tokens_per_frame} tokens = {grid.tokens:,} tokens")
    print(f"  clips      {clips_in_words(config)}")
    print(f"  attention  {attention.pattern}, first {attention.dense_layers} blocks dense, {precision}")
    if config.lora is not None and config.lora.init is not None:
        print(f"  LoRA       starts from {config.lora.init}")
