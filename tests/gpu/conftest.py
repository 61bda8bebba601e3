"""Tests of CUDA code: `pytest tests/gpu`; skipped where there is no GPU."""

import fcntl
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _room(request, tmp_path_factory):
    """A test marked ``whole_gpu`` has the GPU to itself among the processes of `pytest -n`."""
    wanted = fcntl.LOCK_EX if request.node.get_closest_marker("whole_gpu") else fcntl.LOCK_SH
    with (tmp_path_factory.getbasetemp().parent / "gpu.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, wanted)
        yield
        torch.cuda.empty_cache()  # for the tests of the other processes
