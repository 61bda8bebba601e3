"""How long layouts take to build: ``python -m radial layouts`` prints the README's table anew."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import torch

from radial.bench import SHAPES, Shape
from radial.grid import VideoGrid
from radial.layout import make_layout
from radial.patterns import Paper, Pattern
from radial.whole import written

TIMED = SHAPES | {"a million": Shape(VideoGrid(278, 45, 80), 40)}


def bench_layouts(out: Path | None = None, repeats: int = 3) -> None:
    """Prints how long each layout takes to build on one thread (median), and optionally writes it as JSON."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    print(f"{'shape':<12} {'pattern':<10} {'tokens':>9} {'kept blocks':>12} {'sparsity':>9} {'seconds':>8}")
    try:
        for name, shape in TIMED.items():
            grid = shape.grid
            patterns: list[Pattern] = [shape.released, Paper()] if grid.tokens < 500_000 else [shape.released]
            for pattern in patterns:
                times = []
                for _ in range(repeats):
                    start = time.perf_counter()
                    layout = make_layout(pattern, grid, 128)
                    times.append(time.perf_counter() - start)
                row = {
                    "shape": name,
                    "pattern": pattern.name,
                    "tokens": grid.tokens,
                    "kept": layout.kept,
                    "sparsity": layout.sparsity,
                    "seconds": median(times),
                }
                rows.append(row)
                print(
                    f"{name:<12} {pattern.name:<10} {grid.tokens:>9,} {layout.kept:>12,} "
                    f"{layout.sparsity:>9.4f} {row['seconds']:>8.3f}"
                )
    finally:
        torch.set_num_threads(threads)
    if out is not None:
        with written(out) as fresh:
            about = {"threads": 1, "torch": torch.__version__}
            fresh.write_text(json.dumps(about | {"rows": rows}, indent=1), encoding="utf-8")
