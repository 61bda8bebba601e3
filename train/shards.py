"""Which shards a run trains on, and which it is validated and measured on.

`data.shards` may be several folders (`data.shards.views.joined`), whose longer clips are cut to `data.frames`, and of
whose videos `data.holdout` takes some for validation.
"""

from __future__ import annotations

from pathlib import Path

import torch

from data.encoders import check_cut
from data.shards.manifest import Manifest
from data.shards.origins import held_out as split_by_video
from data.shards.views import cut, joined, only
from data.synth.clips import synthesize
from train.config.schema import RunConfig
from train.errors import UserError

_HELD_OUT = 1_000_003  # added to the seed: far from any that a person would choose


def training_shards(config: RunConfig) -> Manifest:
    """The manifest to train on; synthetic clips are made if the config asks for them and they are not there yet.

    Raises:
        DataError: folders are no shards, do not go together, or do not tell which video their samples are from.
    """
    if config.data.places:
        shards, held = _given_shards(config)
        return only(shards, set(range(len(shards.samples))) - held) if held else shards
    return synthetic_shards(config, config.data.synthetic_clips, config.clip.frames, config.seed)


def validation_shards(config: RunConfig) -> Manifest | None:
    """Held-out clips to validate on while training; None where the run is not validated."""
    if not config.validation.every:
        return None
    if config.validation.shards is not None:
        return _cut(config, Manifest.load(config.validation.shards))
    if config.data.holdout:
        shards, held = _given_shards(config)
        samples, clip = shards.samples, config.latent_size()
        held = {number for number in held if tuple(samples[number].shape[1:]) == clip}
        if not held:
            raise UserError(f"data.holdout: none of the held-out samples is a whole clip {clip}; hold out more")
        return only(shards, held)
    return held_out(config, config.validation.clips, config.clip.frames)


def _given_shards(config: RunConfig) -> tuple[Manifest, set[int]]:
    """The samples of `data.shards`, and the numbers of those that are held out."""
    folders = [_cut(config, Manifest.load(place)) for place in config.data.places]
    shards = folders[0] if len(folders) == 1 and not config.data.weights else joined(folders, config.data.weights)
    held: set[int] = set()
    if config.data.holdout:
        first = 0
        for folder, numbers in zip(folders, split_by_video(folders, config.data.holdout), strict=True):
            held |= {first + number for number in numbers}
            first += len(folder.samples)
    return shards, held


def _cut(config: RunConfig, shards: Manifest) -> Manifest:
    return shards if config.data.frames is None else cut(shards, check_cut(shards, config.data.frames))


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
    # much to render is for machines with many cores
    workers = torch.get_num_threads() if clips * frames >= 16_384 else 0
    return synthesize(folder, clips, frames, height, width, seed, workers=workers, progress=True, scenes=scenes)
