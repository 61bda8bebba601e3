"""The command line of `status`, `logs` and `cancel`: ``RUN [key=value ...]``."""

from __future__ import annotations

from pathlib import Path

from train.errors import UserError


def run_argument(arguments: list[str], *options: str) -> tuple[Path, dict[str, str]]:
    """``RUN [key=value ...]`` of status, logs and cancel; the path of RUN may hold ``=``."""
    words, settings = [], {}
    for word in arguments:
        key, equals, value = word.partition("=")
        if equals and key in (*options, "run"):
            settings[key] = value
        elif equals and not Path(word).exists():
            raise UserError(f"{key} is not a setting of this command, expected {', '.join(options) or 'none'}")
        else:
            words.append(word)
    runs = [*words, *([settings.pop("run")] if "run" in settings else [])]
    if len(runs) != 1:
        raise UserError(f"expected one run folder, found {len(runs)}: {' '.join(runs)}")
    return Path(runs[0]).expanduser(), settings
