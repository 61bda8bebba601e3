"""~ is the home folder in every path key of every command."""

import re

import pytest
from omegaconf import OmegaConf

from radial.errors import Mistake
from train.config.changes import change_config
from train.config.compose import compose_run, finish
from train.config.schema import KEYS

PATHS = {name for name, key in KEYS.items() if key.is_path}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


@pytest.mark.parametrize("key", sorted(PATHS))
def test_paths_of_a_run(home, key):
    value, expected = ("[~/x, ~/y]", [f"{home}/x", f"{home}/y"]) if key.endswith("images") else ("~/x", f"{home}/x")
    composed = compose_run({"conf": "wan_4x", key: value})
    assert OmegaConf.select(composed, key) == expected
    if key == "attention.masks":  # the file is read wherever a config is checked
        return
    run = finish(compose_run({"conf": "shapes_4x"}))
    changed = change_config(run, {key: value}, override=True)
    assert OmegaConf.select(OmegaConf.structured(changed), key) == expected


@pytest.mark.parametrize("key", sorted(PATHS))
def test_an_empty_path_is_refused_and_not_the_current_folder(key):
    value = '["", a.png]' if key.endswith("images") else ""
    with pytest.raises(Mistake, match=f"{key} is empty, expected a .*is a variable of the shell not set"):
        finish(compose_run({"conf": "shapes_4x", key: value}))


def test_both_experts_loras_and_addresses(home):
    composed = compose_run({"conf": "wan22_2x", "lora.init": "~/a.safetensors,~/b.safetensors"})
    assert composed.lora.init == f"{home}/a.safetensors,{home}/b.safetensors"
    for address in ("s3://b/x", "pipe:cat ~/x/{}", "http://host/~me/x"):
        assert compose_run({"conf": "wan_4x", "data.shards": address}).data.shards == address


def test_no_path_of_a_run_is_forgotten():
    """Every key whose meaning calls it a folder or a file."""
    texts = {name: key.field.metadata["about"] for name, key in KEYS.items() if "str" in str(key.hint)}
    named = {
        name
        for name, about in texts.items()
        if re.search(r"folder\b|LoRA file|file of masks|frame for each|place as in", about)
    }
    named -= {"model.subfolder", "conf", "trainer.steps"}
    assert {"model.path", "data.shards", "data.cache", "runs", "validation.images", "lora.init"} <= named
    assert named == PATHS
