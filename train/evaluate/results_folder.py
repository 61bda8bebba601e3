"""What is finished of an evaluation, and what it was finished with.

    <out>/about.json    what all parts follow from: the model, the weights that were trained, how clips are generated
    <out>/parts/        a loss of each clip, latents, scores; a part's name is a hash of what it is of, tensors included

Rows, lengths and prompts can be added by a later command: what is there already is not made again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.io.files import write_utf8
from train.errors import UserError
from train.evaluate.settings import Job
from train.lora.reading import find_file
from train.storage.checkpoints import WEIGHTS, last_checkpoint
from train.storage.inputs import fingerprints


def open_folder(job: Job, shards: str | None) -> None:
    """Makes the folder of the results, or finds it made by the same model and settings.

    Args:
        shards: what made the held-out clips, in words.

    Raises:
        UserError: it holds results of others, which are named, or cannot be written.
    """
    about = _about(job, shards)
    file = job.out / "about.json"
    try:
        (job.out / "parts").mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_utf8(file, json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"out {job.out} cannot be written ({error.strerror}): give another out") from error
    there = json.loads(file.read_text(encoding="utf-8"))
    # weights of the hub that are not here yet have no name: what was begun before they came has none either
    other = [f"{name} was {there[name]}, now {said}" for name, said in about.items() if there.get(name, said) != said]
    if other:
        raise UserError(f"out {job.out} has results of another evaluation ({'; '.join(other)}): give another out")


def part_file(job: Job, what: str, suffix: str) -> Path:
    """Where a part is kept."""
    return job.out / "parts" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}{suffix}"


def _about(job: Job, shards: str | None) -> dict[str, Any]:
    config = job.config
    checkpoint = last_checkpoint(job.given.run)
    if job.lora is None:
        weights = f"{checkpoint.name} {_digest(checkpoint / WEIGHTS)}"
    else:
        weights = f"{_digest(find_file(job.lora[0])[0])} at {job.lora[1]:g}"
    parts = {name: asdict(getattr(config, name)) for name in ("model", "attention", "objective", "clip")}
    settings = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    base = fingerprints(config, None).get("weights")
    return {
        **({} if base is None else {"base": base}),
        "weights": weights,
        "config": settings,
        "shards": shards,
        "steps": job.steps,
        "guidance": list(job.guidance),
        "seed": job.given.seed,
    }


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
