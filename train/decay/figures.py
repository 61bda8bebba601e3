"""The measurement's pictures, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from train.decay.bins import Geometry
from train.decay.fits import KINDS
from train.decay.results import LayerFigures, Velocity
from train.decay.settings import Job

COLOURS = dict(zip(KINDS, ("#1f77b4", "#d62728", "#7f7f7f", "#2ca02c"), strict=True))
_EXAMPLES = 2  # heads of each kind whose curves are drawn


def draw_all(
    job: Job, geometry: Geometry, figures: Sequence[LayerFigures], velocities: Sequence[Velocity]
) -> dict[str, tuple[bytes, str]]:
    """The pictures by file name, each as PNG with its caption."""
    return {
        "curves.png": (
            _curves(job, geometry, figures),
            "Attention over temporal and over spatial distance, as a share of that at distance 0: points are measured, "
            "lines are the exponential fits. The heads of each kind whose alpha is nearest the kind's median, at the "
            "noise level in the middle; the first frame is left out.",
        ),
        "kinds.png": (_kinds(job, figures), "The kind of every head."),
        "kept.png": (
            _kept(job, figures),
            "The share of mass that each pattern keeps, by layer and noise level: the mean over heads.",
        ),
        "velocity.png": (
            _velocities(job, velocities),
            "The relative error of the model's velocity under each pattern, against dense attention; the dashed line "
            "is error=.",
        ),
    }


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _curves(job: Job, geometry: Geometry, figures: Sequence[LayerFigures]) -> bytes:
    sigma = job.sigmas[len(job.sigmas) // 2]
    of = [one for one in figures if one.sigma == sigma]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    in_time, in_space = figure.subplots(1, 2)
    for number, (one, head) in enumerate(_examples(of)):
        kind = one.kinds[head]
        marker, line = (("o", "-"), ("^", "--"))[number % _EXAMPLES]
        for axes, distance, curve, rate, r2, name in (
            (in_time, torch.arange(geometry.distances), one.temporal_curve, one.alpha, one.alpha_r2, "alpha"),
            (in_space, geometry.spatial_distance, one.spatial_curve, one.beta, one.beta_r2, "beta"),
        ):
            slope, y = float(rate.mean[head]), curve[head]
            label = f"layer {one.layer} head {head}, {kind}: {name} {slope:.3g}, R² {float(r2[head]):.2f}"
            axes.plot(distance, y.exp(), marker, color=COLOURS[kind], markersize=3.5, label=label)
            middle = y[y.isfinite()].mean() + slope * distance[y.isfinite()].double().mean()
            axes.plot(distance, (middle - slope * distance).exp(), color=COLOURS[kind], linewidth=1, linestyle=line)
    for axes, label in ((in_time, "temporal distance, latent frames"), (in_space, "spatial distance, tokens")):
        axes.set(yscale="log", xlabel=label, ylabel="attention, of that at distance 0")
        axes.legend(fontsize=6.5, frameon=False)
        axes.grid(alpha=0.3)
    figure.suptitle(f"Decay at sigma {sigma:g}")
    return _png(figure)


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


def _kinds(job: Job, figures: Sequence[LayerFigures]) -> bytes:
    layers = len({one.layer for one in figures})
    heads = len(figures[0].kinds)
    many = len(job.sigmas)
    figure = Figure(figsize=(max(2.6, 0.14 * heads + 1.2) * many, max(2.4, 0.16 * layers + 1.4)), layout="constrained")
    colours, norm = ListedColormap(list(COLOURS.values())), BoundaryNorm(range(len(KINDS) + 1), len(KINDS))
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
    legend = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(KINDS), frameon=False)
    return _png(figure)


def _ticks(axes: object, layers: Sequence[int], most: int = 20) -> None:
    """Names every layer, or evenly spread ones of many."""
    places = range(0, len(layers), -(-len(layers) // most))
    axes.set_yticks(list(places), [str(layers[place]) for place in places])  # type: ignore[attr-defined]


def _kept(job: Job, figures: Sequence[LayerFigures]) -> bytes:
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
    return _png(figure)


def _velocities(job: Job, velocities: Sequence[Velocity]) -> bytes:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, candidate in enumerate(job.candidates):
        for style, dense in enumerate(job.dense_layers):
            of = [v for v in velocities if (v.pattern, v.dense_layers) == (candidate.name, dense)]
            axes.plot(
                [v.sigma for v in of],
                [v.mean for v in of],
                color=f"C{number}",
                linestyle=("-", "--", "-.", ":")[style % 4],
                marker="o",
                markersize=4,
                label=f"{candidate.name}, {dense} dense layers",
            )
    axes.axhline(job.error, color="black", linewidth=1, linestyle="--")
    axes.set(xlabel="sigma", ylabel="relative error of the velocity", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, frameon=False)
    return _png(figure)
