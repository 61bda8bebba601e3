"""``python -m radial``: look at a mask, list the backends, measure."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from radial.backends.listing import BackendsOptions, show_backends
from radial.bench import SHAPES, bench, draw_bench, write_bench
from radial.bench_layouts import bench_layouts
from radial.cli.command import Command, Commands
from radial.cli.settings import Bound, at_least, each, setting, within
from radial.draw import check_picture, draw_layout
from radial.errors import RadialError
from radial.fit import fit, measured_clip
from radial.grid import VideoGrid
from radial.known_decays import fit_known
from radial.layout import BlockLayout, build_layout
from radial.patterns import PATTERNS, RULES, Fitted, HeadMasks, Random, Released, SlidingTile, make_pattern
from radial.whole import written

_SHARE = Bound("a share of dense attention's blocks, above 0 and at most 1", lambda value: 0 < value <= 1)
_SEEDS = Bound("at least 0 and less than 2^32", lambda value: 0 <= value < 2**32)


@dataclass
class MaskOptions:
    """Which mask, and what is made of it."""

    frames: int = setting("latent frames", must=at_least(1))
    tokens_per_frame: int | None = setting("height x width in tokens; null: give these two", None, must=at_least(1))
    height: int | None = setting(
        "of a frame in tokens, which pattern sliding_tile needs; null: unknown", None, must=at_least(1)
    )
    width: int | None = setting("of a frame in tokens; null: unknown", None, must=at_least(1))
    pattern: str = setting("which one", "released", tuple(PATTERNS))
    masks: Path | None = setting(
        "of pattern fitted: the file of python -m radial fit; shown are the blocks that most heads keep, as many "
        "as a head keeps in the mean", None,
    )  # fmt: skip
    rule: str | None = setting(
        "of the released mask, or of that which random has as many blocks as; null: wan", None, RULES
    )
    decay: float | None = setting("of the same: below 1 is sparser; null: 1.0", None)
    block: int = setting("side of a block", 128, unit="tokens")
    text: int = setting("text tokens after the video", 0, must=at_least(0))
    json: bool = setting("print one JSON object and nothing else", False)
    save: Path | None = setting("write the boolean block mask as array 'mask' of this .npz file", None)
    plot: Path | None = setting("draw the mask with frame boundaries into this .png file", None)


@dataclass
class FitOptions:
    """What is fitted, and how."""

    share: float = setting(
        "of all blocks of clips of the measured length that is kept, the mean over layers and heads", must=_SHARE
    )
    decay: Path | None = setting(
        "decay.safetensors of python -m train.decay with tile=strip or tile=patch; null: that of known=", None
    )
    known: str | None = setting(
        "instead of decay, for benchmarks: heads of a clip of this size whose attention falls off at known rates",
        None, tuple(SHAPES),
    )  # fmt: skip
    layers: int | None = setting("with known=: of its model; null: 2", None, must=at_least(1))
    coverage: float = setting(
        "of that, the part that is drawn, thin and even, other pairs in each head; 1 draws all of it", 0.5,
        must=within(0, 1),
    )  # fmt: skip
    separable: bool = setting(
        "with decay=: fit to masses that fall off exponentially with both distances, as near as can be to each head's; "
        "tried on one small model",
        False,
    )
    dense_layers: int | None = setting(
        "with decay=: so many of the first layers get no masks, as attention.dense_layers; null: 2", None,
        must=at_least(0),
    )  # fmt: skip
    seed: int = setting("of the draw", 0, must=_SEEDS)
    out: Path = setting("file of the masks", Path("masks.safetensors"))


@dataclass
class BenchOptions:
    """What is measured."""

    shapes: list[str] = setting("models and lengths", ["wan_1x", "wan_2x", "wan_4x"], tuple(SHAPES))
    heads: int | None = setting("attention heads; null: each model's own", None, must=at_least(1))
    backends: list[str] = setting("that compute the released mask, beside dense attention", ["fa4", "flex"])
    fitted: list[float] = setting(
        "masks that differ by head are measured too, at so much of the released mask's blocks; such as 1,0.6", [],
        must=each(_SHARE),
    )  # fmt: skip
    rounds: int = setting("of measurement; the median counts", 3, must=at_least(1))
    json: Path | None = setting("also write the figures to this file", None)
    plot: Path | None = setting("also draw the speed-ups against length into this .png file", None)


@dataclass
class LayoutsOptions:
    """Where the figures go."""

    json: Path | None = setting("also write the figures to this file", None)


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


def show_mask(arguments: MaskOptions) -> None:
    """Builds the layout, prints its figures, writes and draws it."""
    height, width = _frame_of(arguments)
    given = {name: getattr(arguments, name) for name in ("decay", "rule") if getattr(arguments, name) is not None}
    pattern = make_pattern(arguments.pattern, **given, masks=arguments.masks)
    if arguments.height is None:
        if isinstance(pattern, SlidingTile):
            raise RadialError(
                f"height and width are not set, and the tiles of pattern {pattern.name} lie in frames of height x "
                "width tokens: give both in place of tokens_per_frame"
            )
        if isinstance(pattern, Fitted) and pattern.masks.about.height * pattern.masks.about.width == width:
            height, width = pattern.masks.about.height, pattern.masks.about.width
    grid = VideoGrid(arguments.frames, height, width, arguments.text)
    if given and not isinstance(pattern, Released | Random):
        raise RadialError(
            f"{next(iter(given))} is of pattern released or random, {pattern.name} has none: leave it out"
        )
    if arguments.save and arguments.save.suffix != ".npz":
        raise RadialError(f"save is {arguments.save}, expected a file that ends in .npz")
    _check_outputs(arguments.save, arguments.plot)
    if arguments.plot:
        check_picture(arguments.plot)
    start = time.perf_counter()
    layout = build_layout(pattern, grid, arguments.block)
    about = _describe(layout, time.perf_counter() - start)
    if arguments.save:
        import numpy

        with written(arguments.save) as fresh:
            numpy.savez_compressed(fresh, mask=layout.mask().numpy())
    if arguments.plot:
        draw_layout(layout, arguments.plot)
    if arguments.json:
        print(json.dumps(about))
        return
    released = pattern.like if isinstance(pattern, Random) else pattern
    settings = f" (rule {released.rule}, decay {released.decay:g})" if isinstance(released, Released) else ""
    print(f"{pattern.name}{settings}: {grid.frames} frames x {grid.tokens_per_frame} tokens = {grid.tokens:,} tokens")
    print(f"  blocks         {layout.kept:,} of {layout.blocks:,} x {layout.blocks:,} survive (block {layout.block})")
    print(f"  sparsity       {layout.sparsity:.4f}   ({layout.video_sparsity:.4f} among complete video blocks)")
    print(f"  FLOPs          {layout.density:.4f} of dense attention, {1 / layout.density:.2f}x fewer")
    print(f"  built in       {about['build_seconds']:.3f} s")
    for path in (arguments.save, arguments.plot):
        if path:
            print(f"  wrote          {path}")


def _frame_of(arguments: MaskOptions) -> tuple[int, int]:
    """Height and width of a frame in tokens; a frame of which the number of tokens alone is known is one row."""
    tokens, height, width = arguments.tokens_per_frame, arguments.height, arguments.width
    if tokens is None and height is not None and width is not None:
        return height, width
    if tokens is not None and height is None and width is None:
        return 1, tokens
    raise RadialError(
        f"tokens_per_frame is {tokens}, height {height} and width {width}: give tokens_per_frame alone, or both others"
    )


def _check_outputs(*paths: Path | None) -> None:
    for path in paths:
        if path and not path.parent.is_dir():
            raise RadialError(f"{path}: the folder {path.parent} does not exist, create it first")


def fit_masks(arguments: FitOptions) -> None:
    """Fits masks, writes them, and prints what they are."""
    _check_outputs(arguments.out)
    if arguments.out.suffix != ".safetensors":
        raise RadialError(f"out is {arguments.out}, expected a file that ends in .safetensors")
    if (arguments.decay is None) == (arguments.known is None):
        raise RadialError("decay and known are both set or neither, expected one of them")
    if arguments.separable and arguments.known is not None:
        raise RadialError("separable is of decay=, masses of known= fall off exponentially anyway: leave it out")
    if arguments.dense_layers is not None and arguments.known is not None:
        raise RadialError("dense_layers is of decay=, all layers of known= get masks: leave it out")
    if arguments.layers is not None and arguments.decay is not None:
        raise RadialError("layers is of known=, a decay file has its model's: leave it out")
    if arguments.decay is not None:
        fit(
            arguments.decay,
            arguments.out,
            share=arguments.share,
            coverage=arguments.coverage,
            separable=arguments.separable,
            dense_layers=2 if arguments.dense_layers is None else arguments.dense_layers,
            seed=arguments.seed,
        )
        grid = measured_clip(arguments.decay)
    else:
        shape = SHAPES[str(arguments.known)]
        grid = shape.grid
        fit_known(
            grid,
            arguments.out,
            heads=shape.heads,
            layers=arguments.layers or 2,
            share=arguments.share,
            coverage=arguments.coverage,
            seed=arguments.seed,
        )
    masks = HeadMasks.read(arguments.out)
    about = masks.about
    layout = build_layout(Fitted(masks), grid, about.block)
    heads = masks.heads * len(about.layers)
    print(f"masks of {masks.heads} heads in layers {about.layers[0]} to {about.layers[-1]}")
    text = f" and {grid.text_tokens} of text" if grid.text_tokens else ""
    size = f"{about.frames} frames of {about.height} x {about.width} tokens{text}"
    print(f"  fitted to      {size}, blocks of {about.block}")
    print(f"  order          {about.order}")
    if about.separable:
        others = ", ".join(f"layer {layer} head {head}" for layer, head in about.not_separable)
        print(f"  masses         separable{others and f', but as measured where none are near: {others}'}")
    print(f"  blocks         {1 - layout.sparsity:.4f} of dense attention's, the mean over heads")
    print(f"  drawn          {about.rate:.4f} of the other pairs, each by {about.rate * heads:.3g} of {heads} heads")
    print(f"  wrote          {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB)")


def measure_backends(arguments: BenchOptions) -> None:
    """Measures backends, prints their times, writes and draws them."""
    _check_outputs(arguments.json, arguments.plot)
    if arguments.plot:
        check_picture(arguments.plot)
    rows = bench(
        arguments.shapes, arguments.backends, heads=arguments.heads, rounds=arguments.rounds, fitted=arguments.fitted
    )
    if arguments.json:
        write_bench(rows, arguments.json)
    if arguments.plot:
        draw_bench(rows, arguments.plot)


def time_layouts(arguments: LayoutsOptions) -> None:
    """Measures how long layouts take, prints and writes it."""
    _check_outputs(arguments.json)
    bench_layouts(arguments.json)


def _explain(error: OSError) -> str:
    return f"cannot write {error.filename}: {error.strerror}"


COMMANDS: dict[str, tuple[str, type, Callable[..., None]]] = {
    "mask": ("sparsity, size and picture of a mask", MaskOptions, show_mask),
    "fit": ("masks for each head of a model, from what train.decay measured", FitOptions, fit_masks),
    "bench": ("measure the backends on this GPU", BenchOptions, measure_backends),
    "layouts": ("measure how long layouts take to build on one thread", LayoutsOptions, time_layouts),
    "backends": (
        "which attention backends are usable here, and why the others are not",
        BackendsOptions,
        show_backends,
    ),
}
main = Commands(
    "python -m radial",
    "Radial attention: masks, backends, measurements.",
    {
        name: (about, partial(Command, f"python -m radial {name}", f"{about[0].upper()}{about[1:]}.", schema, work,
                              positional="decay" if schema is FitOptions else None, explain=_explain))
        for name, (about, schema, work) in COMMANDS.items()
    },
)  # fmt: skip

if __name__ == "__main__":
    main.run()
