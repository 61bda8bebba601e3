"""The parts of a study: a row with one seed is trained, if it is to be, and its losses are measured; a row's clips.

<out>/losses/<run>-<digest>.json    the losses; the digest is that of what is measured
<out>/clips/<run>-<digest>/         the clips (`train.study.clips`)
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.io.files import write_utf8
from data.shards.manifest import Manifest
from data.shards.sample import Sample
from data.shards.stream import read_samples
from train.config.schema import ClipConfig
from train.planning.full_memory import memory_in_words
from train.shards import held_out
from train.study.clips import ClipSet, generate_row
from train.study.losses import arithmetic, measure_losses, module_of
from train.study.masks import fit_mask
from train.study.rows import BASE, TRUTH, Row
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
    """Measures a run's losses into their file; those of the base, as it is, at its own length alone.

    Raises:
        TimeUp: the time is over.
    """
    clock.check()
    clips = held_out_clips(job, job.given.held_out)
    module = module_of(run, held_out_shards(job))
    with arithmetic(run):
        lengths = {"1x": job.lengths["1x"]} if run.row == BASE else job.lengths
        whole, again = measure_losses(module, clips, lengths, job.sigmas, clock.check)
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


def base_run(job: Job) -> RowRun:
    """The base as a row that has no run, whichever seeds the rows have."""
    return RowRun.of(job, BASE, 0)


def clips_folder(job: Job, row: Row) -> Path:
    """Where the clips of a row's first run lie, or will; the true clips are a row of their own."""
    given = job.given
    digest = digest_of([given.clips, given.at_once, given.sampling_steps, job.frames])
    name = f"{TRUTH.name}-{base_run(job).digest}" if row == TRUTH else RowRun.of(job, row, job.seeds[0]).name
    return job.out / "clips" / f"{name}-{digest}"


@dataclass(frozen=True)
class RowLosses:
    """A row with one seed: its masks fitted, if it has some, trained, if it is to be, and its losses measured."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        """Of the file that it prints to where several parts run."""
        return f"{self.row.name}-seed-{self.seed}"

    @property
    def words(self) -> str:
        """What is said of it."""
        return f"{self.row.words}, seed {self.seed}"

    def do(self, job: Job, clock: Clock) -> None:
        """Does what is missing of it.

        Raises:
            TimeUp: the time is over; what there is stays.
            UserError: it cannot be trained or measured.
            SystemExit: a signal has stopped it.
        """
        clock.check()
        if self.row.fit is not None:
            fit_mask(job, self.row.fit, clock.check)
        run = RowRun.of(job, self.row, self.seed)
        if self.row.tuned and not run.done:
            run.train(clock)
        with memory_in_words(_LESS):
            measure(job, run, clock)


@dataclass(frozen=True)
class RowClips:
    """The generated clips of a row's first run, and their measures."""

    row: Row

    @property
    def name(self) -> str:
        """Of the file that it prints to where several parts run."""
        return f"{self.row.name}-clips"

    @property
    def words(self) -> str:
        """What is said of it."""
        return f"{self.row.words}: clips"

    def there(self, job: Job) -> bool:
        """Whether all of it is done."""
        parts = math.ceil(job.given.clips / job.given.at_once)
        return len(list(clips_folder(job, self.row).glob("*.json"))) == parts

    def do(self, job: Job, clock: Clock) -> None:
        """Generates and measures what is missing.

        Raises:
            TimeUp: the time is over; finished clips stay.
            UserError: they cannot be generated.
        """
        with memory_in_words(_LESS):
            self._generate(job, clock)

    def _generate(self, job: Job, clock: Clock) -> None:
        shards = held_out_shards(job)
        base = base_run(job)
        clip = ClipConfig(job.frames, job.config.clip.height, job.config.clip.width)
        of = ClipSet(
            clips=held_out_clips(job, job.given.clips),
            given=job.frames // 2,
            native=job.lengths["1x"],
            steps=job.given.sampling_steps,
            shift=job.config.shift(clip),
            at_once=job.given.at_once,
            base=module_of(base, shards),
        )
        run = base if self.row == TRUTH else RowRun.of(job, self.row, job.seeds[0])
        with arithmetic(run):
            module = None if self.row == TRUTH else module_of(run, shards)
            generate_row(module, of, clips_folder(job, self.row), clock.check)


_LESS = "Give fewer processes= or at_once=; what is finished stays"  # it fails the row, and the others go on

Part = RowLosses | RowClips
"""What one process does at a time."""
