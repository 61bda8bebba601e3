"""The flow loss of a row on held-out clips with fixed noise, by length and noise level.

A shorter clip is the beginning of the longer one. Beside the whole clip's loss stands that of what has to be
remembered (`train.study.truth`): the pixels of the object after it has come back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from data.shards.batch import collate
from data.shards.manifest import Manifest
from data.shards.sample import Sample
from train.assemble import build_module
from train.flow import noise_like, noised
from train.models.conditions import Conditions
from train.models.loading import load_adapter
from train.planning import resolve_precision
from train.step.module import LengthExtensionModule
from train.storage.checkpoints import last_checkpoint, load_weights
from train.study.runs import RowRun
from train.study.truth import region, remembered

Losses = dict[str, dict[str, list[float | None]]]
"""Length -> noise level as text -> of each clip; None where it has nothing to remember."""


def device() -> torch.device:
    """Where rows are measured: what the trainer chooses too."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def module_of(run: RowRun, shards: Manifest) -> LengthExtensionModule:
    """The model of a row, ready to be measured: the base, with what its run has trained."""
    config = replace(run.config, trainer=replace(run.config.trainer, compile=False))
    low = resolve_precision(config.trainer.precision) == "bf16" and config.lora is not None
    adapter = load_adapter(config.model, torch.bfloat16 if low else torch.float32, config.seed, device())
    module = build_module(config, adapter, shards).to(device())
    if run.row.tuned:
        module.load_trained_weights(load_weights(last_checkpoint(run.folder)))
    module.transformer.eval()
    return module


def arithmetic(run: RowRun) -> AbstractContextManager[None]:
    """The precision that the row's run trains in."""
    if resolve_precision(run.config.trainer.precision) == "bf16":
        return torch.autocast(device().type, torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def measure_losses(
    module: LengthExtensionModule,
    clips: Sequence[Sample],
    lengths: Mapping[str, int],
    sigmas: Sequence[float],
    check: Callable[[], None],
) -> tuple[Losses, Losses]:
    """The losses of whole clips, and of what has to be remembered.

    Args:
        check: called before each clip; what it raises ends the measurement.
    """
    whole: Losses = {name: {f"{sigma:g}": [] for sigma in sigmas} for name in lengths}
    again: Losses = {name: {f"{sigma:g}": [] for sigma in sigmas} for name in lengths}
    for clip in clips:
        check()
        batch = collate([clip], 0).to(device())
        for name, frames in lengths.items():
            latent, mask = batch.latent[:, :, :frames], _mask(clip, frames)
            noise = noise_like(latent, "study", clip.key, frames)
            for sigma in sigmas:
                level = torch.tensor([sigma], device=latent.device)
                x, target = noised(latent, noise, level)
                module.adapter.set_attention(module.attention_at(latent, sigma))
                velocity = module.adapter.velocity(x, level, Conditions.of(batch).first_frames(frames))
                error = (velocity.float() - target).square()[0].mean(0)
                whole[name][f"{sigma:g}"].append(float(error.mean()))
                again[name][f"{sigma:g}"].append(None if mask is None else float(error[mask.to(error.device)].mean()))
    return whole, again


def mean_over_sigmas(losses: Mapping[str, Sequence[float | None]]) -> list[float | None]:
    """Of each clip, the mean over the noise levels; None where it has nothing to remember."""
    return [mean_of_all(column) for column in zip(*losses.values(), strict=True)]


def mean_of_all(values: Sequence[float | None]) -> float | None:
    """The mean; None where one of them is."""
    there = [value for value in values if value is not None]
    return fmean(there) if len(there) == len(values) else None


def _mask(clip: Sample, frames: int) -> Tensor | None:
    found = remembered(clip.meta, frames)
    if found is None:
        return None
    mask = region(found, frames, clip.latent.shape[2], clip.latent.shape[3])
    return mask if bool(mask.any()) else None
