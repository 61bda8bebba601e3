"""One training run, from a validated config to a folder with everything in it."""

from __future__ import annotations

import errno
import functools
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from safetensors import SafetensorError

from data.manifest import Manifest
from data.order import BatchOrder
from data.stream import LatentStream
from train.build import build_module, resolve_precision, synthetic_shards, training_shards
from train.callbacks import StepCheckpoints
from train.checkpoint import FolderCheckpointIO, last_good_checkpoint, load_state, remove_leftovers
from train.cli import MISTAKES
from train.config import RunConfig
from train.control import ControlGroup
from train.errors import UserError
from train.export.run import export_run
from train.figures import Figures
from train.folder import RunFolder, get_state, gpus_given, held, set_state
from train.guard import BadSteps
from train.held_out import draw_mask, write_report
from train.loggers import loggers_of, note_once, wandb_closed
from train.models import load_adapter, sigma_range
from train.module import LengthExtensionModule
from train.preflight import check_shapes, out_of_memory
from train.ranks import global_rank, slurm_tasks
from train.report import write_page
from train.samples import Samples
from train.stop import EXIT_CODES, WORDS, StopSignals
from train.strategy import trainer_plan
from train.terminal import Progress, collected
from train.throughput import Throughput
from train.validation import Validation, lengths_of
from train.watchdog import Watchdog, patience


def _loader(config: RunConfig, shards: Manifest, trainer: L.Trainer, start: int) -> LatentStream:
    sequence = config.parallel.sequence  # ranks that get the same samples
    order = BatchOrder(
        shards.shapes(),
        seed=config.seed,
        global_batch=int(config.clips_at_once()),
        shuffle_window=config.data.shuffle_window,
    )
    return LatentStream(
        shards,
        order,
        rank=trainer.global_rank // sequence,
        world=trainer.world_size // sequence,
        start_step=start,
        num_steps=config.trainer.steps * config.optim.accumulate - start,
        cache=config.data.cache,
        max_bad=config.data.max_bad,
        workers=config.data.workers,
        pin_memory=torch.cuda.is_available(),
    )


def train(config: RunConfig, folder: RunFolder) -> None:
    """Trains (or goes on from ``folder.checkpoint``), then exports, draws and reports into the run's folder.

    Raises:
        UserError: something that the user can mend, or another process runs in the folder.
        SystemExit: the run was asked to stop (`train.stop`) and has saved a checkpoint; or, on a rank other than 0,
            something that the user can mend, which is said once.
    """
    rank = global_rank()
    with held(folder.path) if rank == 0 else nullcontext(), collected(folder.path, rank), wandb_closed():
        if rank == 0:
            set_state(folder.path, "running")
        try:
            with _room(folder.path):
                asked = _train(config, folder, rank)
        except MISTAKES as error:
            if rank and _has_failed(folder.path, rank, str(error)):
                raise SystemExit(2) from None
            set_state(folder.path, "failed", str(error))
            if rank:
                print(f"error: rank {rank}: {error}".replace(f"rank {rank}: rank", "rank"), file=sys.stderr, flush=True)
                raise SystemExit(2) from None
            raise
        if rank:
            return
        if asked:
            why = f"python -m train resume={folder.path} goes on"
            set_state(folder.path, WORDS[asked], why)
            print(f"\nstopped, with a checkpoint; {why}")
            raise SystemExit(EXIT_CODES[asked])
        set_state(folder.path, "done")


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """A full disk in words, wherever it is met beside the checkpoints and the logs, which bear it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = (
            error.errno in (errno.ENOSPC, errno.EDQUOT) if isinstance(error, OSError) else "os error 28" in str(error)
        )
        if not full:
            raise
        raise UserError(
            f"the disk is full ({error}): make room, then python -m train resume={folder} goes on"
        ) from error


def _has_failed(folder: Path, rank: int, why: str = "") -> bool:
    """Whether a lower rank has said, for this reason if it is given, that the run has failed; waits for it."""
    time.sleep(1 + 0.1 * min(rank, 20))
    word, said = get_state(folder)
    return word == "failed" and why.strip() in ("", said)


def _train(config: RunConfig, folder: RunFolder, rank: int) -> int:
    """Returns what a signal asked for, 0 when the run is finished."""
    if gpus_given(folder.path) and not torch.cuda.is_available():
        raise UserError(
            f"SLURM gave this job {gpus_given(folder.path)} GPUs a node, but torch sees none on "
            f"{socket.gethostname()}: python -m launch doctor there says why, sbatch's --exclude leaves the node out"
        )
    control = ControlGroup()
    stop = StopSignals(folder.path, rank, control)
    with stop.listening():
        L.seed_everything(config.seed, workers=True, verbose=False)
        shards = training_shards(config)
        check_shapes(config, shards)
        start, resumed_step = 0, 0
        if folder.checkpoint is not None:
            state = load_state(folder.checkpoint)
            start, resumed_step = state["position"], state["global_step"]
        unfinished = resumed_step < config.trainer.steps
        watchdog = Watchdog(folder.path, patience(config), control)
        trainer, module = _assemble(config, folder, shards, resumed_step, control, stop, watchdog)
        if unfinished:
            loader = _loader(config, shards, trainer, start)
            with _told(config, folder.path, watchdog, rank):
                trainer.fit(module, loader, ckpt_path=folder.checkpoint)
        else:
            assert folder.checkpoint is not None
            module.on_load_checkpoint(FolderCheckpointIO().load_checkpoint(folder.checkpoint))
        if not stop.agreed:
            _finish(config, folder.path, trainer, module, shards)
    return stop.agreed


def _assemble(
    config: RunConfig,
    folder: RunFolder,
    shards: Manifest,
    resumed_step: int,
    control: ControlGroup,
    stop: StopSignals,
    watchdog: Watchdog,
) -> tuple[L.Trainer, LengthExtensionModule]:
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
        ),
        max_steps=config.trainer.steps,
        accumulate_grad_batches=config.optim.accumulate,
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
    """In their order: what measures, what saves and what shows; the watchdog has the last word of a step."""
    throughput = Throughput()
    bad = BadSteps(config.trainer.max_skipped, control)
    low, high = sigma_range(config.model)
    validation = Validation(
        config.validation.every,
        _validation_shards(config),
        config.validation.clips,
        [sigma for sigma in config.validation.sigmas if low <= sigma < high],
        lengths_of(config.grid().frames * config.model.patch[0]),
        config.seed,
        control,
        watchdog,
        throughput,
    )

    samples = Samples(config, folder, control, watchdog, throughput)

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
    )
    progress = Progress(figures)
    return [throughput, validation, samples, bad, figures, progress, stop, checkpoints, watchdog]


def _validation_shards(config: RunConfig) -> Manifest | None:
    if not config.validation.every:
        return None
    if config.validation.shards is not None:
        return Manifest.load(config.validation.shards)
    return _held_out(config, config.validation.clips, config.clip.frames)


@contextmanager
def _told(config: RunConfig, folder: Path, watchdog: Watchdog, rank: int) -> Iterator[None]:
    """Says in words what ends a training from outside of it: lost ranks, memory that is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if rank and _has_failed(folder, rank):
            raise SystemExit(2) from None
        set_state(folder, "failed", f"rank {rank}: out of memory")  # finding remedies takes seconds
        raise UserError(out_of_memory(config, error, rank)) from error
    except RuntimeError as error:
        watchdog.explain(error)
        raise


