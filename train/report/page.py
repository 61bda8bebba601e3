"""The page of one run: its curves, tables, clips, plan and settings."""

from __future__ import annotations

import base64
import html
import math
import time
from collections.abc import Iterator
from pathlib import Path

from train.config.compose import read_config
from train.config.schema import RunConfig
from train.loggers.csv_file import METRICS, read_metrics
from train.measures.results import findings, read_results
from train.report.charts import Line, line_chart, lines_of
from train.report.document import facts, section, table, write_document
from train.report.runs import Rows, series, smoothed
from train.storage.checkpoints import checkpoints_of
from train.storage.run_folder import CONFIG, get_state
from train.storage.stored_plan import stored_plan
from train.storage.sweep_folder import is_sweep

PAGE = "report.html"
_MEDIA = {".gif": "image/gif", ".png": "image/png", ".webp": "image/webp", ".mp4": "video/mp4"}
_MOST = 64 << 20  # bytes of clips in a page


def write_page(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a run and returns its file.

    Args:
        out: the file; ``report.html`` in the folder without it.

    Raises:
        UserError: not a run folder, or the file cannot be written.
    """
    config, name = read_config(folder), folder.resolve().name
    if is_sweep(folder.resolve().parent):
        name = f"{folder.resolve().parent.name}, run {name} of the sweep"
    rows, mask = read_metrics(folder / METRICS), _picture(folder / "mask.png")
    parts = [
        f"<h1>{html.escape(config.conf)} <small>{html.escape(name)}</small></h1>",
        _facts(folder, config, rows),
        section("Curves", f'<div class="charts">{"".join(_charts(rows))}</div>' if rows else ""),
        section("Validation", _validation(rows)),
        section("Held-out clips", _held_out(folder)),
        section("Clips", _clips(folder)),
        section("Plan and measurement", _plan(folder, rows)),
        section("Attention mask", f'<div class="mask">{mask}</div>' if mask else ""),
        section("Warnings", _warnings(folder)),
        section("Settings", _settings(folder)),
    ]
    return write_document(f"{config.conf} {name}", parts, out or folder / PAGE)


def _keys(rows: Rows, start: str) -> list[str]:
    return sorted(key for key in rows[0] if key.startswith(start)) if rows else []


def _facts(folder: Path, config: RunConfig, rows: Rows) -> str:
    word, why = get_state(folder)
    pairs = [("state", word), ("written", time.strftime("%Y-%m-%d %H:%M"))]
    steps = series(rows, "loss")
    if steps:
        pairs.insert(1, ("step", f"{steps[-1][0]:.0f} of {config.trainer.steps}"))
        pairs.insert(2, ("loss, running mean", f"{smoothed(steps)[-1][1]:.4f}" if smoothed(steps) else "not finite"))
    saved = checkpoints_of(folder / "checkpoints")
    if saved:
        pairs.append(("newest checkpoint", saved[-1].name))
    skipped = [value for _, value in series(rows, "skipped")]
    if skipped and skipped[-1]:
        pairs.append(("skipped steps", f"{skipped[-1]:.0f}"))
    reason = f'<p class="bad">{html.escape(why)}</p>' if why and word in ("failed", "died") else ""
    return f"{facts(pairs)}{reason}"


def _charts(rows: Rows) -> Iterator[str]:
    loss = series(rows, "loss")
    yield line_chart("loss", [Line(loss, "of the step", faint=True), Line(smoothed(loss), "running mean")])
    lengths = sorted((key for key in _keys(rows, "validation/") if key.endswith("_frames")), key=_first_number)
    yield line_chart(
        "validation loss by clip length (latent frames)",
        lines_of({key.split("/")[1].replace("_", " "): series(rows, key) for key in lengths}),
    )
    levels = {key.split("/")[1]: smoothed(series(rows, key)) for key in _keys(rows, "loss_sigma/")}
    yield line_chart("loss by noise level, running mean", lines_of(levels))
    shapes = {key.split("/")[1]: smoothed(series(rows, key)) for key in _keys(rows, "loss_frames/")}
    if len(shapes) > 1:
        yield line_chart("loss by clip length, running mean", lines_of(shapes))
    yield line_chart("gradient norm", [Line(series(rows, "grad_norm"))], log=True)
    rate, other = series(rows, "lr"), series(rows, "lr_b")
    rates = lines_of({"of A": rate, "of B": other}) if other else [Line(rate)]
    yield line_chart("learning rate", rates)
    norms = _keys(rows, "lora_norm/")
    chosen = norms if len(norms) <= 8 else [norms[round(i * (len(norms) - 1) / 7)] for i in range(8)]
    more = f" ({len(chosen)} of {len(norms)} layers)" if len(chosen) < len(norms) else ""
    layers = {key.split("/")[1]: series(rows, key) for key in chosen}
    yield line_chart(f"norm of the LoRA's update by layer{more}", lines_of(layers))
    yield line_chart("tokens a second", [Line(series(rows, "tokens_per_second"))])
    yield line_chart("MFU", [Line(series(rows, "mfu"))])
    waits = {"step": series(rows, "step_seconds"), "waiting for data": series(rows, "data_wait")}
    yield line_chart("seconds a step", lines_of(waits))
    yield line_chart("peak memory, GiB", [Line(series(rows, "memory_gib"))])


def _first_number(key: str) -> int:
    return int(key.split("/")[1].split("_")[0])


def _validation(rows: Rows) -> str:
    """The last validation, and how far it is from the first: a row a length, a column a noise level."""
    levels = sorted({key.rsplit("_", 1)[1] for key in _keys(rows, "validation/") if "/sigma_" in key}, key=float)
    lengths = sorted((key for key in _keys(rows, "validation/") if key.endswith("_frames")), key=_first_number)
    measured = [row for row in rows if any(row.get(key) for key in lengths)]
    if not measured:
        return ""
    first, last = measured[0], measured[-1]

    def cell(key: str) -> str:
        if not last.get(key):  # a resumed run may validate at other levels and lengths
            return ""
        now = float(last[key])
        change = f" <small>({now - float(first[key]):+.4f})</small>" if first is not last and first.get(key) else ""
        return f"{now:.4f}{change}"

    head = ["clip", "mean", *(f"sigma {level}" for level in levels)]
    body = [
        [f"{_first_number(key)} latent frames", cell(key), *(cell(f"{key}/sigma_{level}") for level in levels)]
        for key in lengths
    ]
    since = f", and the change since step {int(first['step']) + 1}" if first is not last else ""
    return f"<p>Flow loss on held-out clips at step {int(last['step']) + 1}{since}.</p>{table(head, body)}"


def _held_out(folder: Path) -> str:
    rows = read_results(folder)
    if not rows:
        return ""
    body = [
        [
            html.escape(row.name),
            str(row.frames),
            f"{row.loss:.4f}",
            f"{row.attention_gflops:,.1f}",
            str(rows[-1].minus(row) or ""),
        ]
        for row in rows
    ]
    head = ["model and attention", "frames", "flow loss", "attention GFLOPs", "tuned minus this, 95 %"]
    return table(head, body) + "".join(f"<p>{html.escape(sentence)}</p>" for sentence in findings(rows))


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


def _plan(folder: Path, rows: Rows) -> str:
    """What the plan said before the run, beside the run's median and peak."""
    plan = stored_plan(folder)
    if plan is None:
        return ""
    measured = {
        "step_seconds": _median([value for _, value in series(rows, "step_seconds")]),
        "memory_gib": max((value for _, value in series(rows, "memory_gib")), default=None),
        "mfu": _median([value for _, value in series(rows, "mfu")]),
    }
    names = {"step_seconds": "seconds a step", "memory_gib": "peak memory, GiB", "mfu": "MFU"}
    body = []
    for key, name in names.items():
        planned, real = plan.get(key), measured[key]
        if planned is None and real is None:
            continue
        off = f"{real / planned - 1:+.0%}" if planned and real else ""
        body.append([name, _figure(planned), _figure(real), off])
    text = f"<pre>{html.escape(plan['table'])}</pre>" if plan.get("table") else ""
    return table(["", "plan", "measured", "off by"], body) + text


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
