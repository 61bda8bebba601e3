"""Attention on the GPU: every backend against the fastest dense kernel, on the same inputs in one run.

``python -m radial bench`` prints the README's table and draws its picture. Beside the released mask, ``fitted=``
measures masks that differ by head (`radial.known_decays`). Each backend's output and gradients are compared with
float64 at sampled tokens first; a backend that is wrong gets no speed-up. Rounds are interleaved, so that all
candidates see the same clocks, and the median counts. Ideal is the speed-up if time followed the surviving token pairs:
1 / density.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from radial.attention import attention_over
from radial.backends import BACKENDS, AttentionCall
from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.head_layouts import HeadLayout, build_head_layouts
from radial.known_decays import known_pattern
from radial.layout import BlockLayout, build_layout
from radial.patterns import Dense, Released
from radial.sampled_errors import sampled_errors
from radial.whole import written


@dataclass(frozen=True)
class Shape:
    """A clip's grid, the model's number of attention heads, and the released mask's rule for it."""

    grid: VideoGrid
    heads: int
    rule: str = "wan"

    @property
    def released(self) -> Released:
        """The released mask of the model."""
        return Released(rule=self.rule)


SHAPES = {
    "wan_1x": Shape(VideoGrid(21, 45, 80), 40),
    "wan_2x": Shape(VideoGrid(41, 45, 80), 40),
    "wan_4x": Shape(VideoGrid(81, 45, 80), 40),
    "hunyuan_4x": Shape(VideoGrid(128, 45, 80, 256), 24, "hunyuan"),
    "mochi_4x": Shape(VideoGrid(112, 30, 53, 256), 24),
}
HEAD_DIM = 128
_TOLERANCE = 1e-2  # bf16 attention is at 2e-3; a block too many or too few is far above


