"""``python -m train.report``: a run as one HTML page that needs nothing beside itself: no network, no other file."""

from __future__ import annotations

import base64
import html
import math
import time
from collections.abc import Iterator
from pathlib import Path

from train.config.compose import read_config, split_arguments
from train.config.schema import RunConfig
from train.errors import UserError
from train.evaluation.results import findings, read_results
from train.loggers.csv_file import METRICS, read_metrics
from train.report.charts import line_chart, smoothed
from train.storage.checkpoints import checkpoints_of
from train.storage.run_folder import CONFIG, get_state
from train.storage.stored_plan import stored_plan

PAGE = "report.html"
USAGE = """python -m train.report run=<run folder> [out=FILE]

Writes report.html into the run's folder: curves, validation, clips, the plan beside what was measured, settings.
A run that still goes on has a report too. The page needs nothing beside itself and can be sent as it is.
"""
_MEDIA = {".gif": "image/gif", ".png": "image/png", ".webp": "image/webp", ".mp4": "video/mp4"}
_MOST = 64 << 20  # bytes of clips in a page
_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1240px;padding:1.5rem}
h1{margin:0;font-size:1.5rem}h2{margin:2rem 0 .6rem;font-size:1.15rem;border-bottom:1px solid var(--line)}
.facts{display:flex;flex-wrap:wrap;gap:.4rem 2rem;margin:.6rem 0}.facts b{display:block;font-size:1.15rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(360px,1fr));gap:1rem}
figure{margin:0;padding:.6rem;background:var(--soft);border-radius:.5rem;min-width:0}
figcaption{font-weight:600;font-size:.9rem}
svg{width:100%;height:auto;display:block}polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
.grid{stroke:var(--line)}.tick{font-size:12px;fill:currentColor;opacity:.7}
.legend{display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.8rem}.legend i{display:inline-block;width:.8em;
height:.8em;margin-right:.3em;border-radius:2px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.25rem .8rem;text-align:right;
border-bottom:1px solid var(--line)}th:first-child,td:first-child{text-align:left}
img,video{max-width:100%;image-rendering:pixelated;border-radius:.3rem}.wide{overflow-x:auto}
pre{overflow-x:auto;background:var(--soft);padding:.8rem;border-radius:.5rem;font-size:.82rem}
.bad{color:#d62728}.mask{max-width:32rem}
"""


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a run and returns its file.

    Raises:
        UserError: not a run folder, or the file cannot be written.
    """
    config = read_config(folder)
    rows, mask = read_metrics(folder / METRICS), _picture(folder / "mask.png")
    parts = [
        f"<h1>{html.escape(config.conf)} <small>{html.escape(folder.resolve().name)}</small></h1>",
        _facts(folder, config, rows),
        _section("Curves", f'<div class="charts">{"".join(_charts(rows))}</div>' if rows else ""),
        _section("Validation", _validation(rows)),
        _section("Held-out clips", _held_out(folder)),
        _section("Clips", _clips(folder)),
        _section("Plan and measurement", _plan(folder, rows)),
        _section("Attention mask", f'<div class="mask">{mask}</div>' if mask else ""),
        _section("Warnings", _warnings(folder)),
        _section("Settings", _settings(folder)),
    ]
    title = f"{config.conf} {folder.resolve().name}"
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    page = (
        f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    out = out or folder / PAGE
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give out=<a file>") from error
    return out


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _series(rows: list[dict[str, str]], key: str) -> list[tuple[float, float]]:
    return [(int(row["step"]) + 1, float(row[key])) for row in rows if row.get(key)]


def _keys(rows: list[dict[str, str]], start: str) -> list[str]:
    return sorted(key for key in rows[0] if key.startswith(start)) if rows else []


def _facts(folder: Path, config: RunConfig, rows: list[dict[str, str]]) -> str:
    word, why = get_state(folder)
    facts = [("state", word), ("written", time.strftime("%Y-%m-%d %H:%M"))]
    steps = _series(rows, "loss")
    if steps:
        facts.insert(1, ("step", f"{steps[-1][0]:.0f} of {config.trainer.steps}"))
        facts.insert(2, ("loss, running mean", f"{smoothed(steps)[-1][1]:.4f}" if smoothed(steps) else "not finite"))
    saved = checkpoints_of(folder / "checkpoints")
    if saved:
        facts.append(("newest checkpoint", saved[-1].name))
    skipped = [value for _, value in _series(rows, "skipped")]
    if skipped and skipped[-1]:
        facts.append(("skipped steps", f"{skipped[-1]:.0f}"))
    cells = "".join(f"<div>{html.escape(name)}<b>{html.escape(value)}</b></div>" for name, value in facts)
    reason = f'<p class="bad">{html.escape(why)}</p>' if why and word in ("failed", "died") else ""
    return f'<div class="facts">{cells}</div>{reason}'


def _charts(rows: list[dict[str, str]]) -> Iterator[str]:
    loss = _series(rows, "loss")
    yield line_chart("loss", {"of the step": loss, "running mean": smoothed(loss)}, faint=["of the step"])
    lengths = [key for key in _keys(rows, "validation/") if key.endswith("_frames")]
    yield line_chart(
        "validation loss by clip length (latent frames)",
        {key.split("/")[1].replace("_", " "): _series(rows, key) for key in sorted(lengths, key=_first_number)},
    )
    buckets = _keys(rows, "loss_sigma/")
    yield line_chart(
        "loss by noise level, running mean", {key.split("/")[1]: smoothed(_series(rows, key)) for key in buckets}
    )
    lengths = _keys(rows, "loss_frames/")
    if len(lengths) > 1:
        yield line_chart(
            "loss by clip length, running mean", {key.split("/")[1]: smoothed(_series(rows, key)) for key in lengths}
        )
    yield line_chart("gradient norm", {"grad_norm": _series(rows, "grad_norm")}, log=True)
    yield line_chart("learning rate", {"lr": _series(rows, "lr")})
    norms = _keys(rows, "lora_norm/")
    chosen = norms if len(norms) <= 8 else [norms[round(i * (len(norms) - 1) / 7)] for i in range(8)]
    more = f" ({len(chosen)} of {len(norms)} blocks)" if len(chosen) < len(norms) else ""
    yield line_chart(f"norm of the LoRA's update by block{more}", {k.split("/")[1]: _series(rows, k) for k in chosen})
    yield line_chart("tokens a second", {"tokens_per_second": _series(rows, "tokens_per_second")})
    yield line_chart("MFU", {"mfu": _series(rows, "mfu")})
    yield line_chart(
        "seconds a step", {"step": _series(rows, "step_seconds"), "waiting for data": _series(rows, "data_wait")}
    )
    yield line_chart("peak memory, GiB", {"memory_gib": _series(rows, "memory_gib")})


def _first_number(key: str) -> int:
    return int(key.split("/")[1].split("_")[0])


def _validation(rows: list[dict[str, str]]) -> str:
    """The last validation, and how far it is from the first: a row a length, a column a noise level."""
    levels = sorted({key.rsplit("_", 1)[1] for key in _keys(rows, "validation/") if "/sigma_" in key}, key=float)
    lengths = sorted((key for key in _keys(rows, "validation/") if key.endswith("_frames")), key=_first_number)
    measured = [row for row in rows if any(row.get(key) for key in lengths)]
    if not measured:
        return ""
    first, last = measured[0], measured[-1]

    def cell(key: str) -> str:
        if not last.get(key):  # a resumed run may validate at other levels and lengths
            return "<td></td>"
        now = float(last[key])
        change = f" <small>({now - float(first[key]):+.4f})</small>" if first is not last and first.get(key) else ""
        return f"<td>{now:.4f}{change}</td>"

    head = "".join(f"<th>sigma {level}</th>" for level in levels)
    body = "".join(
        f"<tr><td>{_first_number(key)} latent frames</td>{cell(key)}"
        + "".join(cell(f"{key}/sigma_{level}") for level in levels)
        + "</tr>"
        for key in lengths
    )
    since = f", and the change since step {int(first['step']) + 1}" if first is not last else ""
    return (
        f"<p>Flow loss on held-out clips at step {int(last['step']) + 1}{since}.</p>"
        f'<div class="wide"><table><tr><th>clip</th><th>mean</th>{head}</tr>{body}</table></div>'
    )


def _held_out(folder: Path) -> str:
    rows = read_results(folder)
    if not rows:
        return ""
    body = ""
    for row in rows:
        cells = f"<td>{row.frames}</td><td>{row.loss:.4f}</td><td>{row.attention_gflops:,.1f}</td>"
        body += f"<tr><td>{html.escape(row.name)}</td>{cells}<td>{rows[-1].minus(row) or ''}</td></tr>"
    head = "<tr><th>model and attention</th><th>frames</th><th>flow loss</th><th>attention GFLOPs</th>"
    table = f'<div class="wide"><table>{head}<th>tuned minus this, 95 %</th></tr>{body}</table></div>'
    return table + "".join(f"<p>{html.escape(sentence)}</p>" for sentence in findings(rows))


def _clips(folder: Path) -> str:
    """What the run has drawn and sampled, newest samples first, as far as a page should hold it."""
    samples = [file for file in (folder / "samples").rglob("*") if file.suffix in _MEDIA]
    files = [folder / "clips.gif", *sorted(samples, key=lambda file: file.stat().st_mtime, reverse=True)]
    room, parts, left_out = _MOST, [], 0
    for file in files:
        if not file.exists():
            continue
        room -= file.stat().st_size
        if room < 0:
            left_out += 1
            continue
        parts.append(_picture(file, file.relative_to(folder).as_posix()))
    if left_out:
        parts.append(f"<p>{left_out} more in {html.escape(str(folder / 'samples'))}</p>")
    return "".join(parts)


def _picture(file: Path, caption: str = "") -> str:
    if not file.exists():
        return ""
    kind = _MEDIA[file.suffix]
    source = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
    name = html.escape(caption or file.name)
    if kind.startswith("video"):
        element = f'<video src="{source}" controls loop muted></video>'
    else:
        element = f'<img src="{source}" alt="{name}">'
    return f"<figure>{element}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _plan(folder: Path, rows: list[dict[str, str]]) -> str:
    """What the plan said before the run, beside the run's median and peak."""
    plan = stored_plan(folder)
    if plan is None:
        return ""
    measured = {
        "step_seconds": _median([value for _, value in _series(rows, "step_seconds")]),
        "memory_gib": max((value for _, value in _series(rows, "memory_gib")), default=None),
        "mfu": _median([value for _, value in _series(rows, "mfu")]),
    }
    names = {"step_seconds": "seconds a step", "memory_gib": "peak memory, GiB", "mfu": "MFU"}
    body = ""
    for key, name in names.items():
        planned, real = plan.get(key), measured[key]
        if planned is None and real is None:
            continue
        off = f"{real / planned - 1:+.0%}" if planned and real else ""
        body += f"<tr><td>{name}</td><td>{_figure(planned)}</td><td>{_figure(real)}</td><td>{off}</td></tr>"
    head = "<tr><th></th><th>plan</th><th>measured</th><th>off by</th></tr>"
    table = f"<pre>{html.escape(plan['table'])}</pre>" if plan.get("table") else ""
    return f'<div class="wide"><table>{head}{body}</table></div>{table}'


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _figure(number: float | None) -> str:
    return "" if number is None or not math.isfinite(number) else f"{number:.4g}"


def _warnings(folder: Path) -> str:
    file = folder / "log.txt"
    if not file.exists():
        return ""
    found = [
        line
        for line in file.read_text(errors="replace", encoding="utf-8").split("\n")
        if " WARNING " in line or " ERROR " in line
    ]
    if not found:
        return ""
    text = html.escape("\n".join(found[-40:]))
    return f"<details><summary>{len(found)} in log.txt, the last:</summary><pre>{text}</pre></details>"


def _settings(folder: Path) -> str:
    parts = []
    for name in (CONFIG, "environment.json", "launch.json"):
        if (folder / name).exists():
            text = html.escape((folder / name).read_text(encoding="utf-8"))
            parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "".join(parts)


def main(arguments: list[str]) -> None:
    """Writes the page and says where."""
    settings = split_arguments(arguments)
    unknown = settings.keys() - {"run", "out"}
    if unknown:
        raise UserError(f"{min(unknown)} is not a known key, expected run or out")
    if "run" not in settings:
        raise UserError("run is not set, give run=<run folder> such as run=runs/shapes_4x/<time>")
    out = settings.get("out")
    print(write_page(Path(settings["run"]), Path(out) if out else None))
