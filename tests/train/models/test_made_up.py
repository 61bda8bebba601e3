"""A new family is one file in train/models and one YAML: added to a copy of the project, it trains and is tested."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
NEW = Path(__file__).with_name("made_up")


@pytest.mark.slow
def test_a_made_up_family_is_two_files_away(tmp_path):
    for folder in ("data", "radial"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for folder in ("train", "conf", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(NEW / "made_up.py", tmp_path / "train" / "models" / "families")
    shutil.copy(NEW / "made_up.yaml", tmp_path / "conf" / "model")
    run = [
        "-m", "train", "conf=shapes_base", "model=made_up", "clip.frames=2", "clip.height=16", "clip.width=16",
        "data.synthetic_clips=4", "data.batch_size=1", "data.workers=0", "trainer.steps=2", "trainer.compile=false",
        "trainer.precision=fp32", "optim.warmup=0",
    ]  # fmt: skip
    # the contract's tests of this family, the compiled layers too
    tests = ["-m", "pytest", "tests/train/models/test_contract.py", "-k", "made_up", "-m", "slow or not slow"]
    for command in (run, tests):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, encoding="utf-8", cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs" / "shapes_base").iterdir()
    assert (folder / "export" / "model" / "diffusion_pytorch_model.safetensors").is_file()
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    assert counts.keys() == {"passed"}
    assert counts["passed"] >= 14, done.stdout