@dataclass
class Candidate:
    """One way to compute a shape's attention, and what was measured of it. Times are milliseconds."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    layout: BlockLayout | HeadLayout
    differentiable: bool
    mask: str = "released"
    error: float = float("nan")
    forward_ms: float = float("nan")
    both_ms: float = float("nan")


def bench(
    shapes: list[str], backends: list[str], *, heads: int | None, rounds: int, fitted: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """Measures and prints; returns the rows.

    Args:
        shapes: names of `SHAPES`.
        backends: names of backends, dense kernels apart.
        heads: attention heads, None for each model's own.
        rounds: of measurement, after one for warming up.
        fitted: shares of the released mask's blocks at which masks that differ by head are measured too.

    Raises:
        RadialError: no CUDA GPU, an unknown name, or a backend that cannot serve the shapes.
    """
    for given, known, what in ((shapes, SHAPES, "shape"), (backends, BACKENDS, "backend")):
        for name in given:
            if name not in known:
                raise RadialError(f"{what} is {name!r}, expected one of {', '.join(known)}")
    if not torch.cuda.is_available():
        raise RadialError("bench measures GPU kernels and finds no CUDA GPU; python -m radial layouts measures the CPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, bf16, head_dim 128")
    rows = []
    for name in shapes:
        shape = SHAPES[name]
        rows += _bench_shape(name, shape, heads or shape.heads, backends, rounds, fitted)
    return rows


def _candidates(shape: Shape, heads: int, backends: list[str], fitted: Sequence[float]) -> list[Candidate]:
    """cuDNN's dense kernel, fa4's where it runs, then the backends under the released mask and under masks by head."""
    device = torch.device("cuda")
    sparse, dense = build_layout(shape.released, shape.grid).to(device), build_layout(Dense(), shape.grid)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def with_backend(name: str, layout: BlockLayout | HeadLayout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: attention_over(q, k, v, layout, backend=name, in_order=True)  # as models have them

    found = [Candidate("dense cuDNN", sdpa, dense, True, "dense")]
    if BACKENDS["fa4"].why_not(AttentionCall(device, torch.bfloat16, HEAD_DIM, True, False, dense)) is None:
        found.append(Candidate("dense fa4", with_backend("fa4", dense), dense, True, "dense"))
    masks: dict[str, BlockLayout | HeadLayout] = {"released": sparse}
    for part in fitted:
        pattern = known_pattern(shape.grid, heads, part * (1 - sparse.sparsity))
        masks[f"fitted {part:g}"] = build_head_layouts(pattern, shape.grid, 128, layers=1, heads=heads).layer(0)
    for mask, layout in masks.items():
        whole = layout.family if isinstance(layout, HeadLayout) else layout
        for name in backends:
            reasons = [
                BACKENDS[name].why_not(AttentionCall(device, torch.bfloat16, HEAD_DIM, grad, False, whole))
                for grad in (False, True)
            ]
            if reasons[0] is not None:
                raise RadialError(f"attention backend {name} cannot run here: {reasons[0]}")
            found.append(Candidate(name, with_backend(name, layout), layout, reasons[1] is None, mask))
    return found


def _bench_shape(
    name: str, shape: Shape, heads: int, backends: list[str], rounds: int, fitted: Sequence[float]
) -> list[dict[str, Any]]:
    from tqdm import tqdm  # the one part of this package that is not torch's

    candidates = _candidates(shape, heads, backends, fitted)
    n, device = shape.grid.tokens, torch.device("cuda")
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, n, heads, HEAD_DIM, device=device, dtype=torch.bfloat16) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]

    def forward(candidate: Candidate) -> Tensor:
        with torch.no_grad():
            return candidate.run(q, k, v)

    def both(candidate: Candidate) -> tuple[Tensor, ...]:
        out = candidate.run(q, k, v)
        return (out.detach(), *torch.autograd.grad(out, inputs, grad))

    sampled = torch.cat([torch.randint(n, (28,)), torch.tensor([0, n // 2, n - 2, n - 1])]).to(device)
    one_head = [t[0, :, -1].detach() for t in (q, k, v, grad)]
    times: dict[tuple[str, str, str], list[float]] = {}
    for at in tqdm(range(rounds + 1), desc=name, unit="round", leave=False):
        for candidate in candidates:
            if at == 0:
                forward(candidate)  # compiled apart from the one that keeps what its backward needs
                results = both(candidate) if candidate.differentiable else (forward(candidate),)
                if not candidate.layout.is_dense:
                    last = candidate.layout
                    last = last.of_head(heads - 1) if isinstance(last, HeadLayout) else last
                    errors = sampled_errors(last, one_head, [t[0, :, -1] for t in results], sampled)
                    candidate.error = max(errors)
                del results
                continue
            own = (candidate.name, candidate.mask)
            times.setdefault((*own, "forward"), []).append(_milliseconds(forward, candidate))
            if candidate.differentiable:
                times.setdefault((*own, "both"), []).append(_milliseconds(both, candidate))
    for candidate in candidates:
        candidate.forward_ms = median(times[candidate.name, candidate.mask, "forward"])
        if candidate.differentiable:
            candidate.both_ms = median(times[candidate.name, candidate.mask, "both"])
    return _report(name, shape, heads, candidates)


def _milliseconds(work: Callable[[Candidate], Any], candidate: Candidate) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work(candidate)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _report(name: str, shape: Shape, heads: int, candidates: list[Candidate]) -> list[dict[str, Any]]:
    """Prints one shape's table and returns its rows."""
    grid = shape.grid
    sparse = build_layout(shape.released, grid)
    dense = [c for c in candidates if c.layout.is_dense]
    fastest = {way: min(getattr(c, f"{way}_ms") for c in dense) for way in ("forward", "both")}
    print(
        f"\n{name}: {grid.tokens:,} tokens, {heads} heads, {sparse.sparsity:.4f} of all blocks skipped, "
        f"ideal {1 / sparse.density:.2f}x"
    )
    print(f"{'':<24} {'forward':^37} | {'forward + backward':^37}")
    columns = f"{'ms':>9} {'TFLOP/s':>8} {'speed-up':>9} {'of ideal':>8}"
    print(f"{'':<24} {columns} | {columns}")
    rows = []
    for c in candidates:
        row: dict[str, Any] = {
            "shape": name,
            "tokens": grid.tokens,
            "heads": heads,
            "backend": c.name,
            "mask": c.mask,
            "density": sparse.density if c.layout.is_dense else c.layout.density,
            "error": None if c.layout.is_dense else c.error,
        }
        right = c.layout.is_dense or c.error < _TOLERANCE
        cells = []
        for way, passes in (("forward", 1.0), ("both", 3.5)):
            ms = getattr(c, f"{way}_ms")
            rate = passes * c.layout.flops(heads, HEAD_DIM) / ms / 1e9
            speed_up = fastest[way] / ms if right else float("nan")
            row |= {f"{way}_ms": ms, f"{way}_tflops": rate, f"{way}_speed_up": speed_up}
            row[f"{way}_of_ideal"] = share = float("nan") if c.layout.is_dense else speed_up * c.layout.density
            cells.append(f"{ms:>9.2f} {rate:>8.0f} {speed_up:>8.2f}x {share:>8.3f}")
        verdict = "" if right else f"  WRONG: relative error {c.error:.1e}"
        print(
            f"{c.name:<12}{'' if c.layout.is_dense else c.mask:<12} {' | '.join(cells)}{verdict}".replace("nan", "  -"),
            flush=True,
        )
        rows.append(row)
    return rows


def draw_bench(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over the fastest dense kernel against length, forward and with backward: a line a backend, and ideal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    rows = [r for r in rows if not r["mask"].startswith("fitted")]
    ideal = sorted({(r["tokens"], 1 / r["density"]) for r in rows})
    for axes, way, title in zip(
        figure.subplots(1, 2, sharey=True), ("forward", "both"), ("forward", "forward + backward"), strict=True
    ):
        axes.plot(*zip(*ideal, strict=True), "k--", label="ideal: 1 / density")
        for name in dict.fromkeys(r["backend"] for r in rows):
            points = sorted((r["tokens"], r[f"{way}_speed_up"]) for r in rows if r["backend"] == name)
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_xscale("log")
        axes.set_xticks([t for t, _ in ideal], [f"{t:,}" for t, _ in ideal], minor=False)
        axes.minorticks_off()
        axes.set(title=title, xlabel="tokens", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("speed-up over the fastest dense kernel")
    figure.axes[0].legend()
    with written(path) as fresh:
        figure.savefig(fresh, dpi=110)


def write_bench(rows: list[dict[str, Any]], path: Path) -> None:
    """The rows as JSON, with what they were measured on; what was not measured is null."""
    rows = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    with written(path) as fresh:
        fresh.write_text(json.dumps(about | {"rows": rows}, indent=1), encoding="utf-8")
