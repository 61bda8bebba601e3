"""One training run, from a validated config to a folder with everything in it."""

from __future__ import annotations

import logging
import os
import time
import warnings
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
from data.synth import synthesize
from radial import make_pattern
from train.callbacks import StepBar, StepCheckpoints, csv_log
from train.checkpoint import FolderCheckpointIO, last_checkpoint, load_state
from train.config import RunConfig
from train.errors import UserError
from train.export import export_run
from train.flow import SigmaSchedule
from train.lora import inject_lora
from train.models import ModelAdapter, family_of, load_adapter, model_folder
from train.module import LengthExtensionModule
from train.report import write_report

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


def preflight(config: RunConfig) -> None:
    """Stops a run that cannot work before anything is loaded, made or written.

    Raises:
        UserError: weights or shards are missing, or settings that do not fit together.
    """
    family_of(config.model)
    if config.model.architecture is None:
        model_folder(config.model)
    elif config.model.path is not None:
        raise UserError(f"model.path is {config.model.path}, but model.architecture asks for random weights: unset one")
    if config.data.shards is None and not config.data.synthetic_clips:
        raise UserError(
            "data.shards is not set, expected a folder of latent shards with a manifest.json "
            "(what data.writer.ShardWriter makes; README, 'Train Wan 4x on your videos')"
        )
    if config.data.shards is not None:
        _check_shapes(config, Manifest.load(config.data.shards))
    if config.report.clips and config.data.shards is not None:
        raise UserError("report.clips needs synthetic data, set report.clips=0 or leave data.shards unset")
    if config.data.synthetic_clips and (tuple(config.model.vae) != (1, 1, 1)):
        raise UserError("data.synthetic_clips are pixels, they serve a model without a VAE only (model=shapes)")


def resolve_precision(name: str) -> str:
    """``bf16`` or ``fp32``; ``auto`` is bf16 where the hardware multiplies it natively."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def training_shards(config: RunConfig) -> Manifest:
    """The manifest to train on; synthetic clips are made if the config asks for them and they are not there yet."""
    if config.data.shards is not None:
        return Manifest.load(config.data.shards)
    return synthetic_shards(config, config.data.synthetic_clips, config.seed)


def synthetic_shards(config: RunConfig, clips: int, seed: int) -> Manifest:
    """A folder of synthetic clips beside the runs, shared by all runs that need the same."""
    clip = config.clip
    name = f"{clips}-clips-{clip.frames}x{clip.height}x{clip.width}-seed-{seed}"
    folder = Path(config.runs) / "synthetic" / name
    # long sets of short clips are for machines with many cores
    workers = torch.get_num_threads() if clips >= 1024 else 0
    return synthesize(folder, clips, clip.frames, clip.height, clip.width, seed, workers=workers, progress=True)


def build_module(config: RunConfig, adapter: ModelAdapter, shards: Manifest) -> LengthExtensionModule:
    """The LightningModule of a run; injects the LoRA into the adapter's transformer."""
    layers = adapter.attention_shape[0]
    if config.attention.dense_layers > layers:
        raise UserError(f"attention.dense_layers is {config.attention.dense_layers}, the model has {layers} blocks")
    if config.lora is not None:
        inject_lora(
            adapter.transformer,
            config.lora.rank,
            config.lora.alpha,
            config.lora.targets or adapter.lora_targets,
            config.seed,
        )
    if config.model.checkpointing:
        adapter.transformer.enable_gradient_checkpointing()
    adapter.transformer.train()
    if config.trainer.compile:
        adapter.transformer.compile_repeated_blocks()
    attention, objective, optim = config.attention, config.objective, config.optim
    return LengthExtensionModule(
        adapter,
        pattern=make_pattern(attention.pattern, decay=attention.decay, rule=attention.rule),
        block=attention.block,
        dense_layers=attention.dense_layers,
        dense_sigma=attention.dense_sigma,
        backend=attention.backend,
        schedule=SigmaSchedule(objective.shift, objective.density, objective.mean, objective.std),
        caption_dropout=objective.caption_dropout,
        empty_prompt=shards.load_empty_prompt(),
        seed=config.seed,
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        weight_decay=optim.weight_decay,
        warmup=optim.warmup,
        decay=optim.decay,
        steps=config.trainer.steps,
        lora=config.lora is not None,
    )


