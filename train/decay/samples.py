"""The model's own clips in place of real ones (``clips_from=samples``).

<out>/parts/sample-<hash>.safetensors    a clip; as other parts it is made again only if it is damaged
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import safetensors.torch
from torch import Tensor

from data.io.files import write_bytes
from data.shards.batch import collate
from data.shards.sample import Prompt, Sample
from train.decay.kept import dense_attention
from train.decay.measure import PARTS, is_whole
from train.decay.settings import Job
from train.flow import noise_like
from train.measures.euler import generate, sampled_with
from train.models.base import ModelAdapter
from train.step.objective import Objective


def own_samples(
    job: Job, adapter: ModelAdapter, clips: Sequence[Sample], empty: Prompt, made_from: dict[str, Any]
) -> list[Sample]:
    """The clips with latents that the model generates from their prompts and images, under dense attention.

    Args:
        clips: whose prompts, images and size are taken.
        empty: the empty prompt.
        made_from: what beside the job decides over the latents: the model's weights.

    Raises:
        UserError: the model is an expert, which cannot sample alone.
    """
    found = []
    for clip in clips:
        about = [made_from, job.frames, job.config.seed, sampled_with(job.config), job.shift(clip)]
        key = json.dumps([about, clip.key, clip.digest()])
        file = job.out / PARTS / f"sample-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        if not is_whole(file, "latent"):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, safetensors.torch.save({"latent": _generated(job, adapter, clip, empty)}))
        found.append(replace(clip, latent=safetensors.torch.load_file(file)["latent"]))
    return found


def _generated(job: Job, adapter: ModelAdapter, clip: Sample, empty: Prompt) -> Tensor:
    """(C, frames, H, W) float32, on the CPU."""
    batch = collate([clip], 0).to(next(adapter.transformer.parameters()).device)
    steps, guidance, low = sampled_with(job.config)
    distilled = adapter.takes_guidance
    conditions = Objective.of(job.config, empty).both(batch, guidance if distilled else None)
    given, without = (one.first_frames(job.frames) for one in conditions)
    latent = batch.latent[:, :, : job.frames]
    attention = dense_attention(adapter.grid(latent))
    return generate(
        adapter,
        noise_like(latent, job.config.seed, "decay samples", clip.key),
        given,
        without,
        lambda sigma: attention,
        steps=steps,
        shift=job.shift(clip),
        guidance=1.0 if distilled else guidance,
        guidance_low=1.0 if distilled else low,
        label=f"Sampling {clip.key}",
    )[0].cpu()
