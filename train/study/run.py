"""The study from its settings to its files, and on from where it stopped.

    <out>/results.json, .csv, .md, study.html, cost.png, clips.png    what there is so far; written after every row
    <out>/runs/                                                       the tuned rows (`train.study.runs`)
    <out>/losses/, <out>/clips/                                       finished parts; they may be deleted

First every row's losses, seed by seed, then the clips of the first seed's rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from data.io.files import write_utf8
from data.shards.manifest import Manifest
from data.shards.sample import Sample
from data.shards.stream import read_samples
from radial.errors import Mistake
from train.config.schema import ClipConfig
from train.loggers.csv_file import METRICS, read_metrics
from train.report.runs import series
from train.shards import held_out
from train.step.module import LengthExtensionModule
from train.storage.run_folder import held
from train.study.base import BaseSign, pixels_leave
from train.study.clips import ClipSet, generate_row, read_row, shown
from train.study.frechet import frechet_distance
from train.study.losses import arithmetic, mean_over_sigmas, measure_losses, module_of
from train.study.page import write_page
from train.study.pictures import draw
from train.study.results import RowResult, write_results
from train.study.rows import Row, rows_of
from train.study.runs import Clock, RowRun, TimeUp
from train.study.settings import Job

_BASE = Row("base", "base", False, {"attention": "dense", "rope": "default"})
_TRUTH = "truth"
_STRIP = {"untuned_dense": "untuned, dense", "released": "released LoRA", "dense": "dense LoRA"}


def run_study(job: Job) -> tuple[list[str], bool]:
    """Runs what is missing, within the time.

    Returns:
        The conclusions, and whether everything is done.

    Raises:
        UserError: rows or a base that do not serve, or the folder is in use.
    """
    study = Study(job)
    job.out.mkdir(parents=True, exist_ok=True)
    with held(job.out):
        whole = True
        try:
            study.check_base()
            study.measure_rows()
            study.generate_clips()
        except TimeUp:
            whole = False
        finally:
            sentences = study.write()
    return sentences, whole and not study.failed


class Study:
    """One command's work on a study's folder.

    Attributes:
        failed: rows that could not be measured, with the reason.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.clock = job, Clock(job.given.minutes)
        self.rows = rows_of(job)
        self.failed: dict[str, str] = {}

    @cached_property
    def shards(self) -> Manifest:
        """The held-out clips, the same for all seeds; only their number is asked for."""
        config = replace(self.job.config, seed=0)
        return held_out(config, max(self.job.given.held_out, self.job.given.clips), self.job.frames)

    def _clips(self, count: int) -> list[Sample]:
        return list(read_samples(self.shards, count))

    def _runs(self, row: Row) -> list[RowRun]:
        """A row's runs; an untuned one has one for all seeds."""
        seeds = self.job.seeds if row.tuned else self.job.seeds[:1]
        return [RowRun.of(self.job, row, seed) for seed in seeds]

    def check_base(self) -> None:
        """Measures the base at its own length.

        Raises:
            UserError: it is not trained enough.
        """
        file = self._losses_file(RowRun.of(self.job, _BASE, self.job.seeds[0]))
        if not file.is_file():
            self._measure(RowRun.of(self.job, _BASE, self.job.seeds[0]))
        self.sign.check(self.job.base)

    @property
    def sign(self) -> BaseSign:
        """How far the base is, once it is measured."""
        stored = self._stored(RowRun.of(self.job, _BASE, self.job.seeds[0]))
        assert stored is not None
        losses = mean_over_sigmas(stored["losses"]["1x"])
        native = self.job.lengths["1x"]
        clips = [clip.latent[:, :native] for clip in self._clips(self.job.given.held_out)]
        left = pixels_leave(clips, self.job.sigmas)
        return BaseSign(sum(losses) / len(losses), left, self.job.given.enough)

    def measure_rows(self) -> None:
        """Trains and measures every row, seed by seed; a row that cannot be is noted, and the others go on."""
        for seed in self.job.seeds:
            for row in self.rows:
                if row.name in self.failed or (not row.tuned and seed != self.job.seeds[0]):
                    continue
                try:
                    run = RowRun.of(self.job, row, seed)
                    if self._losses_file(run).is_file():
                        continue
                    print(f"\n{row.words}, seed {seed}", flush=True)
                    if row.tuned and not run.done:
                        run.train(self.clock)
                    self._measure(run)
                except Mistake as error:
                    self.failed[row.name] = str(error)
                    print(f"warning: {row.words}: {error}", flush=True)
                self.write()

    def generate_clips(self) -> None:
        """The clips of the true row, then those of every row's first run."""
        if not self.job.given.clips:
            return
        base, job = RowRun.of(self.job, _BASE, self.job.seeds[0]), self.job
        chosen = [row for row in self.rows if row.name not in self.failed]
        runs = [None, *(self._runs(row)[0] for row in chosen)]
        parts = math.ceil(job.given.clips / job.given.at_once)
        missing = [run for run in runs if len(list(self._clips_folder(run).glob("*.json"))) < parts]
        if not missing:
            return
        of = self._clip_set(module_of(base, self.shards))
        for run in missing:
            folder = self._clips_folder(run)
            print(f"\n{'true clips' if run is None else run.row.words}: clips", flush=True)
            with arithmetic(base if run is None else run):
                module = None if run is None else module_of(run, self.shards)
                generate_row(module, of, folder, self.clock.check)
            self.write()

    def _clip_set(self, base: LengthExtensionModule) -> ClipSet:
        job = self.job
        clip = ClipConfig(job.frames, job.config.clip.height, job.config.clip.width)
        return ClipSet(
            clips=self._clips(job.given.clips),
            given=job.frames // 2,
            native=job.lengths["1x"],
            steps=job.given.sampling_steps,
            shift=job.config.shift(clip),
            at_once=job.given.at_once,
            base=base,
        )

    def _measure(self, run: RowRun) -> None:
        """The losses of a row's run, into their file."""
        self.clock.check()
        job = self.job
        module = module_of(run, self.shards)
        clips = self._clips(job.given.held_out)
        with arithmetic(run):
            whole, again = measure_losses(module, clips, job.lengths, job.sigmas, self.clock.check)
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
        file = self._losses_file(run)
        file.parent.mkdir(exist_ok=True)
        write_utf8(file, json.dumps(found))

    def _losses_file(self, run: RowRun) -> Path:
        given, lengths = self.job.given, self.job.lengths
        digest = _digest([given.held_out, self.job.sigmas, lengths])
        return self.job.out / "losses" / f"{run.name}-{digest}.json"

    def _stored(self, run: RowRun) -> dict[str, Any] | None:
        file = self._losses_file(run)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _clips_folder(self, run: RowRun | None) -> Path:
        """The clips' folder of a row's run; of the true clips without one."""
        given = self.job.given
        digest = _digest([given.clips, given.at_once, given.sampling_steps, self.job.frames])
        name = f"{_TRUTH}-{RowRun.of(self.job, _BASE, self.job.seeds[0]).digest}" if run is None else run.name
        return self.job.out / "clips" / f"{name}-{digest}"

    def write(self) -> list[str]:
        """Everything that is known, into the study's files; returns the conclusions."""
        results = [self._result(row) for row in self.rows]
        job = self.job
        names = list(job.lengths)
        base = RowRun.of(job, _BASE, job.seeds[0])
        about = {
            "base": str(job.base),
            "base at its own length": str(self.sign) if self._losses_file(base).is_file() else "not measured",
            "lengths": ", ".join(f"{name}: {frames} frames" for name, frames in job.lengths.items()),
            "tokens of the longest": f"{job.config.grid().tokens:,}",
            "seeds": ", ".join(map(str, job.seeds)),
            "held-out clips": job.given.held_out,
            "noise levels": ", ".join(f"{sigma:g}" for sigma in job.sigmas),
            "steps": job.config.trainer.steps,
            "generated clips": f"{job.given.clips}, of seed {job.seeds[0]}, {job.given.sampling_steps} steps",
        }
        truth_folder = self._clips_folder(None)
        clips, true = read_row(truth_folder)
        for one in results:
            if one.row.name in self.failed:
                continue
            one.clips, made = read_row(self._clips_folder(self._runs(one.row)[0]))
            if made is not None and true is not None and len(made) == len(true) and len(made) > 1:
                one.frechet = frechet_distance(made, true)
        if clips:
            results.append(RowResult(Row(_TRUTH, "the true clips", False), clips=clips))
        sentences = write_results(results, names, about, job.out)
        panels = {"truth": shown(truth_folder)}
        for row in self.rows:
            if row.name in _STRIP and row.name not in self.failed:
                panels[_STRIP[row.name]] = shown(self._clips_folder(self._runs(row)[0]))
        there = {name: clip for name, clip in panels.items() if clip is not None}
        picture = draw(results, names[-1], there, f"first {job.frames // 2} frames given", job.out)
        write_page(results, names, about, sentences, picture, job.out)
        return sentences

    def _result(self, row: Row) -> RowResult:
        if row.name in self.failed:
            return RowResult(row, f"failed: {self.failed[row.name]}")
        result = RowResult(row)
        runs = self._runs(row)
        for run in runs:
            stored = self._stored(run)
            if stored is not None:
                result.losses[run.seed], result.again[run.seed] = stored["losses"], stored["again"]
                result.gflops, result.blocks = stored["gflops"], stored["blocks"]
            if row.tuned and (run.folder / METRICS).is_file():
                metrics = read_metrics(run.folder / METRICS)
                steps = [value for _, value in series(metrics, "step_seconds")]
                if steps:
                    result.seconds[run.seed] = median(steps)
                result.validation[run.seed] = series(metrics, "validation/loss")
        if len(result.losses) < len(runs):
            result.state = f"{len(result.losses)} of {len(runs)} seeds"
        return result


def _digest(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
