"""One training run, from a validated config to a folder with everything in it."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from data.manifest import Manifest
from data.order import BatchOrder
from data.stream import LatentStream
from train.build import build_module, resolve_precision, synthetic_shards, training_shards
from train.callbacks import StepBar, StepCheckpoints, csv_log
from train.checkpoint import FolderCheckpointIO, last_checkpoint, load_state
from train.config import RunConfig
from train.errors import UserError
from train.export.run import export_run
from train.models import load_adapter
from train.module import LengthExtensionModule
from train.preflight import check_shapes
from train.report import write_report
from train.strategy import trainer_plan
from train.throughput import Throughput

CONFIG = "config.yaml"
_SHARED = "RADIAL_RUN_FOLDER"  # how Lightning's launcher's other processes learn the folder


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, and the checkpoint it goes on from."""

    path: Path
    checkpoint: Path | None = None

    @classmethod
    def create(cls, config: RunConfig) -> RunFolder:
        """A new ``<runs>/<conf>/<time>`` with the run's config in it; processes that the first one starts share it."""
        if _SHARED in os.environ and "LOCAL_RANK" in os.environ:
            return cls(Path(os.environ[_SHARED]))
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        path = Path(config.runs) / config.conf / stamp
        for attempt in range(1, 100):
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                path = path.with_name(f"{stamp}_{attempt}")
            except OSError as error:
                raise UserError(
                    f"runs: cannot create {path} ({error.strerror}); set runs=<a writable folder>"
                ) from error
        OmegaConf.save(OmegaConf.structured(config), path / CONFIG)
        if config.trainer.devices > 1:
            os.environ[_SHARED] = str(path)
        return cls(path)


def _loader(config: RunConfig, shards: Manifest, trainer: L.Trainer, start: int) -> DataLoader:
    sequence = config.parallel.sequence  # ranks that get the same samples
    order = BatchOrder(
        shards.shapes(),
        seed=config.seed,
        global_batch=int(config.clips_at_once()),
        shuffle_window=config.data.shuffle_window,
    )
    stream = LatentStream(
        shards,
        order,
        rank=trainer.global_rank // sequence,
        world=trainer.world_size // sequence,
        start_step=start,
        num_steps=config.trainer.steps * config.optim.accumulate - start,
        cache=config.data.cache,
        max_bad=config.data.max_bad,
    )
    workers = config.data.workers
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=2 if workers else None,
    )


def _loggers(config: RunConfig, folder: RunFolder, resumed_step: int) -> list[Logger]:
    rank = int(os.environ.get("LOCAL_RANK", 0))
    loggers: list[Logger] = [csv_log(folder.path, resumed_step, rank)]
    if config.log.wandb != "disabled":
        loggers.append(
            WandbLogger(
                project=config.log.project,
                name=f"{config.conf}/{folder.path.name}",
                save_dir=folder.path,
                mode=config.log.wandb,
            )
        )
    return loggers


def train(config: RunConfig, folder: RunFolder) -> None:
    """Trains (or goes on from ``folder.checkpoint``), then exports, draws and reports into the run's folder."""
    _quiet()
    L.seed_everything(config.seed, workers=True, verbose=False)
    precision = resolve_precision(config.trainer.precision)
    shards = training_shards(config)
    check_shapes(config, shards)
    frozen_dtype = torch.bfloat16 if precision == "bf16" and config.lora is not None else torch.float32
    start, resumed_step = 0, 0
    if folder.checkpoint is not None:
        state = load_state(folder.checkpoint)
        start, resumed_step = state["position"], state["global_step"]
    trainer = L.Trainer(
        accelerator="auto",
        devices=config.trainer.devices,
        **trainer_plan(config.parallel, config.trainer.devices, precision, frozen_dtype),
        max_steps=config.trainer.steps,
        accumulate_grad_batches=config.optim.accumulate,
        gradient_clip_val=config.optim.clip,
        log_every_n_steps=config.log.every,
        logger=_loggers(config, folder, resumed_step),
        callbacks=[
            StepBar(config.log.every),
            LearningRateMonitor("step"),
            Throughput(config.log.every),
            StepCheckpoints(folder.path / "checkpoints", config.trainer.checkpoint_every, config.trainer.keep),
        ],
        plugins=[FolderCheckpointIO()],
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder.path,
        use_distributed_sampler=False,
    )
    unfinished = resumed_step < config.trainer.steps
    # stage 3 spreads the weights over the ranks straight from their files
    settled_dtype = None if unfinished and config.parallel.strategy == "zero3" else frozen_dtype
    adapter = load_adapter(config.model, settled_dtype, config.seed, trainer.strategy.root_device)
    module = build_module(config, adapter, shards)
    if trainer.is_global_zero:
        _say_hello(config, folder, module, precision)
    if unfinished:
        trainer.fit(module, _loader(config, shards, trainer, start), ckpt_path=folder.checkpoint)
    else:
        assert folder.checkpoint is not None
        module.on_load_checkpoint(FolderCheckpointIO().load_checkpoint(folder.checkpoint))
    if trainer.is_global_zero:
        export_run(folder.path)
    # all ranks of the first group share the report's clips; under stage 3 all ranks hold a part of every weight
    if trainer.global_rank < config.parallel.sequence or config.parallel.strategy == "zero3":
        context = trainer.precision_plugin.forward_context
        with _report_folder(folder.path, trainer.global_rank) as out:
            write_report(config, module, out, shards, functools.partial(_held_out, config), context)
    if trainer.is_global_zero:
        print(f"\nEverything is in {folder.path}")


def resume(folder: Path, config: RunConfig) -> None:
    """Goes on from the newest checkpoint of a run folder."""
    train(config, RunFolder(folder, last_checkpoint(folder)))


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


def _quiet() -> None:
    """Keeps the libraries' remarks that a user can do nothing about off the screen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*Mismatch dtype between input and weight.*",
        ".*IterableDataset.*",
        ".*`_get_vscode.*",
        ".*exists and is not empty.*",
        r".*`torch\.distributed\..*is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=text)
