"""What is written beside a video, and whether a video is there already.

``clip.json`` is written after ``clip.mp4``: where both are, and it holds the settings that are asked for, nothing
is left to do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.config import ModelConfig
from train.errors import UserError
from train.sample.settings import Job, Settings, slots

_HOW = (
    "compare",
    "backend",
    "sequence",
    "split_guidance",
    "offload",
    "compile",
)  # not what it is


def execution(settings: Settings) -> dict[str, Any]:
    """The settings that do not change a video, but how it was made."""
    return {key: getattr(settings, key) for key in _HOW}


def recorded(settings: Settings, model: ModelConfig, job: Job) -> dict[str, Any]:
    """What makes a video what it is, as JSON: two videos of the same record are the same."""
    own = asdict(settings)
    for key in ("prompts", "out", *_HOW):
        del own[key]
    own |= {"prompt": job.prompt, "negative": job.negative, "image": job.image}
    own |= {"model": model.family, "model_path": model.path}
    return {key: str(value) if isinstance(value, Path) else value for key, value in own.items()}


def check_writable(todo: Sequence[Job]) -> None:
    """Makes the videos' folders, and an empty file in each: what took an hour to denoise has a place to go.

    Raises:
        UserError: there is none.
    """
    for job in todo:
        probe = job.out.with_name(f".{job.out.stem}.tmp-{os.getpid()}.mp4")
        try:
            job.out.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"out {job.out} cannot be written ({error.strerror}): give another out") from error


def write_record(job: Job, record: dict[str, Any]) -> None:
    """Writes ``clip.json``, whole or not at all."""
    file = job.out.with_suffix(".json")
    temporary = file.with_name(f".{file.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False))
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)


def dense_file(job: Job) -> Path:
    """Where the clip with dense attention goes."""
    return job.out.with_stem(f"{job.out.stem}_dense")


def both_file(job: Job) -> Path:
    """Where both clips go, side by side."""
    return job.out.with_stem(f"{job.out.stem}_both")


def is_done(job: Job, settings: Settings, model: ModelConfig) -> bool:
    """Whether a job's video is there.

    Raises:
        UserError: another one is.
    """
    about = job.out.with_suffix(".json")
    if not job.out.exists() and not about.exists():
        return False
    try:
        record = json.loads(about.read_text())
        old, files = record["settings"], record["lora_files"]
    except (OSError, ValueError, KeyError, TypeError):
        if job.out.exists():
            raise UserError(f"out {job.out} is there, and no video of these settings: give another out") from None
        return False
    new = recorded(settings, model, job)
    different = sorted(key for key in new.keys() | old.keys() if new.get(key) != old.get(key))
    if different or files != digests(settings, model):
        what = ", ".join(f"{key} {old.get(key)!r}, not {new.get(key)!r}" for key in different[:3]) or "another LoRA"
        raise UserError(f"out {job.out} is there, of other settings ({what}): give another out")
    wanted = [job.out] + ([dense_file(job), both_file(job)] if settings.compare else [])
    return all(file.exists() for file in wanted)


def digests(settings: Settings, model: ModelConfig) -> dict[str, str]:
    """SHA-256 of each LoRA file."""
    from train.export.reading import find_file  # takes seconds to import

    found = {}
    for path, _ in (given for slot in slots(settings, model) for given in slot.files()):
        file, _ = find_file(path)
        with file.open("rb") as stream:
            found[str(file)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found
