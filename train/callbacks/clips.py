"""Clips of fixed prompts while training: what the LoRA does, seen rather than read off a loss."""

from __future__ import annotations

import math
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from data.encoders.base import Encoder
from data.encoders.decoding import decode_frames
from data.errors import DataError
from data.shards.batch import collate
from data.shards.sample import Sample
from train.attention.step import StepAttention
from train.callbacks.base import StepCallback, every
from train.callbacks.stop import StopSignals
from train.callbacks.throughput import Throughput
from train.callbacks.watchdog import Watchdog
from train.config.schema import RunConfig
from train.errors import Asked, UserError
from train.flow import noise_like
from train.loggers.forgiving import Forgiving
from train.measures.decoding import encoder_for
from train.measures.euler import generate, sampled_with
from train.models.families import family_of
from train.parallel.control_group import ControlGroup
from train.sample.pipeline import first_frame
from train.sample.video import video_file
from train.step.module import LengthExtensionModule

FOLDER = "samples"


class PromptClips(StepCallback):
    """Generates a clip of each prompt every ``validation.samples_every`` steps and at the end.

    The prompts are encoded once, before the first step, by rank 0, which then frees the text encoders. Groups of ranks
    that share clips take the prompts in turn, and each group's first rank decodes and writes. The noise has generators
    of its own, so that training's random state stays as it is; activations are free between steps, and what generating
    and decoding took is given back before the next.

    Args:
        config: ``validation.prompts``, ``images`` and ``samples_*``; the clip is the run's own.
        folder: of the run; videos go to ``samples/step-<n>``.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        control: ControlGroup,
        watchdog: Watchdog,
        throughput: Throughput,
        stop: StopSignals,
    ) -> None:
        super().__init__()
        self.config, self.folder, self.every = config, folder, config.validation.samples_every
        self.control, self.watchdog, self.throughput, self.stop = control, watchdog, throughput, stop
        self._conditions: list[Sample] = []
        self._encoder: Encoder | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, LengthExtensionModule)
        super().on_train_start(trainer, module)
        self.control.open(trainer)
        if self.every:
            mine: list[Sample] = []
            error = ""
            if self.control.rank == 0:
                try:
                    mine = self._encode(module)
                except (DataError, UserError) as found:
                    error = str(found)  # raised on every rank, so that none waits for this one
            mine, error = self.control.from_first((mine, error))
            if error:
                raise UserError(f"validation.prompts: {error}")
            self._conditions = mine

    def on_step_end(self, trainer: L.Trainer, module: LengthExtensionModule) -> None:
        if not self.stop.agreed and every(self.every, trainer):
            start = time.perf_counter()
            with module.evaluating(), suppress(Asked):
                self.generate(trainer, module)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.throughput.leave_out(time.perf_counter() - start)

    @torch.no_grad()
    def generate(self, trainer: L.Trainer, module: LengthExtensionModule) -> None:
        """All prompts' clips with the weights of now. Every rank must call it.

        Raises:
            Asked: on every rank, when the run is asked to stop meanwhile.
        """
        sharing = module.sequence_size
        group, groups = self.control.rank // sharing, self.control.world // sharing
        writes = self.control.rank % sharing == 0
        files: list[Path] = []
        # every rank makes as many forward passes, so that none waits for another's
        for turn in range(math.ceil(len(self._conditions) / groups)):
            number = turn * groups + group
            counts = number < len(self._conditions)
            clip = self._conditions[number % len(self._conditions)]
            with trainer.precision_plugin.forward_context():
                latent = self._latent(trainer, module, clip, number)
            if counts and writes:
                words = re.sub(r"\W+", "-", clip.caption.lower()).strip("-")[:40].strip("-")
                file = self.folder / FOLDER / f"step-{trainer.global_step:06d}" / f"{number:02d}-{words}.mp4"
                self._write(latent, file)
                files += [file] if file.exists() else []
            self.watchdog.progress()
        found = sorted(file for files in self.control.gather(files) for file in files)
        for logger in trainer.loggers:
            if isinstance(logger, Forgiving) and isinstance(logger.inner, WandbLogger):
                logger.attempt(_to_wandb, logger.inner.experiment, found, trainer.global_step)

    def _latent(self, trainer: L.Trainer, module: LengthExtensionModule, clip: Sample, number: int) -> Tensor:
        """The clip of a prompt, (C, f, h, w)."""
        batch = collate([clip], 0).to(module.device)
        steps, guidance, low = sampled_with(self.config)
        distilled = module.adapter.takes_guidance
        conditions, empty = module.objective.both(batch, guidance if distilled else None)
        shape = batch.latent
        noise = noise_like(shape, self.config.seed, FOLDER, number)

        def attention(sigma: float) -> StepAttention:
            self.watchdog.progress()
            if self.stop.agree(trainer):
                raise Asked
            return module.attention_at(shape, sigma)

        made = generate(
            module.adapter,
            noise,
            conditions,
            empty,
            attention,
            steps=steps,
            shift=self.config.shift(),
            guidance=1.0 if distilled else guidance,
            guidance_low=1.0 if distilled else low,
            label=f"Sample {number + 1}",
            quiet=self.control.rank > 0,
        )
        return made[0]

    def _write(self, latent: Tensor, file: Path) -> None:
        """Decodes a latent and writes it, or warns why there is no room for it."""
        encoder = self._decoder()
        try:
            with video_file(file, encoder.facts.fps) as video:
                if not hasattr(encoder, "vae"):
                    video.add(encoder.decode(latent.float().cpu()))
                    return
                vae = encoder.vae.to(latent.device)
                try:
                    for frames in decode_frames(vae, latent[None], tiled=family_of(self.config.model).decodes_tiled):
                        video.add(frames)
                        self.watchdog.progress()
                finally:
                    vae.to("cpu")  # where there is no room for the video too: training needs the GPU's memory
        except OSError as error:
            print(f"warning: {file} is not written ({error}); training goes on", flush=True)

    def _decoder(self) -> Encoder:
        if self._encoder is None:
            self._encoder = encoder_for(self.config, torch.device("cpu"), vae_only=True)
        return self._encoder

    def _encode(self, module: LengthExtensionModule) -> list[Sample]:
        """What the model sees of each prompt, beside a latent of the clip's shape; the encoders are gone afterwards."""
        clip, given = self.config.clip, self.config.validation
        takes_first_frame = family_of(self.config.model).takes_first_frame
        images = bool(given.images) and not takes_first_frame
        encoder = encoder_for(self.config, module.device, images=images)
        found = []
        for number, text in enumerate(given.prompts):
            prompt, image = encoder.prompt(text), {}
            if given.images:
                picture = first_frame(Path(given.images[number]), clip.width, clip.height)
                if takes_first_frame:
                    image = {"first_frame": encoder.encode(np.asarray(picture)[None])}
                else:
                    still = np.broadcast_to(np.asarray(picture), (clip.frames, clip.height, clip.width, 3))
                    image = encoder.image(still)
            size = self.config.latent_size()
            latent = torch.zeros(module.adapter.latent_channels, *size, dtype=torch.bfloat16)
            found.append(Sample(f"prompt-{number}", latent, prompt.text, prompt.pooled, image, {"caption": text}))
            self.watchdog.progress()
        del encoder
        if module.device.type == "cuda":
            torch.cuda.empty_cache()
        return found


def _to_wandb(run: Any, files: list[Path], step: int) -> None:
    import wandb

    videos = {f"{FOLDER}/{file.stem}": wandb.Video(str(file)) for file in files}
    run.log({**videos, "trainer/global_step": step})
