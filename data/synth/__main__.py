"""``python -m data.synth``: a folder of synthetic clips."""

from __future__ import annotations

from data.synth.clips import main

if __name__ == "__main__":
    main.run()
