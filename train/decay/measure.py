"""The measurement: every clip at every noise level, a part each, kept on disk as soon as it is finished.

    <out>/parts/<hash>.safetensors    one clip at one noise level (`train.decay.masses`, `train.decay.kept`)

A part's name is the hash of what it was made from, so that a command that is started again, or with more clips or noise
levels, goes on with what is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from data.io.files import write_bytes
from data.shards.batch import collate
from data.shards.manifest import Manifest
from data.shards.reader import SampleReader
from data.shards.sample import Sample
from data.shards.stages import load_stages
from radial import VideoGrid
from train.decay.bins import Geometry, QueryRows
from train.decay.capture import Attended, observed
from train.decay.kept import attention_of, dense_attention, output_errors, velocity_error
from train.decay.masses import layer_masses
from train.decay.settings import Job
from train.errors import UserError
from train.flow import noise_like, noised
from train.models.base import ModelAdapter
from train.models.conditions import Conditions

PARTS = "parts"


@dataclass(frozen=True)
class Part:
    """A finished part.

    Attributes:
        clip: its key.
        sigma: its noise level.
        file: where it is.
    """

    clip: str
    sigma: float
    file: Path

    def tensor(self, name: str) -> Tensor:
        """One of its tensors: ``velocity``, or of a layer ``<layer>/<name>`` (`train.decay.masses`, ``error``)."""
        with safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(name)


def pick_clips(job: Job, shards: Manifest) -> list[Sample]:
    """The first clips of one size that are long enough, as the run's stages make them (``data.stages``).

    Raises:
        UserError: there are too few.
    """
    places = [(n, place, info) for n, shard in enumerate(shards.shards) for place, info in enumerate(shard.samples)]
    size = next((info.shape[2:] for _, _, info in places if info.shape[1] >= job.frames), None)
    fitting = [(n, p) for n, p, info in places if info.shape[1] >= job.frames and info.shape[2:] == size]
    if len(fitting) < job.clips:
        longest = max((info.shape[1] for _, _, info in places), default=0)
        raise UserError(
            f"{shards.home}: {len(fitting)} clips of one size have {job.frames} latent frames or more "
            f"(frames={job.length}), clips={job.clips} are wanted: the longest has {longest}; give other shards, or "
            "fewer clips or frames"
        )
    stages = load_stages(job.config.data.stages)
    clips = []
    with SampleReader(shards) as reader:
        for number, place in fitting[: job.clips]:
            clip = reader.read(number, place)
            for stage in stages:
                clip = stage(clip)
            clips.append(clip)
    return clips


def measure(
    job: Job, adapter: ModelAdapter, clips: Sequence[Sample], made_from: dict[str, Any], check: Callable[[], None]
) -> list[Part]:
    """Measures what is not measured yet.

    Args:
        made_from: what beside the job decides over the figures: the model's weights.
        check: called before each part.
    """
    grid = adapter.grid(clips[0].latent[None, :, : job.frames])
    layers, _, _ = adapter.attention_shape
    wanted = range(layers) if job.layers is None else job.layers
    about = {
        **made_from,
        "frames": job.frames,
        "layers": list(wanted),
        "candidates": [repr(candidate) for candidate in job.candidates],
        "dense_layers": job.dense_layers,
        "rows": job.rows,
        "tile": str(job.tiling),
        "seed": job.config.seed,
        "guidance": job.config.objective.guidance,
    }
    (job.out / PARTS).mkdir(parents=True, exist_ok=True)
    forwards = 1 + len(job.candidates) * len(job.dense_layers)
    total = len(clips) * len(job.sigmas) * (len(wanted) + forwards)
    parts = []
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        for clip in clips:
            for sigma in job.sigmas:
                key = json.dumps([about, clip.key, clip.digest(), sigma])
                file = job.out / PARTS / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
                bar.set_description(f"{clip.key}, sigma {sigma:g}")
                if is_whole(file, "velocity"):
                    bar.update(len(wanted) + forwards)
                else:
                    check()
                    tensors = _measure(job, adapter, clip, sigma, grid, wanted, bar)
                    write_bytes(file, safetensors.torch.save(tensors))
                parts.append(Part(clip.key, sigma, file))
    return parts


@torch.no_grad()
def _measure(
    job: Job, adapter: ModelAdapter, clip: Sample, sigma: float, grid: VideoGrid, layers: Sequence[int], bar: Any
) -> dict[str, Tensor]:
    geometry = Geometry(grid, job.tiling)
    rows = QueryRows.draw(geometry, job.rows, job.config.seed, clip.key, sigma)
    count, heads, _ = adapter.attention_shape
    attentions = [attention_of(candidate, grid) for candidate in job.candidates]
    device = next(adapter.transformer.parameters()).device
    batch = collate([clip], 0).to(device)
    conditions = Conditions.of(batch, job.config.objective.guidance).first_frames(job.frames)
    latent = batch.latent[:, :, : job.frames]
    level = torch.tensor([sigma], device=device)
    x, _ = noised(latent, noise_like(latent, job.config.seed, "decay", clip.key), level)
    found: dict[str, Tensor] = {}

    def see(layer: int, attended: Attended) -> None:
        layouts = [attention.own_layout(layer, count, heads) for attention in attentions]
        sums = layer_masses(attended.q, attended.k, geometry, rows, layouts, attended.text_tokens)
        sums["error"] = torch.stack([output_errors(attended, layout) for layout in layouts])
        found.update({f"{layer}/{name}": tensor.float().contiguous() for name, tensor in sums.items()})
        bar.update()

    adapter.set_attention(dense_attention(grid))
    with observed(adapter, layers, see):
        dense = adapter.velocity(x, level, conditions)
    bar.update()
    errors = []
    for candidate in job.candidates:
        for dense_layers in job.dense_layers:
            attention = attention_of(candidate, grid, dense_layers)
            errors.append(velocity_error(adapter, x, level, conditions, dense, attention))
            bar.update()
    found["velocity"] = torch.tensor(errors).view(len(job.candidates), len(job.dense_layers))
    return found


def is_whole(file: Path, name: str) -> bool:
    """Whether a part is there, not cut off, and holds the tensor ``name``."""
    if not file.exists():
        return False
    try:
        with safe_open(file, "pt") as tensors:
            return name in tensors.keys()  # noqa: SIM118  not a dict
    except (OSError, SafetensorError):
        return False
