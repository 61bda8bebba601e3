"""``python -m train.report``: a run as one page."""

from pathlib import Path


def write_page(folder: Path) -> None:
    """To come."""
