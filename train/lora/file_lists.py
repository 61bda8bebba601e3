"""Files in one word: ``a.safetensors:0.8,b.safetensors``, at whose commas it is split, but those in a file's name."""

from __future__ import annotations

import math
from pathlib import Path

from train.errors import UserError


def split_files(text: str) -> list[str]:
    """``a.safetensors,b.safetensors:0.8`` at its commas, but those in the name of a file or folder that is there."""
    words = text.split(",")
    found = []
    while words:
        joined = [",".join(words[:count]) for count in range(len(words), 1, -1)]
        word = next((word for word in joined if _is_there(word)), words[0])
        found.append(word)
        del words[: word.count(",") + 1]
    return found


def _is_there(word: str) -> bool:
    path, _, strength = word.rpartition(":")
    return Path(word).expanduser().exists() or ("," not in strength and path != "" and Path(path).expanduser().exists())


def files_with_strengths(key: str, text: str) -> list[tuple[Path, float]]:
    """``a.safetensors:0.8,b.safetensors`` as files and strengths; a strength that is left out is 1.

    Raises:
        UserError: a strength that is no number, or no file's name.
    """
    found = []
    for word in split_files(text):
        if not word:
            raise UserError(f"{key} is {text!r}, expected FILE or FILE:STRENGTH, with a comma between two")
        path, colon, strength = word.rpartition(":")
        if not colon or Path(word).expanduser().exists():
            path, strength = word, "1"
        found.append((Path(path).expanduser(), _number(key, strength)))
    return found


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{key} is {text!r}, expected a number such as 0.8")
    return value
