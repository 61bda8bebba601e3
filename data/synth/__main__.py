"""``python -m data.synth``: a folder of synthetic clips."""

from __future__ import annotations

from data import cli
from data.synth.clips import USAGE, main

if __name__ == "__main__":
    cli.run(main, "python -m data.synth", USAGE)
