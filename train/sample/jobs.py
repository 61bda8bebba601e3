"""The videos that a command makes: its prompt, or those of a file, each with its first frame and where it goes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.io.lines import lines_of, read_utf8
from train.errors import UserError
from train.sample.settings import Settings


@dataclass(frozen=True)
class Job:
    """One video."""

    prompt: str
    negative: str
    image: Path | None
    out: Path


def jobs(settings: Settings) -> list[Job]:
    """The videos to make.

    Raises:
        UserError: a file of prompts that is missing, empty or not readable; a text with half a character; or an ``out``
            that is no place for videos.
    """
    assert settings.negative is not None and settings.out is not None
    if settings.prompts is None:
        assert settings.prompt is not None
        _check_whole(settings.prompt, "prompt")
        _check_whole(settings.negative, "negative")
        if settings.out.suffix.lower() != ".mp4":
            raise UserError(f"out is {settings.out}, expected a video's name that ends in .mp4")
        return [Job(settings.prompt, settings.negative, settings.image, settings.out)]
    kind = settings.prompts.suffix.lower()
    if kind == ".json":  # whose brackets and braces would be prompts
        raise UserError(
            f"prompts is {settings.prompts}, expected text with a prompt a line, or .jsonl, an object a line"
        )
    try:
        text = read_utf8(settings.prompts)
    except OSError as error:
        raise UserError(f"prompts {settings.prompts} cannot be read: {error.strerror}") from error
    except DataError as error:
        raise UserError(f"prompts {error}") from error
    lines = [(place, line.strip()) for place, line in enumerate(lines_of(text), 1) if line.strip()]
    if not lines:
        raise UserError(f"prompts {settings.prompts} is empty, expected a prompt a line")
    if settings.out.suffix.lower() == ".mp4":
        raise UserError(f"out is {settings.out}, expected a folder for the videos of many prompts")
    found = []
    for number, (place, line) in enumerate(lines, 1):
        given: Mapping[str, Any] = {"prompt": line}
        if kind == ".jsonl":
            given = _json_line(line, f"{settings.prompts}:{place}")
            for key, text in given.items():
                _check_whole(text, f"{settings.prompts}:{place}: {key}")
        image = Path(given["image"]).expanduser() if given.get("image") else settings.image
        if image is not None and not image.is_file():
            raise UserError(f"{settings.prompts}:{place}: image {image} is missing")
        name = "".join(c if c.isalnum() else "-" for c in given["prompt"].lower())[:48].strip("-")
        negative = given.get("negative", settings.negative)
        found.append(Job(given["prompt"], negative, image, settings.out / f"{number:04d}-{name}.mp4"))
    if len({job.image is None for job in found}) > 1:
        raise UserError(f"prompts {settings.prompts}: some have an image and some have none")
    return found


def _check_whole(text: str, where: str) -> None:
    """Raises a UserError for half a surrogate pair, such as ``\\ud83d`` in JSON, of which no file can be made."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise UserError(
            f"{where} has half a character ({half}), expected text in UTF-8, or both halves where it is written as \\u…"
        ) from error


def _json_line(line: str, where: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}), expected an object with a prompt") from error
    unknown = set(given) - {"prompt", "negative", "image"} if isinstance(given, dict) else {"no object"}
    if unknown or not all(isinstance(value, str) for value in given.values()) or "prompt" not in given:
        raise UserError(f"{where}: expected an object with prompt, and negative and image if wanted, all text")
    return given
