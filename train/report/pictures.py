"""The pictures of a run: its loss curve, and clips side by side as an animation and as a film strip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.animation import save_gif
from train.loggers.csv_file import read_metrics
from train.report.runs import smoothed

_SCALE = 5  # screen pixels a latent pixel
_MARGIN = 22  # pixels for a label above a panel
_STRIP = 8  # frames of a film strip


def draw_loss(metrics: Path, picture: Path) -> None:
    """The training loss of ``metrics.csv`` over optimizer steps, with its running mean; nothing for an empty log."""
    rows = [(int(row["step"]) + 1, float(row["loss"])) for row in read_metrics(metrics) if row.get("loss")]
    rows = [(step, loss) for step, loss in rows if math.isfinite(loss)]  # skipped steps have none
    if not rows:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    colour = matplotlib.colormaps["Blues"]
    axes.plot(*zip(*rows, strict=True), color=colour(0.45), linewidth=0.8, label="loss of the step")
    axes.plot(*zip(*smoothed(rows), strict=True), color=colour(0.95), linewidth=2, label="running mean")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("flow-matching loss")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(picture, dpi=130)


def _frames(clip: Tensor) -> list[Image.Image]:
    """(3, F, H, W) in [-1, 1] as enlarged pictures."""
    pixels = ((clip.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    size = (clip.shape[3] * _SCALE, clip.shape[2] * _SCALE)
    return [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in pixels]


def animate(panels: Mapping[str, Tensor], title: str, picture: Path) -> None:
    """An animated GIF of clips (3, F, H, W) stacked under their labels, one row a clip."""
    clips = {label: _frames(clip) for label, clip in panels.items()}
    width, height = next(iter(clips.values()))[0].size
    font = ImageFont.load_default(size=14)
    images = []
    for index in range(min(map(len, clips.values()))):
        canvas = Image.new("RGB", (width + 16, _MARGIN + len(clips) * (height + _MARGIN) + 8), "white")
        draw = ImageDraw.Draw(canvas)
        draw.text((8, 3), f"{title}   frame {index + 1}", fill="black", font=font)
        for row, (label, frames) in enumerate(clips.items()):
            top = _MARGIN + row * (height + _MARGIN)
            draw.text((8, top + 2), label, fill="black", font=font)
            canvas.paste(frames[index], (8, top + _MARGIN))
        images.append(canvas)
    save_gif(images, picture, 100)


def film_strip(panels: Mapping[str, Tensor], title: str, picture: Path | IO[bytes]) -> None:
    """A PNG with eight evenly spaced frames of each clip, one row a clip."""
    frames = {label: _frames(clip) for label, clip in panels.items()}
    total = min(map(len, frames.values()))
    chosen = [round(i * (total - 1) / (_STRIP - 1)) for i in range(_STRIP)]
    width, height = (side * 2 // _SCALE for side in next(iter(frames.values()))[0].size)
    font = ImageFont.load_default(size=14)
    canvas = Image.new("RGB", (8 + _STRIP * (width + 4), _MARGIN + len(frames) * (height + _MARGIN) + 8), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 3), f"{title}   frames {', '.join(str(i + 1) for i in chosen)}", fill="black", font=font)
    for row, (label, clip) in enumerate(frames.items()):
        top = _MARGIN + row * (height + _MARGIN)
        draw.text((8, top + 2), label, fill="black", font=font)
        for column, index in enumerate(chosen):
            small = clip[index].resize((width, height), Image.Resampling.LANCZOS)
            canvas.paste(small, (8 + column * (width + 4), top + _MARGIN))
    canvas.save(picture, format="png")
