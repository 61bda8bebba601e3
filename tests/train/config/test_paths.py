"""~ is the home folder in every path key of every command."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.run_argument import run_argument
from train.config import schema
from train.config.compose import PATHS, RUN_PATHS, change_config, compose_run, finish, split_arguments
from train.sample.settings import Settings

CONFIG = Path(schema.__file__)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


@pytest.mark.parametrize("key", sorted(RUN_PATHS))
def test_paths_of_a_run(home, key):
    value, expected = ("[~/x, ~/y]", [f"{home}/x", f"{home}/y"]) if key.endswith("images") else ("~/x", f"{home}/x")
    composed = compose_run({"conf": "wan_4x", key: value})
    assert OmegaConf.select(composed, key) == expected
    run = finish(compose_run({"conf": "shapes_4x"}))
    changed = change_config(run, {key: value, "override": "true"})
    assert OmegaConf.select(OmegaConf.structured(changed), key) == expected


def test_both_experts_loras_and_addresses(home):
    composed = compose_run({"conf": "wan22_2x", "lora.init": "~/a.safetensors,~/b.safetensors"})
    assert composed.lora.init == f"{home}/a.safetensors,{home}/b.safetensors"
    for address in ("s3://b/x", "pipe:cat ~/x/{}", "http://host/~me/x"):
        assert compose_run({"conf": "wan_4x", "data.shards": address}).data.shards == address


def test_paths_of_the_other_commands(home):
    assert split_arguments([f"{key}=~/x" for key in sorted(PATHS)]) == dict.fromkeys(PATHS, f"{home}/x")
    assert split_arguments(["prompt=~/x"]) == {"prompt": "~/x"}
    assert run_argument(["run=~/x"]) == (Path(home) / "x", {})
    assert run_argument(["~/x"]) == (Path(home) / "x", {})


def test_no_path_of_a_run_is_forgotten():
    """Every key whose comment calls it a folder or a file."""
    text = CONFIG.read_text(encoding="utf-8")
    named = set(
        re.findall(r"^    (\w+): (?:str|list\[str\])[^#\n]*#[^\n]*(?:folder|file\b|frame for each)", text, re.M)
    )
    assert {"path", "shards", "cache", "runs", "images", "init"} <= named
    assert {key.rpartition(".")[2] for key in RUN_PATHS} == named


def test_paths_of_sampling():
    paths = {field.name for field in fields(Settings) if field.type in ("Path | None", "Place | None")}
    assert paths == {"prompts", "image", "out", "lora", "lora_2", "add", "add_2"}
