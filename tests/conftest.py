"""Shared settings of all tests."""

import sys
from pathlib import Path

import torch
from hypothesis import settings

# helpers beside the tests (radial/oracles.py, train/tiny.py) are imported by their name
for folder in ("radial", "train", "data"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")
torch.set_num_threads(2)
