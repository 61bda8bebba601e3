"""The measurement's pictures, as SVG for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
import torch
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from train.decay.bins import Geometry
from train.decay.fits import KINDS
from train.decay.results import LayerFigures, Velocity
from train.decay.settings import Job
from train.report.charts import COLOURS, INK, STYLE, svg

_KIND_COLOURS = dict(zip(KINDS, (COLOURS[0], COLOURS[1], COLOURS[9], COLOURS[2]), strict=True))
_EXAMPLES = 2  # heads of each kind whose curves are drawn


def draw_all(
    job: Job, geometry: Geometry, figures: Sequence[LayerFigures], velocities: Sequence[Velocity]
) -> list[tuple[str, str]]:
    """The pictures, each an ``<svg>`` element with its caption."""
    drawn: list[tuple[Callable[[], Figure], str]] = [
        (
            lambda: _curves(job, geometry, figures),
            "Attention over temporal and over spatial distance, as a share of that at distance 0: points are measured, "
            "lines are the exponential fits. The heads of each kind whose alpha is nearest the kind's median, at the "
            "noise level in the middle; the first frame is left out.",
        ),
        (lambda: _kinds(job, figures), "The kind of every head."),
        (
            lambda: _kept(job, figures),
            "The share of mass that each pattern keeps, by layer and noise level: the mean over heads.",
        ),
        (
            lambda: _velocities(job, velocities),
            "The relative error of the model's velocity under each pattern, against dense attention; the dotted line "
            "is error=.",
        ),
    ]
    with matplotlib.rc_context({**STYLE, "font.size": 9}):
        return [(svg(draw(), caption), caption) for draw, caption in drawn]


def _curves(job: Job, geometry: Geometry, figures: Sequence[LayerFigures]) -> Figure:
    sigma = job.sigmas[len(job.sigmas) // 2]
    of = [one for one in figures if one.sigma == sigma]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    in_time, in_space = figure.subplots(1, 2)
    for number, (one, head) in enumerate(_examples(of)):
        kind = one.kinds[head]
        marker, line = (("o", "-"), ("^", "--"))[number % _EXAMPLES]
        for axes, distance, curve, fit, name in (
            (in_time, torch.arange(geometry.distances), one.temporal_curve, one.alpha_fit, "alpha"),
            (in_space, geometry.spatial_distance, one.spatial_curve, one.beta_fit, "beta"),
        ):
            rate, start, r2 = (float(of_heads[head]) for of_heads in (fit.rate, fit.start, fit.r2))
            label = f"layer {one.layer} head {head}, {kind}: {name} {rate:.3g}, R² {r2:.2f}"
            colour = _KIND_COLOURS[kind]
            axes.plot(distance, curve[head].exp(), marker, color=colour, markersize=3.5, label=label)
            axes.plot(distance, (start - rate * distance).exp(), color=colour, linewidth=1, linestyle=line)
    for axes, label in ((in_time, "temporal distance, latent frames"), (in_space, "spatial distance, tokens")):
        axes.set(yscale="log", xlabel=label, ylabel="attention, of that at distance 0")
        axes.legend(fontsize=6.5, frameon=False)
        axes.grid()
    figure.suptitle(f"Decay at sigma {sigma:g}")
    return figure


def _examples(figures: Sequence[LayerFigures]) -> list[tuple[LayerFigures, int]]:
    """The heads of each kind that are nearest to its median alpha."""
    found = []
    for kind in KINDS:
        heads = [(one, head) for one in figures for head, each in enumerate(one.kinds) if each == kind]
        if heads:
            rates = torch.tensor([float(one.alpha.mean[head]) for one, head in heads]).nan_to_num(0.0)
            order = (rates - rates.median()).abs().argsort(stable=True)[:_EXAMPLES]
            found += [heads[index] for index in order.tolist()]
    return found


def _kinds(job: Job, figures: Sequence[LayerFigures]) -> Figure:
    layers = len({one.layer for one in figures})
    heads = len(figures[0].kinds)
    many = len(job.sigmas)
    figure = Figure(figsize=(max(2.6, 0.14 * heads + 1.2) * many, max(2.4, 0.16 * layers + 1.4)), layout="constrained")
    colours, norm = ListedColormap(list(_KIND_COLOURS.values())), BoundaryNorm(range(len(KINDS) + 1), len(KINDS))
    for axes, sigma in zip(figure.subplots(1, many, squeeze=False)[0], job.sigmas, strict=True):
        of = [one for one in figures if one.sigma == sigma]
        axes.imshow(
            [[KINDS.index(kind) for kind in one.kinds] for one in of],
            cmap=colours,
            norm=norm,
            aspect="auto",
            interpolation="nearest",
        )
        _ticks(axes, [one.layer for one in of])
        axes.set_xticks(range(0, heads, -(-heads // 20)))
        axes.set(title=f"sigma {sigma:g}", xlabel="head", ylabel="layer")
    legend = [Patch(color=colour, label=kind) for kind, colour in _KIND_COLOURS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(KINDS), frameon=False)
    return figure


def _ticks(axes: object, layers: Sequence[int], most: int = 20) -> None:
    """Names every layer, or evenly spread ones of many."""
    places = range(0, len(layers), -(-len(layers) // most))
    axes.set_yticks(list(places), [str(layers[place]) for place in places])  # type: ignore[attr-defined]


def _kept(job: Job, figures: Sequence[LayerFigures]) -> Figure:
    layers = sorted({one.layer for one in figures})
    many = len(job.candidates)
    figure = Figure(figsize=(2.6 * many + 1, max(2.6, 0.2 * len(layers) + 1.4)), layout="constrained")
    panels = figure.subplots(1, many, squeeze=False)[0]
    for axes, candidate in zip(panels, job.candidates, strict=True):
        shares = [
            [
                float(one.kept[candidate.name].mean.mean())
                for sigma in job.sigmas
                for one in figures
                if (one.layer, one.sigma) == (layer, sigma)
            ]
            for layer in layers
        ]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap=colormaps["viridis"], aspect="auto", interpolation="nearest")
        axes.set_xticks(range(len(job.sigmas)), [f"{sigma:g}" for sigma in job.sigmas])
        _ticks(axes, layers)
        axes.set(title=candidate.name, xlabel="sigma", ylabel="layer")
        for row, line in enumerate(shares if len(layers) <= 40 else []):
            for column, share in enumerate(line):
                dark = "white" if share < 0.6 else "black"
                axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=6.5, color=dark)
    figure.colorbar(image, ax=panels, label="kept mass")
    return figure


def _velocities(job: Job, velocities: Sequence[Velocity]) -> Figure:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, candidate in enumerate(job.candidates):
        for style, dense in enumerate(job.dense_layers):
            of = [v for v in velocities if (v.pattern, v.dense_layers) == (candidate.name, dense)]
            axes.plot(
                [v.sigma for v in of],
                [v.mean for v in of],
                color=COLOURS[number % len(COLOURS)],
                linestyle=("-", "--", "-.")[style % 3],
                marker="o",
                markersize=4,
                label=f"{candidate.name}, {dense} dense layers",
            )
    axes.axhline(job.error, color=INK, linewidth=1, linestyle=":")
    axes.set(xlabel="sigma", ylabel="relative error of the velocity", ylim=(0, None))
    axes.grid()
    axes.legend(fontsize=7, frameon=False)
    return figure
