"""What is written beside a video, and whether a video is there already.

``clip.json`` is written after ``clip.mp4``: where both are, and it holds the settings that are asked for, nothing
is left to do. While they are written, ``.clip.json`` holds their settings: a video without its record is made again
where that was the same one, and otherwise is not ours to replace. Nor is what lies where ``compare=dense`` writes, or a
``clip.json`` that is no record.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.io.files import write_utf8
from train.config.schema import ModelConfig
from train.errors import UserError
from train.sample.jobs import Job
from train.sample.settings import Settings, slots

_HOW = (
    "compare",
    "backend",
    "sequence",
    "split_guidance",
    "offload",
    "compile",
)  # not what it is
_FILES = {"lora_files": "LoRA", "image_file": "picture"}


def execution(settings: Settings) -> dict[str, Any]:
    """The settings that do not change a video, but how it was made."""
    return {key: getattr(settings, key) for key in _HOW}


def _recorded(settings: Settings, model: ModelConfig, job: Job) -> dict[str, Any]:
    """What makes a video what it is, as JSON: two videos of the same record are the same."""
    own = asdict(settings)
    for key in ("prompts", "out", *_HOW):
        del own[key]
    own |= {"prompt": job.prompt, "negative": job.negative, "image": job.image}
    if settings.masks is not None:
        own["masks"] = _digest(settings.masks)
    own |= {"model": model.family, "model_path": model.path, "text_tokens": model.text_tokens}
    if settings.rope != "default":  # from where on the positions are others
        own["native_frames"] = model.native_frames
    return {key: str(value) if isinstance(value, Path) else value for key, value in own.items()}


def check_writable(todo: Sequence[Job]) -> None:
    """Makes the videos' folders, and an empty file in each: what took an hour to denoise has a place to go.

    Raises:
        UserError: there is none.
    """
    for job in todo:
        try:
            job.out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=job.out.parent):
                pass
        except OSError as error:
            raise UserError(f"out {job.out} cannot be written ({error.strerror}): give another out") from error


@contextmanager
def record_of(job: Job, known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What ``clip.json`` will hold, to be added to while the videos are written; it is written after them, whole.

    Args:
        known: the job's `identity`, from before it was made.
    """
    record, file, mark = dict(known), _record_file(job), _mark(job)
    videos = (job.out, dense_file(job), both_file(job))
    before = {file for file in videos[1:] if file.exists()}
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(record), encoding="utf-8")
        yield record
        write_utf8(file, json.dumps(record, indent=1, ensure_ascii=False))
        mark.unlink()
    except BaseException:
        if before.issuperset(file for file in videos if file.exists()):
            mark.unlink(missing_ok=True)
        raise


def identity(job: Job, settings: Settings, model: ModelConfig) -> dict[str, Any]:
    """The parts of a record that make a video what it is, its files by their SHA-256."""
    picture = None if job.image is None else _digest(job.image)
    return {"settings": _recorded(settings, model, job), "lora_files": _loras(settings, model), "image_file": picture}


def _record_file(job: Job) -> Path:
    return job.out.with_suffix(".json")


def _mark(job: Job) -> Path:
    return job.out.with_name(f".{job.out.stem}.json")


def _read(file: Path) -> dict[str, Any]:
    """A record; empty where there is none."""
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return record if isinstance(record["settings"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


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
    record, compared = _record_file(job), [dense_file(job), both_file(job)] if settings.compare else []
    there = [file for file in (job.out, *compared) if file.exists()]
    if not there and not record.exists():
        return False
    old, new = _read(record), identity(job, settings, model)
    begun = _read(_mark(job)) == new
    if not old:
        if there and not begun:
            raise UserError(f"out {there[0]} is there, and no video of these settings: give another out")
        if record.exists() and not begun:
            raise UserError(f"out {record} is there, and no record of a video: give another out")
        return False
    was, now = old["settings"], new["settings"]
    different = [
        f"{key} {was.get(key)!r}, not {now.get(key)!r}"
        for key in sorted(now.keys() | was.keys())
        if now.get(key) != was.get(key)
    ]
    different += [f"another {what}" for key, what in _FILES.items() if old.get(key) != new[key]]
    if different:
        raise UserError(f"out {job.out} is there, of other settings ({', '.join(different[:3])}): give another out")
    others = [file for file in there if file != job.out]
    if others and not begun and not old.get("execution", {}).get("compare"):
        raise UserError(f"out {others[0]} is there, and not of compare={settings.compare}: give another out")
    return len(there) == 1 + len(compared)


def _loras(settings: Settings, model: ModelConfig) -> dict[str, str]:
    """SHA-256 of each LoRA file."""
    from train.lora.reading import find_file  # takes seconds to import

    found = {}
    for path, _ in (given for slot in slots(settings, model) for given in slot.files()):
        file, _ = find_file(path)
        found[str(file)] = _digest(file)
    return found


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
