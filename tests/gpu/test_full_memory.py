"""A GPU that fills up in mid-run: the run ends with the remedies, and goes on where it was once there is room."""

import contextlib
import csv
import os
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers.tiny import words

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
STEPS = 200


def rows(folder):
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        return [row["loss"] for row in csv.DictReader(stream) if row["loss"]]


def fill():
    """Takes whatever is free on the GPU."""
    taken, size = [], torch.cuda.mem_get_info()[0]
    while size >= 2**20:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return taken


@pytest.mark.whole_gpu
def test_a_full_gpu_ends_the_run_with_remedies_and_costs_no_step(tmp_path):
    command = words(tmp_path, trainer__steps=STEPS, trainer__checkpoint_every=1, trainer__check_memory=False)
    uncached = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each step asks the GPU anew
    run = subprocess.Popen(
        [sys.executable, "-m", "train", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=uncached,
    )
    deadline, folder = time.monotonic() + 240, None
    while run.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(ValueError, FileNotFoundError):
            (folder,) = (tmp_path / "runs" / "shapes_4x").iterdir()
            if (folder / "checkpoints" / "step-000003").exists():
                break
        time.sleep(0.02)
    taken = fill()
    _, said = run.communicate(timeout=120)
    assert run.returncode == 2, said
    assert "out of memory" in said and "Cheapest first: " in said and "Traceback" not in said
    done = len(rows(folder))
    assert 3 <= done < STEPS

    taken.clear()
    torch.cuda.empty_cache()
    again = subprocess.run([sys.executable, "-m", "train", f"resume={folder}"], capture_output=True, encoding="utf-8")
    assert again.returncode == 0, again.stderr
    assert len(rows(folder)) == STEPS


def test_a_benchmark_on_too_small_a_gpu_says_so_in_one_line():
    command = ["model=shapes_random", "frames=64", "clip.height=32", "clip.width=64", "pattern=released", "layers=all"]
    done = subprocess.run(
        [sys.executable, "-m", "train.bench", *command, "memory_limit=0.05"], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 2, done.stderr
    assert "out of memory: " in done.stderr and "Traceback" not in done.stderr
