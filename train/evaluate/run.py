"""The command from its settings to its files.

    <out>/results.md, results.csv, results.json    the table (`train.evaluate.results`)
    <out>/report.html                              the page
    <out>/clips/                                   videos and prompt files (`train.evaluate.clips`)
    <out>/parts/, about.json                       what a stopped command goes on from (`train.evaluate.results_folder`)

A signal ends the command at once: every file is written beside and renamed, so that what is there is whole.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence

import torch

from data.encoders import check_encoder
from data.encoders.base import Encoder
from data.errors import DataError
from data.io.files import write_utf8
from data.prepare.stopping import Stopping
from data.shards.batch import collate
from data.shards.manifest import Manifest
from data.shards.sample import Prompt, Sample
from data.shards.stages import load_stages
from data.shards.stream import read_samples
from train.errors import UserError
from train.evaluate.alignment import TextAlignment
from train.evaluate.clips import Made, encoded, folder_of, make_clip, write_prompt_file, write_video
from train.evaluate.held_out import measure_losses
from train.evaluate.model import EvaluatedModel
from train.evaluate.page import write_page
from train.evaluate.results import Row, markdown, write_results
from train.evaluate.results_folder import open_folder, part_file
from train.evaluate.settings import Job, Length
from train.measures.clip_measures import measure_clip
from train.measures.decoding import encoder_for
from train.measures.levels import validation_levels
from train.models.conditions import Conditions
from train.models.loading import encoder_of
from train.planning.full_memory import memory_in_words
from train.shards import held_out
from train.step.objective import Objective
from train.storage.inputs import check_masks

_FEWEST = 4  # latents of a clip that can be measured


def run_evaluation(job: Job) -> str:
    """Measures what is not there yet, writes all, and returns the table.

    Raises:
        UserError, DataError: weights or shards that are missing or do not suit each other, or memory is full.
    """
    with Stopping(), memory_in_words("Give lower lengths=; what is finished stays"):
        return _Evaluation(job).run()


class _Evaluation:
    """One command's work.

    Attributes:
        notes: what is not measured, and why, a line each.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.notes: list[str] = []
        self.shards = self._shards()
        self.held: list[Sample] = []
        if self.shards is not None:
            stages = load_stages(job.config.data.stages)
            count = max(job.given.held_out, 0 if job.prompts else job.given.clips)
            self.held = list(read_samples(self.shards, count, stages))
            if len(self.held) < 2:
                raise UserError(f"shards has {len(self.held)} clips, expected at least 2 for an interval")
        self.levels: Mapping[float, float] = validation_levels(job.config)

    @functools.cached_property
    def model(self) -> EvaluatedModel:
        """Loaded when it is first needed: a command whose parts are all there needs none."""
        model = EvaluatedModel(self.job)
        if self.held:
            held = self.held[0]
            model.adapter.check(held.latent[None], Conditions.of(collate([held], 0)))
        return model

    @functools.cached_property
    def objective(self) -> Objective:
        """The run's."""
        assert self.shards is not None
        return Objective.of(self.job.config, self.shards.load_empty_prompt())

    @functools.cached_property
    def decoder(self) -> Encoder | None:
        """The model's VAE; None where its weights are missing."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return encoder_for(self.job.config, device, vae_only=True)
        except DataError as error:
            self.notes.append(f"videos are not written: {error}")
            return None

    @functools.cached_property
    def alignment(self) -> TextAlignment | None:
        """The user's CLIP; None where it is not given or missing."""
        try:
            if self.job.given.clip is None:
                raise UserError("clip= is not set, expected the folder of a CLIP of transformers")
            return TextAlignment(self.job.given.clip)
        except UserError as error:
            self.notes.append(f"text alignment is not measured: {error}")
            return None

    def run(self) -> str:
        job = self.job
        check_masks(job.config, job.given.run)
        open_folder(job, self._fingerprint())
        prompts, empty = self._prompts()
        rows: list[Row] = []
        clips: list[tuple[Row, Sequence[Made]]] = []
        for length in job.lengths:
            if (truth := self._truth(length)) is not None:
                rows.append(truth)
            for variant in job.variants:
                row = Row(variant.name, length.times, length.frames, variant.tuned)
                row.shares = list(self.levels.values())
                made: list[Made] = []
                longest = min((held.latent.shape[1] for held in self.held), default=0)
                if length.latents <= longest:
                    chosen = self.held[: job.given.held_out]
                    row.losses = measure_losses(
                        job, lambda: self.model, self.objective, chosen, self.levels, variant, length
                    )
                elif self.held and variant is job.variants[0]:
                    self.notes.append(
                        f"losses at {length.times}x are not measured: the shortest held-out clip has {longest} latent "
                        f"frames, {length.latents} are needed"
                    )
                if empty is not None:
                    for number, prompt in enumerate(prompts):
                        made.append(make_clip(job, lambda: self.model, prompt, empty, number, variant, length))
                    self._finish(row, made, length)
                row.gflops = self._gflops(row, length, prompts or self.held)
                rows.append(row)
                clips.append((row, made))
        notes = list(dict.fromkeys(self.notes))
        about = json.loads((job.out / "about.json").read_text(encoding="utf-8"))
        write_results(rows, list(self.levels), notes, {"run": str(job.given.run), **about}, job.out)
        write_page(job, rows, list(self.levels), notes, clips)
        return markdown(rows, notes)

    def _shards(self) -> Manifest | None:
        job, config = self.job, self.job.config
        if (given := job.given.shards or config.validation.shards) is not None:
            shards = Manifest.load(given)
            check_encoder(shards, *encoder_of(config.model))
            return shards
        if config.data.shards is None:
            frames = max([config.clip.frames, *(length.frames for length in job.lengths)])
            return held_out(config, max(job.given.held_out, job.given.clips), frames)
        self.notes.append("losses are not measured: shards= is not set, and the run has no validation.shards")
        return None

    def _fingerprint(self) -> str | None:
        if self.shards is None:
            return None
        return f"{self.shards.encoder}, empty prompt {self.shards.load_empty_prompt().digest()[:16]}"

    def _prompts(self) -> tuple[list[Sample], Prompt | None]:
        """What clips are generated of; no empty prompt where none can be."""
        job = self.job
        if not job.prompts:
            chosen = {held.caption: held for held in self.held[: job.given.clips]}
            if not chosen:
                wanted = job.given.clips > 0
                self.notes += wanted * ["clips are not generated: prompts= is not set, and there are no held-out clips"]
                return [], None
            assert self.shards is not None
            return list(chosen.values()), self.shards.load_empty_prompt()
        try:
            found, empty = encoded(job, self.model.adapter.latent_channels)
            self.model.adapter.check(found[0].latent[None], Conditions.of(collate(found[:1], 0)))
        except (DataError, UserError) as error:
            self.notes.append(f"clips are not generated: {error}")
            return [], None
        return found, empty

    def _truth(self, length: Length) -> Row | None:
        """The held-out clips themselves: what the measures are of real ones."""
        chosen = [held for held in self.held[: self.job.given.held_out] if held.latent.shape[1] >= length.latents]
        if not chosen or length.latents < _FEWEST:
            return None
        native = self.job.native
        measures = [measure_clip(held.latent[:, : length.latents].float(), native) for held in chosen]
        return Row("held-out clips", length.times, length.frames, measures=measures)

    def _finish(self, row: Row, made: Sequence[Made], length: Length) -> None:
        """Measures a row's clips and writes their videos."""
        job = self.job
        if length.latents < _FEWEST:
            self.notes.append(f"clips at {length.times}x are not measured: {length.latents} latents, {_FEWEST} needed")
        elif (broken := sum(not clip.latent.isfinite().all() for clip in made)) > 0:
            self.notes.append(
                f"clips of {row.name} at {length.times}x are not measured: {broken} of {len(made)} have values that "
                "are not finite, the model has diverged"
            )
        else:
            row.measures = [measure_clip(clip.latent, job.native) for clip in made]
        scores = []
        for clip in made:
            score = part_file(job, f"alignment {job.given.clip} {clip.strip.name}", ".json")
            there = clip.video.exists() and clip.strip.exists()
            if not (there and (score.exists() or self.alignment is None)) and self.decoder is not None:
                frames = write_video(job, self.decoder, clip)
                if self.alignment is not None:
                    write_utf8(score, json.dumps(self.alignment.score(frames, clip.prompt)))
            if self.alignment is not None and score.exists():
                scores.append(float(json.loads(score.read_text(encoding="utf-8"))))
        row.alignment = scores
        if made:
            variant = next(one for one in job.variants if one.name == row.name)
            write_prompt_file(folder_of(job, variant, length), made)

    def _gflops(self, row: Row, length: Length, samples: Sequence[Sample]) -> float | None:
        """Read from a part, so that a command whose parts are there loads no model."""
        if not samples:
            return None
        variant = next(one for one in self.job.variants if one.name == row.name)
        file = part_file(self.job, f"gflops {variant.what} {length.frames}", ".json")
        if not file.exists():
            channels, _, *sides = samples[0].latent.shape
            latent = torch.empty(1, channels, length.latents, *sides, device="meta")
            write_utf8(file, json.dumps(self.model.gflops(variant, latent)))
        return float(json.loads(file.read_text(encoding="utf-8")))
