"""Measurements: how long layouts take to build. ``python -m radial bench --layouts`` prints the README's table anew."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import torch

from radial.grid import VideoGrid
from radial.layout import build_layout
from radial.patterns import Paper, Pattern, Released

SHAPES = {
    "wan 720p 81 frames": VideoGrid(21, 45, 80),
    "wan 720p 161 frames": VideoGrid(41, 45, 80),
    "wan 720p 321 frames": VideoGrid(81, 45, 80),
    "hunyuan 720p 509 frames": VideoGrid(128, 45, 80, 256),
    "mochi 480p 667 frames": VideoGrid(112, 30, 53, 256),
    "one million tokens": VideoGrid(278, 45, 80),
}


def bench_layouts(out: Path | None = None, repeats: int = 3) -> None:
    """Prints how long each layout takes to build on one thread (median), and optionally writes it as JSON."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    print(f"{'shape':<26} {'pattern':<10} {'tokens':>9} {'kept blocks':>12} {'sparsity':>9} {'seconds':>8}")
    try:
        for name, grid in SHAPES.items():
            patterns: list[Pattern] = [Released(), Paper()] if grid.tokens < 500_000 else [Released()]
            for pattern in patterns:
                times = []
                for _ in range(repeats):
                    build_layout.cache_clear()
                    start = time.perf_counter()
                    layout = build_layout(pattern, grid)
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
                    f"{name:<26} {pattern.name:<10} {grid.tokens:>9,} {layout.kept:>12,} "
                    f"{layout.sparsity:>9.4f} {row['seconds']:>8.3f}"
                )
    finally:
        torch.set_num_threads(threads)
    if out is not None:
        out.write_text(json.dumps({"threads": 1, "torch": torch.__version__, "rows": rows}, indent=1))
