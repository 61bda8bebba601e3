"""Shared settings of all tests."""

import sys
from pathlib import Path

import torch
from hypothesis import settings

# helpers beside the tests (tests/radial/oracles.py) are imported by their folder's name
sys.path.insert(0, str(Path(__file__).parent / "radial"))
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")
torch.set_num_threads(2)
