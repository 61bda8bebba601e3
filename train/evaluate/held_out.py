"""The loss of each variant on held-out clips, by noise level and length: one file a clip, so that a stop costs one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from data.io.files import write_utf8
from data.shards.sample import Sample
from train.evaluate.model import EvaluatedModel
from train.evaluate.results_folder import part_file
from train.evaluate.settings import Job, Length, Variant
from train.measures.losses import loss_at
from train.step.objective import Objective


def measure_losses(
    job: Job,
    model: Callable[[], EvaluatedModel],
    objective: Objective,
    clips: Sequence[Sample],
    levels: Mapping[float, float],
    variant: Variant,
    length: Length,
) -> list[list[float]]:
    """The losses of a variant on the beginnings of clips, (clips, noise levels); what is measured already is read.

    Args:
        model: loads it, or gives the loaded one.
        objective: the run's.
        levels: noise levels.
    """
    found = []
    for clip in tqdm(clips, desc=f"{variant.name}, {length.times}x", unit="clip", dynamic_ncols=True, leave=False):
        what = f"loss {variant.what} {length.frames} {clip.key} {clip.digest()} {sorted(levels)}"
        file = part_file(job, what, ".json")
        if not file.exists():
            _measure(model(), objective, clip, list(levels), variant, length, file)
        found.append([float(loss) for loss in json.loads(file.read_text(encoding="utf-8"))])
    return found


def _measure(
    model: EvaluatedModel,
    objective: Objective,
    clip: Sample,
    levels: Sequence[float],
    variant: Variant,
    length: Length,
    file: Path,
) -> None:
    model.put(variant)
    attention = functools.partial(model.attention, variant)
    with model.precisely():
        losses = [loss_at(model.adapter, clip, length.latents, sigma, attention, objective) for sigma in levels]
    write_utf8(file, json.dumps(losses))