def _finish(
    config: RunConfig, folder: Path, trainer: L.Trainer, module: LengthExtensionModule, shards: Manifest
) -> None:
    """The export, and what the run shows on held-out clips."""
    if trainer.is_global_zero:
        export_run(folder)
    # all ranks of the first group share the report's clips; under stage 3 all ranks hold a part of every weight
    if trainer.global_rank < config.parallel.sequence or config.parallel.strategy == "zero3":
        context = trainer.precision_plugin.forward_context
        with _report_folder(folder, trainer.global_rank) as out:
            write_report(config, module, out, shards, functools.partial(_held_out, config), context)
    if trainer.is_global_zero:
        write_page(folder)
        print(f"\nEverything is in {folder}")


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


def resume(folder: Path, config: RunConfig) -> None:
    """Goes on from the newest checkpoint of a run folder that can be read; at the beginning where there is none yet."""
    if global_rank() == 0:
        with held(folder):
            remove_leftovers(folder / "checkpoints")
    checkpoint, damaged = last_good_checkpoint(folder)
    if damaged and global_rank() == 0:
        assert checkpoint is not None
        print(f"warning: {'; '.join(damaged)}: going on from {checkpoint.name}", flush=True)
    train(config, RunFolder(folder, checkpoint))


@contextmanager
def _report_folder(folder: Path, rank: int) -> Iterator[Path]:
    """Where a rank's report goes: rank 0's to the run's folder; another rank computes its part and says nothing."""
    if rank == 0:
        yield folder
        return
    with (
        tempfile.TemporaryDirectory() as nowhere,
        Path(os.devnull).open("w") as silence,
        redirect_stdout(silence),
        redirect_stderr(silence),
    ):
        yield Path(nowhere)


def _held_out(config: RunConfig, clips: int, frames: int) -> Manifest:
    # far from any training seed a person would choose
    return synthetic_shards(config, clips, frames, config.seed + 1_000_003)


def _say_hello(config: RunConfig, folder: RunFolder, module: LengthExtensionModule, precision: str) -> None:
    trained = sum(p.numel() for p in module.transformer.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.transformer.parameters())
    grid = config.grid()
    attention = config.attention
    goes_on = f", going on from {folder.checkpoint.name}" if folder.checkpoint else ""
    print(f"{config.conf}: {folder.path}{goes_on}")
    print(f"  model      {config.model.family}, {total / 1e6:,.2f} M parameters, {trained / 1e6:,.2f} M trained")
    print(f"  clip       {grid.frames} latent frames x {grid.tokens_per_frame} tokens = {grid.tokens:,} tokens")
    print(f"  attention  {attention.pattern}, first {attention.dense_layers} blocks dense, {precision}")
    if config.lora is not None and config.lora.init is not None:
        print(f"  LoRA       starts from {config.lora.init}")
