"""What each rank of the generation tests runs (tests/train/sample/test_ranks.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.tiny_pipelines import words
from train.sample.generate import Generator
from train.sample.jobs import jobs
from train.sample.pipeline import pipeline_class
from train.sample.ranks import Ranks
from train.sample.settings import parse_settings


def clip(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """A generated latent, and how this rank had its share of it."""
    settings, model = parse_settings(words(folder, **changes))
    todo = jobs(settings)
    cls = pipeline_class(str(folder), settings.image is not None)
    made = Generator(settings, model, str(folder), cls, Ranks.join(), todo)
    split = made.denoiser.split
    latent = made.denoise(todo[0], made.prompts[0], made.attention).latent
    sequence = split.sequence
    return {"latent": latent, "branch": split.branch, "share": None if sequence is None else sequence.rank}
