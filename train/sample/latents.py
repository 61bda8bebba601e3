"""Denoised clips, kept beside a video until its frames are written: decoding may want more memory than there is, or be
killed, and an hour of steps is not to be done again for that.

``.clip.latents.safetensors`` holds the latents by the name of their attention, and what they are of: a clip of other
settings makes its own. How frames are decoded (``tiled``, ``fps``) is none of these settings.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.io.files import write_bytes
from train.sample.jobs import Job

_OF_FRAMES = ("tiled", "fps")


@dataclass
class Clip:
    """A generated latent, (1, C, f, h, w), and what it took."""

    latent: Tensor
    seconds: list[float]
    dense: list[bool]

    def medians(self) -> dict[str, float]:
        """Seconds of a step of each kind there is; the first one builds and compiles, so that a mean would mislead."""
        kinds = {
            kind: [s for s, dense in zip(self.seconds, self.dense, strict=True) if dense == wanted]
            for kind, wanted in (("dense", True), ("sparse", False))
        }
        return {kind: statistics.median(found) for kind, found in kinds.items() if found}

    def steady(self) -> float:
        """Seconds of all steps, each taken as its kind's median: what a further clip takes."""
        medians = self.medians()
        return sum(medians["dense" if dense else "sparse"] for dense in self.dense)

    def measured(self) -> dict[str, Any]:
        """The measured seconds, as the clip's JSON has them."""
        steps = {f"seconds_a_{kind}_step": seconds for kind, seconds in self.medians().items()}
        return {"seconds": sum(self.seconds), "steady_seconds": self.steady(), "seconds_a_step": self.seconds, **steps}


def keep_clips(job: Job, known: Mapping[str, Any], clips: Mapping[str, Clip]) -> None:
    """Writes a job's clips, those of before replaced.

    Args:
        known: the job's `train.sample.records.identity`.
        clips: by the name of their attention.

    Raises:
        OSError: there is no place for them.
    """
    steps = {name: {"seconds": clip.seconds, "dense": clip.dense} for name, clip in clips.items()}
    about = {"of": _of(known), "steps": json.dumps(steps)}
    latents = {name: clip.latent.contiguous() for name, clip in clips.items()}
    write_bytes(_file(job), safetensors.torch.save(latents, about))


def kept_clips(job: Job, known: Mapping[str, Any]) -> dict[str, Clip]:
    """The clips that are kept of a job with this identity, by the name of their attention."""
    try:
        with safe_open(_file(job), "pt") as stored:
            about = stored.metadata() or {}
            if about.get("of") != _of(known):
                return {}
            steps = json.loads(about["steps"])
            return {name: Clip(stored.get_tensor(name), **steps[name]) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # none, or a damaged one: the clip is made again
        return {}


def drop_clips(job: Job) -> None:
    """Removes what is kept of a job, whose frames are written."""
    _file(job).unlink(missing_ok=True)


def _file(job: Job) -> Path:
    return job.out.with_name(f".{job.out.stem}.latents.safetensors")


def _of(known: Mapping[str, Any]) -> str:
    settings = {key: value for key, value in known["settings"].items() if key not in _OF_FRAMES}
    return json.dumps({**known, "settings": settings}, sort_keys=True)
