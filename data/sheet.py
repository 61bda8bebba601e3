"""Contact sheets: rows of small pictures with a line of text above each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

PICTURE, LABEL = 240, 16  # pixels: width of a picture, height of a line of text


def row_of(frames: Sequence[np.ndarray], label: str) -> Image.Image:
    """Frames (H, W, 3) uint8 side by side under a label, of which as much is written as there is room for."""
    height, width = frames[0].shape[:2]
    size = (PICTURE, max(1, round(height * PICTURE / width)))
    row = Image.new("RGB", (len(frames) * (PICTURE + 2), size[1] + LABEL), "white")
    for i, frame in enumerate(frames):
        row.paste(Image.fromarray(frame).resize(size), (i * (PICTURE + 2), LABEL))
    line = " ".join(label.splitlines())
    ImageDraw.Draw(row).text((2, 2), line[: row.width // 7], fill="black")
    return row


def sheet_of(rows: Sequence[Image.Image]) -> Image.Image:
    """The rows, one below the other."""
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet
