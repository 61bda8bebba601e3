"""The picture of a layout: which block pairs are computed, with frame boundaries where tokens are in raster order."""

from __future__ import annotations

from pathlib import Path

from torch.nn import functional as F

from radial.errors import RadialError
from radial.layout import BlockLayout
from radial.whole import written

_PIXELS = 1400  # above this many blocks a side the picture shows the share kept in each cell of several blocks


def check_picture(path: str | Path) -> None:
    """Raises when `draw_layout` could not write a picture of that name.

    Raises:
        RadialError: matplotlib is missing, or it cannot write that ending.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RadialError("pictures need matplotlib: pip install matplotlib") from error
    path = Path(path)
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise RadialError(f"cannot draw to {path}: its ending is not one of {', '.join(sorted(known))}")


def draw_layout(layout: BlockLayout, path: str | Path) -> None:
    """Writes the block mask of ``layout`` as a picture (format by the file's ending).

    Raises:
        RadialError: see `check_picture`.
    """
    check_picture(path)
    import matplotlib
    from matplotlib.figure import Figure

    grid, blocks = layout.grid, layout.blocks
    shown = layout.mask().float()[None, None]
    cell = -(-blocks // _PIXELS)
    shown = F.avg_pool2d(F.pad(shown, (0, -blocks % cell, 0, -blocks % cell)), cell)[0, 0]

    figure = Figure(figsize=(7.2, 7.6), layout="constrained")
    axes = figure.subplots()
    side = shown.shape[0] * cell
    axes.imshow(
        shown.numpy(),
        cmap=matplotlib.colormaps["Blues"],
        vmin=0,
        vmax=1.15,
        extent=(0, side, side, 0),
        interpolation="nearest",
    )
    in_order = layout.order is None
    every = -(-grid.frames // 32)
    per_frame = grid.tokens_per_frame / layout.block
    for frame in range(0, grid.frames + 1, every) if in_order else ():
        for line in (axes.axhline, axes.axvline):
            line(frame * per_frame, color="black", linewidth=0.4, alpha=0.35)
    if grid.text_tokens:
        for line in (axes.axhline, axes.axvline):
            line(grid.frames * per_frame, color="crimson", linewidth=1.0)
    ticks = range(0, grid.frames, max(every, -(-grid.frames // 8)))
    if in_order:
        axes.set_xticks([t * per_frame for t in ticks], [str(t) for t in ticks])
        axes.set_yticks([t * per_frame for t in ticks], [str(t) for t in ticks])
    axes.set_xlim(0, blocks)
    axes.set_ylim(blocks, 0)
    axes.set_xlabel("key frame" if in_order else "key block, in the pattern's order of tokens")
    axes.set_ylabel("query frame" if in_order else "query block")
    text = f" + {grid.text_tokens} text" if grid.text_tokens else ""
    axes.set_title(
        f"{layout.pattern.name}: {grid.frames} frames x {grid.tokens_per_frame} tokens{text}\n"
        f"{layout.kept:,} of {blocks**2:,} blocks of {layout.block} computed (sparsity {layout.sparsity:.1%})"
    )
    with written(Path(path)) as fresh:
        figure.savefig(fresh, dpi=150)
