"""From the measured parts to the figures of heads and patterns, and the file that masks are fitted to.

Figures are means over clips. Standard errors are over clips; with one clip they are over the replicates of its sampled
rows (`train.decay.bins`).

``decay.safetensors`` holds, for each noise level and layer (``sigma_0.6/layer_7/…``), float32 means over clips:

    mass        (heads, 2 frames - 1, tiles, tiles)    at [h, frames - 1 + d, a, b]: the share of its attention that a
                query of tile a gives to all keys of tile b of the frame d later (earlier where d is negative), the mean
                over all frames that have one; the first frame as key is left out
    sink        (heads, frames, tiles, tiles)          at [h, i, a, b]: the same of a query of frame i and tile b of the
                first frame
    text_keys   (heads, tiles)                         the share that a query of tile a gives to text

For a query, mass over all frames around it, sink and text_keys add up to about 1: not exactly, since ``mass`` is the
mean over all pairs of frames at a distance. Curves have a tensor a noise level:

    sigma_0.6/temporal_curve    (layers, heads, frames - 1) natural logarithm, 0 at distance 0 (`train.decay.fits`)
    sigma_0.6/spatial_curve     (layers, heads, distances) the same over spatial distance
    sigma_0.6/joint             (layers, heads, frames - 1, distances) mass, after the first frame

``tile_of`` (tokens_per_frame,) int64 is the tile of each place of a frame, ``spatial_distance`` (distances,) is in
tokens. The file's metadata has ``about``, the ``about`` of decay.json as JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.decay.bins import Geometry
from train.decay.fits import Fit, chained, fit_decay, kinds, standard_error
from train.decay.measure import Part
from train.decay.settings import Job

TABLES = ("mass", "sink", "text_keys")


@dataclass(frozen=True)
class Value:
    """A mean and its standard error, each (heads,)."""

    mean: Tensor
    error: Tensor

    @classmethod
    def of(cls, samples: Tensor) -> Value:
        """Mean and standard error of samples (clips, replicates, heads)."""
        return cls(samples.double().mean((0, 1)), _error(samples))


@dataclass(frozen=True)
class LayerFigures:
    """The heads of one layer at one noise level.

    Attributes:
        kinds: of each head (`train.decay.fits.KIND_RULE`).
        alpha, beta: what the curves over temporal and over spatial distance fall by, a frame and a token.
        alpha_fit, beta_fit: these fits, of (heads,).
        first, text: the share of mass on the first frame and on text.
        text_on_video: of text queries, the share of mass on the video, (heads,).
        kept: by pattern, the share of mass that it keeps.
        output: by pattern, the relative error of each head's output.
        temporal_curve, spatial_curve, joint: as in decay.safetensors, of this layer.
    """

    layer: int
    sigma: float
    kinds: list[str]
    alpha: Value
    alpha_fit: Fit
    beta: Value
    beta_fit: Fit
    first: Value
    text: Value
    text_on_video: Tensor
    kept: dict[str, Value]
    output: dict[str, Value]
    temporal_curve: Tensor
    spatial_curve: Tensor
    joint: Tensor


@dataclass(frozen=True)
class Velocity:
    """The relative error of the model's velocity under a pattern with so many first layers dense, a value a clip."""

    pattern: str
    dense_layers: int
    sigma: float
    clips: list[float]

    @property
    def mean(self) -> float:
        """The mean over the clips."""
        return sum(self.clips) / len(self.clips)


def layer_figures(job: Job, geometry: Geometry, parts: Sequence[Part], layer: int, sigma: float) -> LayerFigures:
    """The figures of a layer at a noise level, from its parts."""
    here = [part for part in parts if part.sigma == sigma]

    def read(name: str) -> Tensor:
        return torch.stack([part.tensor(f"{layer}/{name}") for part in here])

    in_time = geometry.temporal_pairs
    frames = torch.arange(geometry.distances, dtype=torch.float64)
    temporal, spatial, joint = read("temporal"), read("spatial"), read("joint").mean((0, 1))
    alpha, alpha_fit, temporal_curve = _decay(temporal, frames, in_time)
    beta, beta_fit, spatial_curve = _decay(spatial, geometry.spatial_distance, geometry.spatial_pairs)
    first = Value.of(read("first"))
    kept, output, rows = read("kept"), read("error"), read("text_rows").mean(0)
    names = [candidate.name for candidate in job.candidates]
    return LayerFigures(
        layer,
        sigma,
        kinds(joint.double(), first.mean, in_time, geometry.spatial_pairs),
        alpha,
        alpha_fit,
        beta,
        beta_fit,
        first,
        Value.of(read("text")),
        rows[:, :-1].sum(-1).double(),
        {name: Value.of(kept[:, number]) for number, name in enumerate(names)},
        {name: Value.of(output[:, number, None]) for number, name in enumerate(names)},
        temporal_curve,
        spatial_curve,
        joint,
    )


