"""``python -m train.report``: a run as one page."""

from __future__ import annotations

import sys

from train.cli import guarded
from train.report.page import USAGE, main

if __name__ == "__main__":
    guarded(main, sys.argv[1:], USAGE)
