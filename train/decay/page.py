"""The measurement as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

from train.decay.advice import Setting, decaying
from train.decay.fits import KIND_RULE
from train.decay.results import LayerFigures, Velocity
from train.decay.settings import Job

_MOST = 400  # heads in the page's table; decay.json has all
_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1240px;padding:1.5rem}
h1{margin:0;font-size:1.5rem}h2{margin:2rem 0 .6rem;font-size:1.15rem;border-bottom:1px solid var(--line)}
figure{margin:0 0 1rem;padding:.6rem;background:var(--soft);border-radius:.5rem}figcaption{font-size:.9rem}
img{max-width:100%;background:#fff;border-radius:.3rem}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.25rem .8rem;text-align:right;
border-bottom:1px solid var(--line)}th:first-child,td:first-child{text-align:left}
"""


def page(
    job: Job,
    about: Mapping[str, object],
    figures: Sequence[LayerFigures],
    velocities: Sequence[Velocity],
    settings: Sequence[Setting],
    sentences: Sequence[str],
    pictures: Mapping[str, tuple[bytes, str]],
) -> str:
    """The page's text.

    Args:
        about: what was measured (`train.decay.results.about`).
        settings, sentences: of `train.decay.advice`.
        pictures: of `train.decay.figures`.
    """
    title = html.escape(f"Attention of {job.model}, {job.length}")
    parts = [
        f"<h1>{title}</h1><p>{html.escape(_facts(job, about))}</p>",
        _section("What it says", "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in sentences) + "</ul>"),
        _section("Pictures", "".join(_picture(*each) for each in pictures.values())),
        _section("Patterns against dense attention, nothing tuned", _patterns(job, figures, velocities)),
        _section(f"Settings that keep the velocity within {job.error:g}, cheapest first", _settings(settings)),
        _section("Heads", _heads(figures)),
        _section("How heads are told apart", f"<p>{html.escape(KIND_RULE)}</p>"),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "".join(parts)
    return f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>"


def _facts(job: Job, about: Mapping[str, object]) -> str:
    grid, clips = about["grid"], about["clips"]
    assert isinstance(grid, dict) and isinstance(clips, list)
    text = f" and {grid['text_tokens']} text tokens" if grid["text_tokens"] else ""
    return (
        f"{grid['frames']} latent frames of {grid['height']} x {grid['width']} tokens{text}; {len(clips)} clips at "
        f"sigma {', '.join(f'{sigma:g}' for sigma in job.sigmas)}; {job.rows} query rows sampled in each tile "
        f"({about['tile']} tokens) of each frame; temporal positions: {about['rope']}. ± is a standard error, over "
        f"{'clips' if len(clips) > 1 else 'the replicates of the sampled rows'}."
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def _picture(png: bytes, caption: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    caption = html.escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _patterns(job: Job, figures: Sequence[LayerFigures], velocities: Sequence[Velocity]) -> str:
    rows = []
    for candidate in job.candidates:
        for sigma in job.sigmas:
            of = [one for one in figures if one.sigma == sigma]
            kept = sum(float(one.kept[candidate.name].mean.mean()) for one in of) / len(of)
            output = sum(float(one.output[candidate.name].mean.mean()) for one in of) / len(of)
            errors = {v.dense_layers: v.mean for v in velocities if (v.pattern, v.sigma) == (candidate.name, sigma)}
            velocity = [f"{errors[dense]:.3f}" for dense in job.dense_layers]
            rows.append(
                [candidate.name, f"{sigma:g}", f"{kept:.3f}", f"{2 * (1 - kept):.3f}", f"{output:.3f}", *velocity]
            )
    dense = [f"velocity's error, {count} dense layers" for count in job.dense_layers]
    return _table(["pattern", "sigma", "kept mass", "L1 of rows", "output's error", *dense], rows)


def _settings(settings: Sequence[Setting]) -> str:
    if not settings:
        return "<p>None.</p>"
    rows = [
        [
            one.pattern,
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
    return _table([*head, "of dense attention", "of a dense forward"], rows)


def _heads(figures: Sequence[LayerFigures]) -> str:
    """Those that do not decay first."""
    rows = []
    for one in figures:
        fine = decaying(one)
        for head, kind in enumerate(one.kinds):
            rows.append(
                (
                    bool(fine[head]),
                    [
                        f"layer {one.layer} head {head}",
                        f"{one.sigma:g}",
                        kind,
                        f"{float(one.alpha.mean[head]):.3g} ± {float(one.alpha.error[head]):.1g}",
                        f"{float(one.alpha_r2[head]):.3f}",
                        f"{float(one.beta.mean[head]):.3g} ± {float(one.beta.error[head]):.1g}",
                        f"{float(one.beta_r2[head]):.3f}",
                        f"{float(one.first.mean[head]):.1%}",
                        *(f"{float(kept.mean[head]):.3f}" for kept in one.kept.values()),
                    ],
                )
            )
    rows.sort(key=lambda row: row[0])
    names = [f"kept by {name}" for name in figures[0].kept]
    table = _table(
        ["head", "sigma", "kind", "alpha", "R²", "beta", "R²", "first frame", *names], [r for _, r in rows[:_MOST]]
    )
    more = f"<p>{len(rows) - _MOST} more are in decay.json.</p>" if len(rows) > _MOST else ""
    return table + more
