"""Generated clips of each variant: latents by Euler steps of the flow, then videos and strips of frames.

    <out>/clips/<variant>-<times>x/0001-a-red-ball.mp4
    <out>/clips/<variant>-<times>x.json                  {"0001-a-red-ball.mp4": "a red ball"}: VBench's prompt_file
    <out>/parts/                                         latents, and eight frames of each clip in a row

The noise of a clip is a function of seed, prompt and length: every variant starts from the same.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.encoders.base import Encoder
from data.encoders.decoding import decode_frames
from data.io.files import beside, write_utf8
from data.shards.batch import collate
from data.shards.sample import Prompt, Sample
from train.evaluate.model import EvaluatedModel
from train.evaluate.results_folder import part_file
from train.evaluate.settings import Job, Length, Variant
from train.flow import noise_like
from train.measures.decoding import encoder_for
from train.measures.euler import generate
from train.models.families import family_of
from train.sample.video import video_file
from train.step.objective import Objective

STRIP, _HEIGHT = 8, 96  # frames of a strip, and its height in pixels


@dataclass(frozen=True)
class Made:
    """One generated clip.

    Attributes:
        prompt: its text.
        latent: (C, F, H, W) float32.
        video, strip: its files, which `write_video` makes.
    """

    prompt: str
    latent: Tensor
    video: Path
    strip: Path


def encoded(job: Job, channels: int) -> tuple[list[Sample], Prompt]:
    """What the model sees of each prompt of the job, and of the empty one.

    Raises:
        DataError: the model's folder has no text encoders.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = encoder_for(job.config, device)
    found = []
    for number, text in enumerate(job.prompts):
        prompt = encoder.prompt(text)
        latent = torch.zeros(channels, *job.config.latent_size(), dtype=torch.bfloat16)
        found.append(Sample(f"prompt-{number}", latent, prompt.text, prompt.pooled, {}, {"caption": text}))
    return found, encoder.prompt("")


def make_clip(
    job: Job,
    model: Callable[[], EvaluatedModel],
    prompt: Sample,
    empty: Prompt,
    number: int,
    variant: Variant,
    length: Length,
) -> Made:
    """Generates a clip, or reads the one that is there.

    Args:
        model: loads it, or gives the loaded one.
        prompt: its conditions; the latent's channels and sides are those of the clip.
        number: of the prompt, from 0.
    """
    what = f"clip {variant.what} {length.frames} {prompt.caption} {prompt.digest()}"
    file = part_file(job, what, ".safetensors")
    if not file.exists():
        latent = _generate(job, model(), prompt, empty, variant, length)
        with beside(file) as fresh:
            save_file({"latent": latent.contiguous()}, fresh)
    words = re.sub(r"\W+", "-", prompt.caption.lower()).strip("-")[:48].strip("-")
    video = folder_of(job, variant, length) / f"{number + 1:04d}-{words}.mp4"
    return Made(prompt.caption, load_file(file)["latent"], video, part_file(job, what, ".png"))


@torch.no_grad()
def _generate(
    job: Job, model: EvaluatedModel, prompt: Sample, empty: Prompt, variant: Variant, length: Length
) -> Tensor:
    model.put(variant)
    config, adapter = job.config, model.adapter
    batch = collate([prompt], 0).to(model.device)
    channels, _, *sides = prompt.latent.shape
    shape = batch.latent.new_zeros(1, channels, length.latents, *sides)
    distilled = adapter.takes_guidance
    objective = Objective(config.seed, empty, guidance=config.objective.guidance)
    conditions = objective.both(batch, job.guidance[0] if distilled else None)
    given, without = (one.first_frames(length.latents) for one in conditions)
    size = replace(config.clip, frames=length.frames)
    with model.precisely():
        return generate(
            adapter,
            noise_like(shape, job.given.seed, "evaluate", prompt.caption, length.frames),
            given,
            without,
            functools.partial(model.attention, variant, shape),
            steps=job.steps,
            shift=config.shift(size),
            guidance=1.0 if distilled else job.guidance[0],
            guidance_low=1.0 if distilled else job.guidance[-1],
            label=f"{variant.name}, {length.times}x",
        )[0].cpu()


def folder_of(job: Job, variant: Variant, length: Length) -> Path:
    """Where a variant's videos of a length are, and nothing else."""
    name = re.sub(r"\W+", "-", variant.name.lower()).strip("-")
    return job.out / "clips" / f"{name}-{length.times}x"


def write_video(job: Job, encoder: Encoder, made: Made) -> np.ndarray:
    """Decodes a clip, writes its video and its strip, and returns eight frames of it, (8, H, W, 3) uint8."""
    total = 0
    kept: list[np.ndarray] = []
    with video_file(made.video, encoder.facts.fps) as video:
        for frames in _decoded(job, encoder, made.latent):
            video.add(frames)
            kept.append(frames)
            total += len(frames)
    chosen = np.concatenate(kept)[np.linspace(0, total - 1, STRIP).round().astype(int)]
    width = max(1, round(chosen.shape[2] * _HEIGHT / chosen.shape[1]))
    small = [np.asarray(Image.fromarray(frame).resize((width, _HEIGHT), Image.Resampling.LANCZOS)) for frame in chosen]
    with beside(made.strip) as fresh:
        Image.fromarray(np.concatenate(small, axis=1)).save(fresh, format="PNG")
    return chosen


def _decoded(job: Job, encoder: Encoder, latent: Tensor) -> Iterator[np.ndarray]:
    if not hasattr(encoder, "vae"):
        yield encoder.decode(latent)
        return
    yield from decode_frames(encoder.vae, latent[None], tiled=family_of(job.config.model).decodes_tiled)


def write_prompt_file(folder: Path, made: Sequence[Made]) -> None:
    """Writes the prompts of a folder's videos beside it, also of those that earlier commands have left there."""
    file = folder.with_suffix(".json")
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    prompts = {name: prompt for name, prompt in before.items() if (folder / name).exists()}
    prompts |= {clip.video.name: clip.prompt for clip in made}
    write_utf8(file, json.dumps(prompts, indent=1, ensure_ascii=False) + "\n")
