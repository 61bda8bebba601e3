"""The study from its settings to its files, and on from where it stopped.

    <out>/results.json, .csv, .md, study.html, cost.png, clips.png    what there is so far; written after every row
    <out>/runs/                                                       the tuned rows (`train.study.runs`)
    <out>/losses/, <out>/clips/                                       finished parts; they may be deleted

First the base, where none is given; then every row's losses, seed by seed, with masks that are fitted before the first
row that has them; then the clips of the first seed's rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from statistics import median

from radial.errors import Mistake
from train.loggers.csv_file import METRICS, read_metrics
from train.report.runs import series
from train.storage.run_folder import held
from train.study.base import BaseSign, pixels_leave
from train.study.clips import read_row, shown
from train.study.frechet import frechet_distance
from train.study.losses import mean_over_sigmas
from train.study.masks import masks_file
from train.study.page import write_page
from train.study.parts import (
    Part,
    RowClips,
    RowLosses,
    base_run,
    clips_folder,
    held_out_clips,
    losses_file,
    measure,
    stored_losses,
)
from train.study.pictures import draw
from train.study.pool import do_parts
from train.study.results import RowResult, write_results
from train.study.rows import TRUTH, Row, rows_of
from train.study.runs import Clock, RowRun, TimeUp
from train.study.settings import Job

_STRIP = {"untuned_dense": "untuned, dense", "released": "released LoRA", "dense": "dense LoRA"}


def run_study(job: Job, clock: Clock) -> tuple[list[str], bool, list[str]]:
    """Runs what is missing, within the time.

    Args:
        job: with a base.
        clock: the time that the command has.

    Returns:
        The conclusions, whether everything is done, and the names of rows that failed.

    Raises:
        UserError: rows or a base that do not serve, or the folder is in use.
    """
    study = Study(job, clock)
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
    return sentences, whole and not study.failed, list(study.failed)


class Study:
    """One command's work on a study's folder.

    Attributes:
        failed: rows that could not be measured, with the reason.
    """

    def __init__(self, job: Job, clock: Clock) -> None:
        self.job, self.clock = job, clock
        self.rows = rows_of(job)
        self.failed: dict[str, str] = {}
        self._sound: set[str] = set()

    def _runs(self, row: Row) -> list[RowRun]:
        """A row's runs; an untuned one has one for all seeds."""
        seeds = self.job.seeds if row.tuned else self.job.seeds[:1]
        return [RowRun.of(self.job, row, seed) for seed in seeds]

    def _lacks(self, row: Row) -> str | None:
        """Why a row has no runs; None where it has, whether or not they failed."""
        if row.name in self._sound:
            return None
        if row.name in self.failed:
            return self._state(row)
        if row.fit is not None and not masks_file(self.job, row.fit).is_file():
            return "its masks are not fitted yet"
        try:
            self._runs(row)
        except Mistake as error:
            self._fail(row, str(error))
            return self._lacks(row)
        self._sound.add(row.name)
        return None

    def check_base(self) -> None:
        """Measures the base at its own length.

        Raises:
            UserError: it is not trained enough.
        """
        assert self.job.base is not None
        base = base_run(self.job)
        if stored_losses(self.job, base) is None:
            measure(self.job, base, self.clock)
        self.sign.check(self.job.base)

    @cached_property
    def sign(self) -> BaseSign:
        """How far the base is, once it is measured."""
        stored = stored_losses(self.job, base_run(self.job))
        assert stored is not None
        losses = [loss for loss in mean_over_sigmas(stored["losses"]["1x"]) if loss is not None]
        native = self.job.lengths["1x"]
        clips = [clip.latent[:, :native] for clip in held_out_clips(self.job, self.job.given.held_out)]
        left = pixels_leave(clips, self.job.sigmas)
        return BaseSign(sum(losses) / len(losses), left, self.job.given.enough)

    def measure_rows(self) -> None:
        """Trains and measures every row, seed by seed; a row that cannot be is noted, and the others go on."""
        do_parts(self.job, self._losses(), self.clock, self._done)

    def generate_clips(self) -> None:
        """The true clips, then those of every row's first run."""
        if self.job.given.clips:
            do_parts(self.job, self._clips(), self.clock, self._done)

    def _done(self, row: Row, error: Mistake | None) -> None:
        if error is not None:
            self._fail(row, str(error))
        self.write()

    def _losses(self) -> Iterator[Part]:
        """What is to be trained or measured; rows that have failed meanwhile are left out."""
        job = self.job
        for seed in job.seeds:
            for row in self.rows:
                if not row.tuned and seed != job.seeds[0]:
                    continue
                lacks = self._lacks(row)  # which sees whether its settings make a run
                if row.name in self.failed:
                    continue
                if lacks or not losses_file(job, RowRun.of(job, row, seed)).is_file():
                    yield RowLosses(row, seed)

    def _clips(self) -> Iterator[Part]:
        """What is to be generated."""
        for row in (TRUTH, *self.rows):
            if row.name in self.failed or self._lacks(row):
                continue
            if not (part := RowClips(row)).there(self.job):
                yield part

    def _fail(self, row: Row, why: str) -> None:
        self.failed[row.name] = why
        print(f"warning: {row.words}: {why}", flush=True)

    def write(self) -> list[str]:
        """Everything that is known, into the study's files; returns the conclusions."""
        results = [self._result(row) for row in self.rows]
        job = self.job
        names = list(job.lengths)
        about = {
            "base": str(job.base),
            "base at its own length": str(self.sign) if stored_losses(job, base_run(job)) else "not measured",
            "lengths": ", ".join(f"{name}: {frames} frames" for name, frames in job.lengths.items()),
            "tokens of the longest": f"{job.config.grid().tokens:,}",
            "seeds": ", ".join(map(str, job.seeds)),
            "held-out clips": job.given.held_out,
            "noise levels": ", ".join(f"{sigma:g}" for sigma in job.sigmas),
            "steps": job.config.trainer.steps,
            "generated clips": f"{job.given.clips}, of seed {job.seeds[0]}, {job.given.sampling_steps} steps",
        }
        truth_folder = clips_folder(job, TRUTH)
        clips, true = read_row(truth_folder)
        for one in results:
            if self._lacks(one.row):
                continue
            one.clips, made = read_row(clips_folder(job, one.row))
            if made is not None and true is not None and len(made) == len(true) and len(made) > 1:
                one.frechet = frechet_distance(made, true)
        if clips:
            results.append(RowResult(TRUTH, self._state(TRUTH), clips=clips))
        for one in results:
            if one.state == "done" and len(one.clips) < job.given.clips:
                one.state = f"{len(one.clips)} of {job.given.clips} clips"
        sentences = write_results(results, names, about, job.out)
        panels = {"truth": shown(truth_folder)}
        for row in self.rows:
            if row.name in _STRIP and not self._lacks(row):
                panels[_STRIP[row.name]] = shown(clips_folder(job, row))
        there = {name: clip for name, clip in panels.items() if clip is not None}
        picture = draw(results, names[-1], there, f"first {job.frames // 2} frames given", job.out)
        write_page(results, names, about, sentences, picture, job.out)
        return sentences

    def _result(self, row: Row) -> RowResult:
        lacks = self._lacks(row)
        if lacks:
            return RowResult(row, lacks)
        result = RowResult(row, self._state(row))
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
        if result.state == "done" and len(result.losses) < len(runs):
            result.state = f"{len(result.losses)} of {len(runs)} seeds"
        return result

    def _state(self, row: Row) -> str:
        """How a row stands whose figures are all there, but for what failed."""
        return f"failed: {self.failed[row.name]}" if row.name in self.failed else "done"
