"""The measurement as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from train.decay.advice import Setting, decaying
from train.decay.fits import KIND_RULE
from train.decay.results import LayerFigures, Value, Velocity
from train.decay.settings import Job
from train.report.document import facts, section, table, write_document

_MOST = 400  # heads in the page's table; decay.json has all


def write_page(
    job: Job,
    about: Mapping[str, object],
    figures: Sequence[LayerFigures],
    velocities: Sequence[Velocity],
    settings: Sequence[Setting],
    sentences: Sequence[str],
    pictures: Sequence[tuple[str, str]],
    out: Path,
) -> None:
    """Writes the page.

    Args:
        about: what was measured (`train.decay.results.about`).
        settings, sentences: of `train.decay.advice`.
        pictures: SVG with their captions (`train.decay.charts`).

    Raises:
        UserError: the file cannot be written.
    """
    title = f"Attention of {job.model}, {job.length}"
    advice = "".join(f"<li>{html.escape(line)}</li>" for line in sentences)
    drawn = "".join(f"<figure><figcaption>{html.escape(text)}</figcaption>{svg}</figure>" for svg, text in pictures)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _facts(job, about),
        section("Findings", f"<ul>{advice}</ul>"),
        section("Pictures", drawn),
        section("Patterns against dense attention, nothing tuned", _patterns(job, figures, velocities)),
        section(f"Settings that keep the velocity within {job.error:g}, cheapest first", _settings(settings)),
        section("Heads, those that do not decay first", _heads(figures)),
        section("How heads are told apart", f"<p>{html.escape(KIND_RULE)}</p>"),
    ]
    write_document(title, parts, out)


def _facts(job: Job, about: Mapping[str, object]) -> str:
    grid, clips = about["grid"], about["clips"]
    assert isinstance(grid, dict) and isinstance(clips, list)
    text = f", {grid['text_tokens']} text tokens" if grid["text_tokens"] else ""
    errors = "over clips" if len(clips) > 1 else "over the replicates of the sampled rows"
    return facts(
        [
            ("grid", f"{grid['frames']} frames of {grid['height']} x {grid['width']} tokens{text}"),
            ("clips", f"{len(clips)}, of the {'model itself' if job.own_samples else 'shards'}"),
            ("noise levels", ", ".join(f"{sigma:g}" for sigma in job.sigmas)),
            ("query rows", f"{job.rows} a tile and frame"),
            ("tiles", f"{about['tile']} tokens"),
            ("temporal positions", str(about["rope"])),
            ("± is a standard error", errors),
        ]
    )


def _patterns(job: Job, figures: Sequence[LayerFigures], velocities: Sequence[Velocity]) -> str:
    rows = []
    for candidate in job.candidates:
        for sigma in job.sigmas:
            of = [one for one in figures if one.sigma == sigma]
            kept = sum(float(one.kept[candidate.name].mean.mean()) for one in of) / len(of)
            output = sum(float(one.output[candidate.name].mean.mean()) for one in of) / len(of)
            errors = {v.dense_layers: v.mean for v in velocities if (v.pattern, v.sigma) == (candidate.name, sigma)}
            velocity = [f"{errors[dense]:.3f}" for dense in job.dense_layers]
            name = html.escape(candidate.name)
            rows.append([name, f"{sigma:g}", f"{kept:.3f}", f"{2 * (1 - kept):.3f}", f"{output:.3f}", *velocity])
    dense = [f"velocity's error, {count} dense layers" for count in job.dense_layers]
    return table(["pattern", "sigma", "kept mass", "L1 of rows", "output's error", *dense], rows)


def _settings(settings: Sequence[Setting]) -> str:
    if not settings:
        return "<p>None.</p>"
    rows = [
        [
            html.escape(one.pattern),
            f"{one.dense_layers}",
            "none" if one.dense_sigma is None else f"from {one.dense_sigma:.2f}",
            "" if one.dense_steps is None else f"{one.dense_steps}",
            f"{one.error:.3f}",
            f"{one.attention / 1e12:.4g}",
            f"{one.attention_share:.1%}",
            f"{one.share:.1%}",
        ]
        for one in settings
    ]
    head = ["pattern", "dense layers", "dense noise levels", "dense steps", "velocity's error", "attention TFLOPs"]
    return table([*head, "of dense attention", "of a dense forward"], rows)


def _heads(figures: Sequence[LayerFigures]) -> str:
    rows = []
    for one in figures:
        fine = decaying(one)
        for head, kind in enumerate(one.kinds):
            cells = [
                f"layer {one.layer} head {head}",
                f"{one.sigma:g}",
                kind,
                _measured(one.alpha, head),
                f"{float(one.alpha_fit.r2[head]):.3f}",
                _measured(one.beta, head),
                f"{float(one.beta_fit.r2[head]):.3f}",
                f"{float(one.first.mean[head]):.1%}",
                *(f"{float(kept.mean[head]):.3f}" for kept in one.kept.values()),
            ]
            rows.append((bool(fine[head]), cells))
    rows.sort(key=lambda row: row[0])
    names = [html.escape(f"kept by {name}") for name in figures[0].kept]
    head_cells = ["head", "sigma", "kind", "alpha", "R²", "beta", "R²", "first frame", *names]
    more = f"<p>{len(rows) - _MOST} more are in decay.json.</p>" if len(rows) > _MOST else ""
    return table(head_cells, [cells for _, cells in rows[:_MOST]]) + more


def _measured(value: Value, head: int) -> str:
    return f"{float(value.mean[head]):.3g} ± {float(value.error[head]):.1g}"
