"""Values of the commands: ~ in every path."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from data import bench, check
from data.cli import Place, expanded, parse
from data.prepare.__main__ import Arguments
from data.synth import clips as synth


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def test_a_home_folder_wherever_a_path_begins(home: str) -> None:
    for text, expected in {
        "~": home,
        "~/x y": f"{home}/x y",
        "~/a.safetensors:0.8,~/b.safetensors": f"{home}/a.safetensors:0.8,{home}/b.safetensors",
        "[~/a.png, '~/b.png']": f"[{home}/a.png, '{home}/b.png']",
        "~nobody-of-this-name/x": "~nobody-of-this-name/x",
    }.items():
        assert expanded(text) == expected
    for text in ("/data/~/x", "a ~/b", "s3://bucket/~/x", "pipe:cat ~/x/{}", "hub:Wan-AI/x", "x~", "~x~y"):
        assert expanded(text) == text


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        (Arguments, {"source", "out", "weights", "videos"}),
        (bench.Arguments, {"shards"}),
        (check.Arguments, {"shards", "png", "weights"}),
        (synth.Arguments, {"out", "preview"}),
    ],
)
def test_every_path_of_every_command(home: str, schema: type, paths: set[str]) -> None:
    hints = get_type_hints(schema)
    assert {name for name, hint in hints.items() if {Path, Place} & set(get_args(hint) or (hint,))} == paths
    given = parse(schema, [f"{name}=~/x" for name in paths])
    assert {str(getattr(given, name)) for name in paths} == {f"{home}/x"}
