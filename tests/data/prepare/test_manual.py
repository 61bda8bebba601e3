"""The commands of the manual's chapter on choosing: they run as they stand there, and no key is left out."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
from data.prepare.__main__ import Arguments
from radial.cli.settings import key_of

ROOT = Path(data.__file__).parents[1]
MANUAL = (ROOT / "data" / "README.md").read_text(encoding="utf-8")


def chapter(first: str, last: str) -> str:
    """The manual from one line's beginning to another's."""
    return MANUAL[MANUAL.index(f"\n{first}") : MANUAL.index(f"\n{last}")]


def test_every_key_is_in_the_example_or_named_beside_it() -> None:
    text = chapter("**All of it in one command**", "## Other captions").replace("--dry-run", "dry_run=")
    keys = {key_of(field) for field in dataclasses.fields(Arguments)}
    assert keys == keys & set(re.findall(r"\b([\w.]+)=", text))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the manual makes its films with the ffmpeg command")
def test_the_commands_give_what_the_manual_says(tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", chapter("## Choosing", "## Shards"), re.DOTALL)
    script = "".join(block for block in blocks if "caption.model" not in block)  # which needs a model's weights
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.findall(r"(?m)^# (.*)$", script)
    assert said and [line for line in said if line not in done.stdout.splitlines()] == []
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {"films", "all", "films-2"}
    assert (tmp_path / "sheet.png").is_file()