def _loader(config: RunConfig, shards: Manifest, trainer: L.Trainer, start: int) -> DataLoader:
    world = trainer.world_size
    order = BatchOrder(
        shards.shapes(),
        seed=config.seed,
        global_batch=config.data.batch_size * world,
        shuffle_window=config.data.shuffle_window,
    )
    stream = LatentStream(
        shards,
        order,
        rank=trainer.global_rank,
        world=world,
        start_step=start,
        num_steps=config.trainer.steps * config.optim.accumulate - start,
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
    _check_shapes(config, shards)
    frozen_dtype = torch.bfloat16 if precision == "bf16" and config.lora is not None else torch.float32
    module = build_module(config, load_adapter(config.model, frozen_dtype, config.seed), shards)
    start, resumed_step = 0, 0
    if folder.checkpoint is not None:
        state = load_state(folder.checkpoint)
        start, resumed_step = state["position"], state["global_step"]
    trainer = L.Trainer(
        accelerator="auto",
        devices=config.trainer.devices,
        strategy="ddp" if config.trainer.devices > 1 else "auto",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_steps=config.trainer.steps,
        accumulate_grad_batches=config.optim.accumulate,
        gradient_clip_val=config.optim.clip,
        log_every_n_steps=config.log.every,
        logger=_loggers(config, folder, resumed_step),
        callbacks=[
            StepBar(config.log.every),
            LearningRateMonitor("step"),
            StepCheckpoints(folder.path / "checkpoints", config.trainer.checkpoint_every, config.trainer.keep),
        ],
        plugins=[FolderCheckpointIO()],
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder.path,
        use_distributed_sampler=False,
    )
    if trainer.is_global_zero:
        _say_hello(config, folder, module, precision)
    if resumed_step < config.trainer.steps:
        trainer.fit(module, _loader(config, shards, trainer, start), ckpt_path=folder.checkpoint)
    else:
        assert folder.checkpoint is not None
        module.on_load_checkpoint(FolderCheckpointIO().load_checkpoint(folder.checkpoint))
    if trainer.is_global_zero:
        export_run(folder.path)
        module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
        context = trainer.precision_plugin.forward_context
        write_report(config, module, folder.path, shards, lambda clips: _held_out(config, clips), context)
        print(f"\nEverything is in {folder.path}")


def resume(folder: Path, config: RunConfig) -> None:
    """Goes on from the newest checkpoint of a run folder."""
    train(config, RunFolder(folder, last_checkpoint(folder)))


def _held_out(config: RunConfig, clips: int) -> Manifest:
    # far from any training seed a person would choose
    return synthetic_shards(config, clips, config.seed + 1_000_003)


def _check_shapes(config: RunConfig, shards: Manifest) -> None:
    frames = (config.clip.frames - 1) // config.model.vae[0] + 1
    cells = (frames, config.clip.height // config.model.vae[1], config.clip.width // config.model.vae[2])
    found = {tuple(info.shape[1:]) for info in shards.samples}
    if cells not in found:
        raise UserError(
            f"{shards.folder} has latents of (frames, height, width) {sorted(found)}, but clip is "
            f"{cells}: set clip.frames, clip.height, clip.width or data.shards"
        )
    if len(found) > 1:
        raise UserError(
            f"{shards.folder} mixes latents of (frames, height, width) {sorted(found)}: train on one shape for now"
        )


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
    ):
        warnings.filterwarnings("ignore", message=text)