def _decay(chain: Tensor, distance: Tensor, pairs: Tensor) -> tuple[Value, Fit, Tensor]:
    """Rate and fit of each head, and its curve, from (clips, replicates, heads, 2, distances - 1)."""
    curve = chained(chain.double().sum((0, 1)))
    fit = fit_decay(distance, curve, pairs)
    single = fit_decay(distance, chained(chain.sum(1) if len(chain) > 1 else chain[0]), pairs).rate
    return Value(fit.rate, standard_error(single)), fit, curve


def _error(samples: Tensor) -> Tensor:
    """The standard error of (clips, replicates, heads)."""
    return standard_error(samples.mean(1) if len(samples) > 1 else samples[0])


def velocities(job: Job, parts: Sequence[Part]) -> list[Velocity]:
    """The errors of the velocity, of every pattern, number of dense layers and noise level."""
    found = []
    for sigma in job.sigmas:
        errors = torch.stack([part.tensor("velocity") for part in parts if part.sigma == sigma])
        for number, candidate in enumerate(job.candidates):
            for place, dense in enumerate(job.dense_layers):
                found.append(Velocity(candidate.name, dense, sigma, errors[:, number, place].tolist()))
    return found


def head_rows(figures: LayerFigures) -> list[dict[str, object]]:
    """A layer's figures as decay.json has them, a row a head; what is not a number is null."""

    def both(name: str, of: Value, head: int) -> dict[str, float | None]:
        return {name: _plain(of.mean[head]), f"{name}_se": _plain(of.error[head])}

    rows: list[dict[str, object]] = []
    for head, kind in enumerate(figures.kinds):
        kept = {name: both("kept", of, head) for name, of in figures.kept.items()}
        for name, row in kept.items():
            row["l1"] = 2 * (1 - float(figures.kept[name].mean[head]))
            row |= both("output_error", figures.output[name], head)
        rows.append(
            {
                "layer": figures.layer,
                "head": head,
                "sigma": figures.sigma,
                "kind": kind,
                **both("alpha", figures.alpha, head),
                "alpha_r2": _plain(figures.alpha_fit.r2[head]),
                **both("beta", figures.beta, head),
                "beta_r2": _plain(figures.beta_fit.r2[head]),
                **both("first_frame", figures.first, head),
                **both("text", figures.text, head),
                "text_on_video": _plain(figures.text_on_video[head]),
                "patterns": kept,
            }
        )
    return rows


def _plain(value: Tensor) -> float | None:
    number = float(value)
    return number if number == number else None


def tables(
    geometry: Geometry, parts: Sequence[Part], figures: Sequence[LayerFigures], each: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """What ``decay.safetensors`` holds (the module text).

    Args:
        each: is called after every layer.
    """
    found = {"tile_of": geometry.tile_of, "spatial_distance": geometry.spatial_distance}
    for one in figures:
        here = [part for part in parts if part.sigma == one.sigma]
        for name in TABLES:
            total = sum((part.tensor(f"{one.layer}/{name}") for part in here), torch.zeros(()))
            found[f"sigma_{one.sigma:g}/layer_{one.layer}/{name}"] = total / len(here)
        each()
    for sigma in sorted({one.sigma for one in figures}):
        of = [one for one in figures if one.sigma == sigma]
        for name in ("temporal_curve", "spatial_curve", "joint"):
            found[f"sigma_{sigma:g}/{name}"] = torch.stack([getattr(one, name).float() for one in of])
    return {name: tensor.contiguous() for name, tensor in found.items()}


def about(job: Job, geometry: Geometry, parts: Sequence[Part], layers: Sequence[int], heads: int) -> dict[str, object]:
    """What was measured, for both files."""
    grid = geometry.grid
    return {
        "model": job.model,
        "family": job.config.model.family,
        "rope": job.config.model.rope,
        "grid": dataclasses.asdict(grid),
        "length": job.length,
        "tile": str(job.tiling),
        "tiles": geometry.tiles,
        "layers": list(layers),
        "heads": heads,
        "sigmas": list(job.sigmas),
        "clips": list(dict.fromkeys(part.clip for part in parts)),
        "clips_from": "samples" if job.own_samples else "shards",
        "rows": job.rows,
        "seed": job.config.seed,
    }
