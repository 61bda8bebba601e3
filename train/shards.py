"""Which shards a run trains on, and which it is validated and measured on."""

from __future__ import annotations

from pathlib import Path

import torch

from data.shards.manifest import Manifest
from data.synth.clips import synthesize
from train.config.schema import RunConfig

_HELD_OUT = 1_000_003  # added to the seed: far from any that a person would choose


def training_shards(config: RunConfig) -> Manifest:
    """The manifest to train on; synthetic clips are made if the config asks for them and they are not there yet."""
    if config.data.shards is not None:
        return Manifest.load(config.data.shards)
    return synthetic_shards(config, config.data.synthetic_clips, config.clip.frames, config.seed)


def validation_shards(config: RunConfig) -> Manifest | None:
    """Held-out clips to validate on while training; None where the run is not validated."""
    if not config.validation.every:
        return None
    if config.validation.shards is not None:
        return Manifest.load(config.validation.shards)
    return held_out(config, config.validation.clips, config.clip.frames)


def held_out(config: RunConfig, clips: int, frames: int) -> Manifest:
    """Synthetic clips that training does not see."""
    return synthetic_shards(config, clips, frames, config.seed + _HELD_OUT)


def synthetic_shards(config: RunConfig, clips: int, frames: int, seed: int) -> Manifest:
    """A folder of synthetic clips beside the runs, shared by all runs that need the same."""
    height, width, scenes = config.clip.height, config.clip.width, config.data.synthetic_scenes
    name = f"{clips}-clips-{frames}x{height}x{width}-seed-{seed}"
    if scenes != "sunrise":
        name = f"{scenes}-{name}"
    folder = Path(config.runs) / "synthetic" / name
    # long sets of short clips are for machines with many cores
    workers = torch.get_num_threads() if clips >= 1024 else 0
    return synthesize(folder, clips, frames, height, width, seed, workers=workers, progress=True, scenes=scenes)
