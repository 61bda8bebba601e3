"""Processes that see one GPU each."""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from train.study.gpus import OneGpuEach, gpus_in_turn


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0", "1", "0"]), ("3,5,7", ["3", "5", "3"])])
def test_processes_take_the_gpus_in_turn(monkeypatch, visible, expected):
    assert gpus_in_turn(2) == [None, None] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_in_turn(3) == expected


def gpu_at_the_start(_: int) -> str | None:
    """What the environment of this process named when it began, before it imported anything."""
    pairs = Path("/proc/self/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair).get("CUDA_VISIBLE_DEVICES")


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="needs Linux")
def test_a_process_sees_its_gpu_alone_from_its_start(monkeypatch):
    """CUDA reads the name once, while libraries are imported: one that is set later is too late."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with ProcessPoolExecutor(1, OneGpuEach(["3", "5"]), max_tasks_per_child=1) as pool:
        assert list(pool.map(gpu_at_the_start, range(2))) == ["3", "5"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
