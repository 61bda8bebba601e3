"""Shared settings of all tests."""

import os

import torch
from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")
# sums depend on it: what a test starts computes as the test itself; with pytest-xdist each worker has one core
threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(threads)
os.environ["OMP_NUM_THREADS"] = str(threads)
