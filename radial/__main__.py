"""``python -m radial``: look at a mask, list the backends, measure."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from radial.backends import BACKENDS, AttentionCall
from radial.bench import SHAPES, bench, draw_bench, write_bench
from radial.bench_layouts import bench_layouts
from radial.draw import check_picture, draw_layout
from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.layout import BlockLayout, build_layout
from radial.patterns import RULES, Dense, Released, make_pattern


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="python -m radial", description="Radial attention: masks, backends, measurements.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    mask = commands.add_parser("mask", help="sparsity, size and picture of a mask")
    mask.add_argument("--tokens-per-frame", type=int, required=True, metavar="S", help="height x width in tokens")
    mask.add_argument("--frames", type=int, required=True, metavar="F", help="latent frames")
    mask.add_argument("--pattern", default="released", help="released (default), paper or dense")
    mask.add_argument("--rule", help=f"of released: {', '.join(RULES)} (default wan)")
    mask.add_argument("--decay", type=float, help="of released: below 1 is sparser (default 1.0)")
    mask.add_argument("--block", type=int, default=128, metavar="B", help="block size in tokens (default 128)")
    mask.add_argument("--text", type=int, default=0, metavar="N", help="text tokens after the video (default 0)")
    mask.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    mask.add_argument("--save", type=Path, metavar="FILE.npz", help="write the boolean block mask as array 'mask'")
    mask.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the mask with frame boundaries")

    bench = commands.add_parser("bench", help="measure the backends on this GPU")
    bench.add_argument("--shapes", default="wan_1x,wan_2x,wan_4x", help=f"of {', '.join(SHAPES)} (default %(default)s)")
    bench.add_argument("--heads", type=int, metavar="N", help="attention heads (default: each model's own)")
    bench.add_argument("--backends", default="fa4,flex", help="under the released mask (default %(default)s)")
    bench.add_argument("--rounds", type=int, default=3, help="of measurement; the median counts (default %(default)s)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    bench.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the speed-ups against length")

    layouts = commands.add_parser("layouts", help="measure how long layouts take to build on one thread")
    layouts.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")

    commands.add_parser("backends", help="which attention backends are usable here, and why the others are not")
    return parser


def _describe(layout: BlockLayout, seconds: float) -> dict[str, Any]:
    return {
        "pattern": layout.pattern.name,
        "tokens": layout.grid.tokens,
        "video_tokens": layout.grid.video_tokens,
        "text_tokens": layout.grid.text_tokens,
        "frames": layout.grid.frames,
        "tokens_per_frame": layout.grid.tokens_per_frame,
        "block": layout.block,
        "blocks": layout.blocks,
        "kept": layout.kept,
        "sparsity": layout.sparsity,
        "video_sparsity": layout.video_sparsity,
        "flops_against_dense": layout.density,
        "build_seconds": seconds,
    }


def _mask(arguments: argparse.Namespace) -> None:
    grid = VideoGrid(arguments.frames, 1, arguments.tokens_per_frame, arguments.text)
    given = {name: getattr(arguments, name) for name in ("decay", "rule") if getattr(arguments, name) is not None}
    pattern = make_pattern(arguments.pattern, **given)
    if given and not isinstance(pattern, Released):
        raise RadialError(f"--{next(iter(given))} is of pattern released, {pattern.name} has none: leave it out")
    if arguments.save and arguments.save.suffix != ".npz":
        raise RadialError(f"--save is {arguments.save}, expected a file that ends in .npz")
    _check_outputs(arguments.save, arguments.plot)
    if arguments.plot:
        check_picture(arguments.plot)
    start = time.perf_counter()
    layout = build_layout(pattern, grid, arguments.block)
    about = _describe(layout, time.perf_counter() - start)
    if arguments.save:
        import numpy

        numpy.savez_compressed(arguments.save, mask=layout.mask().numpy())
    if arguments.plot:
        draw_layout(layout, arguments.plot)
    if arguments.json:
        print(json.dumps(about))
        return
    settings = f" (rule {pattern.rule}, decay {pattern.decay:g})" if isinstance(pattern, Released) else ""
    print(f"{pattern.name}{settings}: {grid.frames} frames x {grid.tokens_per_frame} tokens = {grid.tokens:,} tokens")
    print(f"  blocks         {layout.kept:,} of {layout.blocks:,} x {layout.blocks:,} survive (block {layout.block})")
    print(f"  sparsity       {layout.sparsity:.4f}   ({layout.video_sparsity:.4f} among complete video blocks)")
    print(f"  FLOPs          {layout.density:.4f} of dense attention, {1 / layout.density:.2f}x fewer")
    print(f"  built in       {about['build_seconds']:.3f} s")
    for path in (arguments.save, arguments.plot):
        if path:
            print(f"  wrote          {path}")


def _check_outputs(*paths: Path | None) -> None:
    for path in paths:
        if path and not path.parent.is_dir():
            raise RadialError(f"{path}: the folder {path.parent} does not exist, create it first")


def _bench(arguments: argparse.Namespace) -> None:
    _check_outputs(arguments.json, arguments.plot)
    if arguments.plot:
        check_picture(arguments.plot)
    for name in ("heads", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise RadialError(f"--{name} is {value}, expected at least 1")
    rows = bench(
        arguments.shapes.split(","), arguments.backends.split(","), heads=arguments.heads, rounds=arguments.rounds
    )
    if arguments.json:
        write_bench(rows, arguments.json)
    if arguments.plot:
        draw_bench(rows, arguments.plot)


def _backends() -> None:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    sparse = build_layout(Released(), VideoGrid(8, 16, 16))
    dense = build_layout(Dense(), VideoGrid(8, 16, 16))
    print(f"{'backend':<12} {'device':<6} {'layout':<8} usable")
    for name, backend in BACKENDS.items():
        for device in devices:
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            for kind, layout in (("sparse", sparse), ("dense", dense)):
                trains, infers = (
                    backend.why_not(AttentionCall(torch.device(device), dtype, 128, grad, False, layout))
                    for grad in (True, False)
                )
                usable = "yes" if trains is None else f"no: {infers}" if infers else "without gradients"
                print(f"{name:<12} {device:<6} {kind:<8} {usable}")


def main(arguments: list[str] | None = None) -> None:
    """The command line; a mistake is one line on stderr and exit code 2."""
    parsed = _parser().parse_args(arguments)
    try:
        if parsed.command == "mask":
            _mask(parsed)
        elif parsed.command == "bench":
            _bench(parsed)
        elif parsed.command == "layouts":
            _check_outputs(parsed.json)
            bench_layouts(parsed.json)
        else:
            _backends()
    except RadialError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"error: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
