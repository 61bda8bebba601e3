"""``python -m train.bench``: a training step, measured and taken apart."""

from __future__ import annotations

import sys

from train.bench.steps import USAGE, main
from train.cli import guarded

if __name__ == "__main__":
    guarded(main, sys.argv[1:], USAGE)
