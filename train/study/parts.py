"""One part of a study: a row with one seed is trained, if it is to be, and its losses are measured.

<out>/losses/<run>-<digest>.json    the losses; the digest is that of what is measured
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.io.files import write_utf8
from data.shards.manifest import Manifest
from data.shards.sample import Sample
from data.shards.stream import read_samples
from train.shards import held_out
from train.study.losses import arithmetic, measure_losses, module_of
from train.study.rows import Row
from train.study.runs import Clock, RowRun
from train.study.settings import Job


def digest_of(about: Any) -> str:
    """Eight letters that stand for plain values."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]


def held_out_shards(job: Job) -> Manifest:
    """The held-out clips, the same for all seeds; only their number is asked for."""
    return held_out(replace(job.config, seed=0), max(job.given.held_out, job.given.clips), job.frames)


def held_out_clips(job: Job, count: int) -> list[Sample]:
    """The first held-out clips."""
    return list(read_samples(held_out_shards(job), count))


def losses_file(job: Job, run: RowRun) -> Path:
    """Where a run's losses lie once they are measured."""
    return job.out / "losses" / f"{run.name}-{digest_of([job.given.held_out, job.sigmas, job.lengths])}.json"


def stored_losses(job: Job, run: RowRun) -> dict[str, Any] | None:
    """A run's losses; None where they are not measured yet."""
    file = losses_file(job, run)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def measure(job: Job, run: RowRun, clock: Clock) -> None:
    """Measures a run's losses into their file.

    Raises:
        TimeUp: the time is over.
    """
    clock.check()
    clips = held_out_clips(job, job.given.held_out)
    module = module_of(run, held_out_shards(job))
    with arithmetic(run):
        whole, again = measure_losses(module, clips, job.lengths, job.sigmas, clock.check)
    longest = clips[0].latent[None]
    layers, heads, width = module.adapter.attention_shape
    attention = module.attention_at(longest, 0.0)
    layouts = [attention.own_layout(layer, layers, heads) for layer in range(layers)]
    found = {
        "losses": whole,
        "again": again,
        "gflops": attention.attention_flops(layers, heads, width) / 1e9,
        "blocks": sum(1 - layout.sparsity for layout in layouts) / layers,
    }
    file = losses_file(job, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_utf8(file, json.dumps(found))


def do_part(job: Job, row: Row, seed: int, clock: Clock) -> None:
    """Trains a row with one seed, if it is to be trained and is not yet, and measures it.

    Raises:
        TimeUp: the time is over; what there is stays.
        UserError: it cannot be trained or measured.
        SystemExit: a signal has stopped it.
    """
    run = RowRun.of(job, row, seed)
    if row.tuned and not run.done:
        run.train(clock)
    measure(job, run, clock)
