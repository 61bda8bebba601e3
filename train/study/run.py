"""The study from its settings to its files, and on from where it stopped.

    <out>/results.json, .csv, .md, study.html, cost.png, clips.png    what there is so far; written after every row
    <out>/runs/                                                       the tuned rows (`train.study.runs`)
    <out>/losses/, <out>/clips/                                       finished parts; they may be deleted

First the base, where none is given, and the masks that are fitted to it; then every row's losses, seed by seed; then
the clips of the first seed's rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from radial.errors import Mistake
from train.config.schema import ClipConfig
from train.loggers.csv_file import METRICS, read_metrics
from train.report.runs import series
from train.step.module import LengthExtensionModule
from train.storage.run_folder import held
from train.study.base import BaseSign, pixels_leave
from train.study.clips import ClipSet, generate_row, read_row, shown
from train.study.fits import Fit
from train.study.frechet import frechet_distance
from train.study.losses import arithmetic, mean_over_sigmas, module_of
from train.study.masks import fit_masks, masks_file
from train.study.page import write_page
from train.study.parts import digest_of, held_out_clips, held_out_shards, losses_file, measure, stored_losses
from train.study.pictures import draw
from train.study.pool import do_parts
from train.study.results import RowResult, write_results
from train.study.rows import Row, rows_of
from train.study.runs import Clock, RowRun, TimeUp
from train.study.settings import Job

_BASE = Row("base", "base", False, {"attention": "dense", "rope": "default"})
_TRUTH = "truth"
_STRIP = {"untuned_dense": "untuned, dense", "released": "released LoRA", "dense": "dense LoRA"}


def run_study(job: Job, clock: Clock) -> tuple[list[str], bool]:
    """Runs what is missing, within the time.

    Args:
        job: with a base.
        clock: the time that the command has.

    Returns:
        The conclusions, and whether everything is done.

    Raises:
        UserError: rows or a base that do not serve, or the folder is in use.
    """
    study = Study(job, clock)
    job.out.mkdir(parents=True, exist_ok=True)
    with held(job.out):
        whole = True
        try:
            study.check_base()
            study.fit_masks()
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

    def __init__(self, job: Job, clock: Clock) -> None:
        self.job, self.clock = job, clock
        self.rows = rows_of(job)
        self.failed: dict[str, str] = {}

    def _runs(self, row: Row) -> list[RowRun]:
        """A row's runs; an untuned one has one for all seeds."""
        seeds = self.job.seeds if row.tuned else self.job.seeds[:1]
        return [RowRun.of(self.job, row, seed) for seed in seeds]

    def _lacks(self, row: Row) -> str | None:
        """Why a row has no runs; None where it has."""
        if row.name in self.failed:
            return f"failed: {self.failed[row.name]}"
        if row.fit is not None and not masks_file(self.job, row.fit).is_file():
            return "its masks are not fitted yet"
        return None

    @property
    def _base(self) -> RowRun:
        return RowRun.of(self.job, _BASE, self.job.seeds[0])

    def check_base(self) -> None:
        """Measures the base at its own length.

        Raises:
            UserError: it is not trained enough.
        """
        assert self.job.base is not None
        if stored_losses(self.job, self._base) is None:
            measure(self.job, self._base, self.clock)
        self.sign.check(self.job.base)

    @property
    def sign(self) -> BaseSign:
        """How far the base is, once it is measured."""
        stored = stored_losses(self.job, self._base)
        assert stored is not None
        losses = mean_over_sigmas(stored["losses"]["1x"])
        native = self.job.lengths["1x"]
        clips = [clip.latent[:, :native] for clip in held_out_clips(self.job, self.job.given.held_out)]
        left = pixels_leave(clips, self.job.sigmas)
        return BaseSign(sum(losses) / len(losses), left, self.job.given.enough)

    def fit_masks(self) -> None:
        """Fits the masks of the rows that have some; one that cannot be fitted is noted, and the others go on."""
        rows = {row.fit: row for row in self.rows if row.fit is not None}

        def failed(fit: Fit, why: str) -> None:
            self._fail(rows[fit], why)

        self.clock.check()
        fit_masks(self.job, list(rows), failed)

    def measure_rows(self) -> None:
        """Trains and measures every row, seed by seed; a row that cannot be is noted, and the others go on."""

        def done(row: Row, error: Mistake | None) -> None:
            if error is not None:
                self._fail(row, str(error))
            self.write()

        do_parts(self.job, self._parts(), self.clock, done)

    def _parts(self) -> Iterator[tuple[Row, int]]:
        """What is to be trained or measured; rows that have failed meanwhile are left out."""
        for seed in self.job.seeds:
            for row in self.rows:
                if self._lacks(row) or (not row.tuned and seed != self.job.seeds[0]):
                    continue
                try:
                    run = RowRun.of(self.job, row, seed)
                except Mistake as error:
                    self._fail(row, str(error))
                    continue
                if not losses_file(self.job, run).is_file():
                    yield row, seed

    def _fail(self, row: Row, why: str) -> None:
        self.failed[row.name] = why
        print(f"warning: {row.words}: {why}", flush=True)

    def generate_clips(self) -> None:
        """The clips of the true row, then those of every row's first run."""
        if not self.job.given.clips:
            return
        job = self.job
        runs = [None, *(self._runs(row)[0] for row in self.rows if not self._lacks(row))]
        parts = math.ceil(job.given.clips / job.given.at_once)
        missing = [run for run in runs if len(list(self._clips_folder(run).glob("*.json"))) < parts]
        if not missing:
            return
        of = self._clip_set(module_of(self._base, held_out_shards(job)))
        for run in missing:
            folder = self._clips_folder(run)
            print(f"\n{'true clips' if run is None else run.row.words}: clips", flush=True)
            with arithmetic(self._base if run is None else run):
                module = None if run is None else module_of(run, held_out_shards(job))
                generate_row(module, of, folder, self.clock.check)
            self.write()

    def _clip_set(self, base: LengthExtensionModule) -> ClipSet:
        job = self.job
        clip = ClipConfig(job.frames, job.config.clip.height, job.config.clip.width)
        return ClipSet(
            clips=held_out_clips(job, job.given.clips),
            given=job.frames // 2,
            native=job.lengths["1x"],
            steps=job.given.sampling_steps,
            shift=job.config.shift(clip),
            at_once=job.given.at_once,
            base=base,
        )

    def _clips_folder(self, run: RowRun | None) -> Path:
        """The clips' folder of a row's run; of the true clips without one."""
        given = self.job.given
        digest = digest_of([given.clips, given.at_once, given.sampling_steps, self.job.frames])
        name = f"{_TRUTH}-{self._base.digest}" if run is None else run.name
        return self.job.out / "clips" / f"{name}-{digest}"

    def write(self) -> list[str]:
        """Everything that is known, into the study's files; returns the conclusions."""
        results = [self._result(row) for row in self.rows]
        job = self.job
        names = list(job.lengths)
        about = {
            "base": str(job.base),
            "base at its own length": str(self.sign) if stored_losses(job, self._base) else "not measured",
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
            if self._lacks(one.row):
                continue
            one.clips, made = read_row(self._clips_folder(self._runs(one.row)[0]))
            if made is not None and true is not None and len(made) == len(true) and len(made) > 1:
                one.frechet = frechet_distance(made, true)
        if clips:
            results.append(RowResult(Row(_TRUTH, "the true clips", False), clips=clips))
        sentences = write_results(results, names, about, job.out)
        panels = {"truth": shown(truth_folder)}
        for row in self.rows:
            if row.name in _STRIP and not self._lacks(row):
                panels[_STRIP[row.name]] = shown(self._clips_folder(self._runs(row)[0]))
        there = {name: clip for name, clip in panels.items() if clip is not None}
        picture = draw(results, names[-1], there, f"first {job.frames // 2} frames given", job.out)
        write_page(results, names, about, sentences, picture, job.out)
        return sentences

    def _result(self, row: Row) -> RowResult:
        lacks = self._lacks(row)
        if lacks:
            return RowResult(row, lacks)
        result = RowResult(row)
        runs = self._runs(row)
        for run in runs:
            stored = stored_losses(self.job, run)
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
