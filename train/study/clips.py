"""Generated clips of a row and their measures.

A clip goes on from the first half of a held-out one, which the model sees at every noise level under that level's share
of its noise. So it is known what has to come back and where things go. All rows get the same noise.

    <out>/clips/<row>/<number of the first>.json       measures and features of clips that were generated together
    <out>/clips/<row>/shown.safetensors                the first of them, for the strip
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from data.io.files import write_bytes, write_utf8
from data.shards.batch import collate
from data.shards.sample import Sample
from train.attention.step import StepAttention
from train.errors import UserError
from train.flow import noise_like
from train.measures.clip_measures import measure_clip
from train.measures.euler import generate
from train.models.conditions import Conditions
from train.step.module import LengthExtensionModule
from train.study.detect import permanence, trajectory_error
from train.study.frechet import features
from train.study.losses import device
from train.study.truth import remembered

SHOWN = "shown.safetensors"
MEASURES = ("permanence", "trajectory", "repetition", "drift", "consistency")
"""Of each clip: what comes back, pixels from the simulation, share that an earlier stretch explains, colour drift in
deviations, how alike neighbouring frames are."""


@dataclass(frozen=True)
class ClipSet:
    """What the clips of all rows have in common.

    Attributes:
        clips: held-out, whole.
        given: frames that a generated clip goes on from.
        native: frames of the model's own length.
        steps: denoising steps.
        shift: of the noise levels.
        at_once: clips that are generated together.
        base: the model untuned, for features.
    """

    clips: Sequence[Sample]
    given: int
    native: int
    steps: int
    shift: float
    at_once: int
    base: LengthExtensionModule

    def measure(self, pixels: Tensor, clip: Sample) -> dict[str, Any]:
        """The measures of a clip (3, F, H, W) that goes on from a held-out one's start; None for what it has not."""
        frames, truth = pixels.shape[1], clip.latent.float()
        found = remembered(clip.meta, frames, self.given)
        again = {} if found is None else permanence(pixels, truth, clip.meta, found)
        of = measure_clip(pixels, self.native)
        return {
            "clip": clip.key,
            "world": clip.meta["world"],
            "again": again,
            "permanence": again.get("permanence"),
            "trajectory": trajectory_error(pixels, clip.meta, self.given),
            "repetition": of.repetition,
            "drift": of.drift,
            "consistency": of.consistency,
        }


def generate_row(module: LengthExtensionModule | None, of: ClipSet, folder: Path, check: Callable[[], None]) -> None:
    """Generates and measures what is missing of a row's clips.

    Args:
        module: of the row; None for the true clips themselves.
        folder: of the row's parts.
        check: called at every step; what it raises ends the work, and finished parts stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(of.clips), of.at_once):
        file = folder / f"{start:04d}.json"
        if file.is_file():
            continue
        chosen = of.clips[start : start + of.at_once]
        made = torch.stack([clip.latent.float() for clip in chosen])
        if module is not None:
            made = _go_on(module, chosen, of, check)
        check()
        if not made.isfinite().all():
            raise UserError("its generated clips have values that are not finite: its model has diverged")
        found = features(of.base, made[:, :, of.given :], min(of.native, made.shape[2] - of.given))
        rows = [of.measure(pixels, clip) for pixels, clip in zip(made, chosen, strict=True)]
        if start == 0:
            write_bytes(folder / SHOWN, safetensors.torch.save({"clip": made[0].bfloat16().contiguous()}))
        write_utf8(file, json.dumps({"clips": rows, "features": found.tolist()}))


def read_row(folder: Path) -> tuple[list[dict[str, Any]], Tensor | None]:
    """The measures and features of a row's clips that are there, in the clips' order."""
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    rows = [row for part in parts for row in part["clips"]]
    found = [torch.tensor(part["features"], dtype=torch.float64) for part in parts]
    return rows, torch.cat(found) if found else None


def shown(folder: Path) -> Tensor | None:
    """A row's clip for the strip."""
    file = folder / SHOWN
    return safetensors.torch.load_file(file)["clip"].float() if file.is_file() else None


@torch.no_grad()
def _go_on(module: LengthExtensionModule, chosen: Sequence[Sample], of: ClipSet, check: Callable[[], None]) -> Tensor:
    """(batch, C, F, H, W) in [-1, 1] on the CPU."""
    batch = collate(list(chosen), 0).to(device())
    noise = torch.stack([noise_like(x, "clips", clip.key) for x, clip in zip(batch.latent, chosen, strict=True)])

    def attention(sigma: float) -> StepAttention:
        check()
        return module.attention_at(noise, sigma)

    made = generate(
        module.adapter,
        noise,
        Conditions.of(batch),
        None,
        attention,
        steps=of.steps,
        shift=of.shift,
        guidance=1.0,
        quiet=True,
        start=batch.latent[:, :, : of.given].float(),
    )
    return made.clamp(-1, 1).float().cpu()
