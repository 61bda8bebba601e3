"""The command from its settings to its files.

    <out>/decay.json            what was measured, every head, every pattern, the advice
    <out>/decay.safetensors     masses and curves (`train.decay.results`)
    <out>/decay.html            the page
    <out>/parts/                finished parts (`train.decay.measure`); they may be deleted

Each file is written beside and renamed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence

import safetensors.torch
import torch

from data.encoders import check_encoder
from data.io.files import write_bytes
from data.shards.batch import collate
from data.shards.manifest import Manifest
from data.shards.sample import Sample
from train.decay.advice import advice, as_json, settings
from train.decay.bins import Geometry
from train.decay.charts import draw_all
from train.decay.measure import measure, pick_clips
from train.decay.page import write_page
from train.decay.results import about, head_rows, layer_figures, tables, velocities
from train.decay.samples import own_samples
from train.decay.settings import Job
from train.errors import UserError
from train.models.base import ModelAdapter
from train.models.conditions import Conditions
from train.models.families import family_of
from train.models.loading import describe_model, encoder_of, load_adapter, sigma_range
from train.planning.full_memory import memory_in_words
from train.shards import held_out, training_shards
from train.storage.inputs import fingerprints

_SAMPLER_STEPS = 50  # where the model has none of its own


def run_decay(job: Job, check: Callable[[], None] = lambda: None) -> list[str]:
    """Measures, writes, and returns the advice.

    Args:
        check: called before each clip and noise level; what it raises ends the work, and finished parts stay.

    Raises:
        UserError, DataError: weights or shards are missing or do not suit each other, or memory is full.
    """
    low, high = sigma_range(job.config.model)
    outside = [sigma for sigma in job.sigmas if not low <= sigma < high]
    if outside:
        raise UserError(
            f"sigmas has {outside[0]:g}, model.expert={job.config.model.expert} is for noise levels {low:g} to {high:g}"
        )
    if job.own_samples and (low, high) != (0.0, 1.0):
        raise UserError(
            f"clips_from is samples, model.expert={job.config.model.expert} is for noise levels {low:g} to {high:g} "
            "and cannot generate clips alone: give clips_from=shards, or model.expert=both"
        )
    if job.own_samples:
        family_of(job.config.model).check_samples(job.config)
    if job.config.model.storage is not None:
        raise UserError(
            f"model.storage is {job.config.model.storage}, but attention is measured with the model's own weights: "
            "leave it out"
        )
    described = describe_model(job.config.model)
    if described is not None:
        _check_layers(job, described)
    shards = _shards(job)
    clips = pick_clips(job, shards)
    levels = sampler_levels(job, clips[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if described is not None:
        _check_clip(described, clips[0])
    model = dataclasses.replace(job.config.model, path=None)  # wherever it lies
    made_from = {**fingerprints(job.config, None), "model": dataclasses.asdict(model)}
    with memory_in_words("Give fewer frames, or rows=2; finished clips and noise levels stay"):
        adapter = load_adapter(job.config.model, dtype, job.config.seed, device)
        _check_layers(job, adapter)
        adapter.transformer.eval()
        if job.own_samples:
            clips = own_samples(job, adapter, clips, shards.load_empty_prompt(), made_from)
        parts = measure(job, adapter, clips, made_from, check)
    geometry = Geometry(adapter.grid(clips[0].latent[None, :, : job.frames]), job.tiling)
    layers, heads, _ = adapter.attention_shape
    chosen = range(layers) if job.layers is None else job.layers
    figures = [layer_figures(job, geometry, parts, layer, sigma) for sigma in job.sigmas for layer in chosen]
    errors = velocities(job, parts)
    linear = adapter.linear_flops(geometry.grid)
    found = settings(job, errors, geometry.grid, adapter.attention_shape, linear, levels)
    sentences = advice(job, figures, errors, found)
    facts = about(job, geometry, parts, chosen, heads)
    pictures = draw_all(job, geometry, figures, errors)
    tensors = safetensors.torch.save(tables(geometry, parts, figures), {"about": json.dumps(facts)})
    write_bytes(job.out / "decay.safetensors", tensors)
    write_page(job, facts, figures, errors, found, sentences, pictures, job.out / "decay.html")
    result = {
        "about": facts,
        "advice": sentences,
        "settings": as_json(found),
        "velocity": [{**vars(one), "mean": one.mean} for one in errors],
        "heads": [row for one in figures for row in head_rows(one)],
    }
    write_bytes(job.out / "decay.json", json.dumps(result, indent=1).encode())
    return sentences


def _shards(job: Job) -> Manifest:
    config = job.config
    if config.data.places:
        shards = training_shards(config)
        check_encoder(shards, *encoder_of(config.model))
        return shards
    if tuple(config.model.vae) != (1, 1, 1):
        raise UserError(
            "data.shards is not set, expected a folder of latent shards with a manifest.json (what python -m "
            "data.prepare makes): attention is measured on real clips"
        )
    return held_out(config, job.clips, job.frames)


def _check_layers(job: Job, adapter: ModelAdapter) -> None:
    layers = adapter.attention_shape[0]
    if job.layers is not None and job.layers[-1] >= layers:
        raise UserError(f"layers has {job.layers[-1]}, the model's are 0 to {layers - 1}")
    for candidate in job.candidates:
        candidate.recipe.check_model(layers, adapter.attention_shape[1])
    if job.dense_layers[-1] > layers:
        raise UserError(f"dense_layers has {job.dense_layers[-1]}, the model has {layers} layers")


def _check_clip(adapter: ModelAdapter, clip: Sample) -> None:
    batch = collate([clip], 0)
    adapter.check(batch.latent, Conditions.of(batch))


def sampler_levels(job: Job, clip: Sample) -> Sequence[float]:
    """The noise levels of the model's sampler for clips of this size."""
    model = job.config.model
    return family_of(model).noise_levels(model.steps or _SAMPLER_STEPS, job.shift(clip))
