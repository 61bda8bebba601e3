"""From settings to videos: prompts, transformer, steps, frames, file."""

from __future__ import annotations

import json
import resource
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from data.encoders.decoding import decode_frames
from radial.cli.ranks import Rank
from train import __version__
from train.attention.recipe import AttentionRecipe
from train.config.schema import ModelConfig
from train.errors import UserError
from train.memory.apply import stream_models
from train.memory.compiler import compile_layers
from train.models.families import family_of
from train.planning.full_memory import memory_in_words
from train.sample.compare import write_both
from train.sample.extension import Extension
from train.sample.jobs import Job, jobs
from train.sample.latents import Clip, drop_clips, keep_clips, kept_clips
from train.sample.pipeline import (
    check_transformers,
    encode_prompts,
    first_frame,
    load_pipeline,
    pipeline_class,
    pipeline_folder,
    release,
    transformers_of,
)
from train.sample.ranks import Ranks, Split
from train.sample.records import check_writable, execution, identity, is_done, record_of
from train.sample.settings import Settings, size_of
from train.sample.video import video_file

_LESS = (
    "offload=model or offload=layer takes less, tiled=true where frames are decoded, and fewer frames= or a smaller "
    "size. The same command goes on: a clip whose steps are done is only decoded"
)


def generate(settings: Settings, model: ModelConfig) -> list[Path]:
    """Makes the videos that are not there yet, and returns all of them.

    Raises:
        UserError: something is missing or does not fit, or memory is full; nothing that is finished is lost, nor the
            steps of a clip whose frames are not written yet.
    """
    for text in ("`torch_dtype` is deprecated.*", "Already found a `peft_config`.*"):  # of the libraries to each other
        warnings.filterwarnings("ignore", message=text)
    if model.storage is not None:
        raise UserError(
            f"model.storage is {model.storage}, but clips are generated with the model's own weights: leave it out; "
            "offload=layer fits them into less memory"
        )
    folder = pipeline_folder(model)
    found = jobs(settings)
    _check_negatives(found, settings, model)
    done = [job for job in found if is_done(job, settings, model)]
    todo = [job for job in found if job not in done]
    if done and Rank.here().index == 0:
        print(f"{len(done)} of {len(found)} videos are there already")
        for job in done:  # which a kill, or another place for the video, may have left
            drop_clips(job)
    if todo:
        ranks = Ranks.join()
        if ranks.rank == 0:
            check_writable(todo)
            family_of(model).check_prompts(Path(folder), [job.prompt for job in todo], model.text_tokens)
            check_transformers(folder)
            for job in todo:
                if job.image is not None:
                    first_frame(job.image, *size_of(settings))
        cls = pipeline_class(folder, todo[0].image is not None)
        with memory_in_words(_LESS):
            Generator(settings, model, folder, cls, ranks, todo).run()
    return [job.out for job in found]


def _check_negatives(found: Sequence[Job], settings: Settings, model: ModelConfig) -> None:
    """Raise a UserError for a negative prompt that nothing would look at."""
    family = family_of(model)
    if any(job.negative for job in found) and not family.takes_negative(settings.guidance or 1.0):
        why = (
            f"guidance {settings.guidance:g} is off"
            if family.guided_by_prompt
            else "the model takes the guidance as an input"
        )
        raise UserError(f"negative is set, but {why}: there is no pass with a negative prompt, leave it out")


class Generator:
    """One loaded pipeline, for clips of one shape.

    Args:
        settings: complete.
        model: the model's config.
        folder: of the pipeline.
        cls: the pipeline's class.
        ranks: who works on it.
        todo: the videos to make.
    """

    def __init__(
        self, settings: Settings, model: ModelConfig, folder: str, cls: Any, ranks: Ranks, todo: Sequence[Job]
    ) -> None:
        self.settings, self.model, self.ranks, self.todo = settings, model, ranks, todo
        device, dtype = ranks.device, {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.dtype]
        self.family = family = family_of(model)
        guided = family.takes_negative(settings.guidance or 1.0)
        heads = json.loads((Path(folder) / "transformer" / "config.json").read_text(encoding="utf-8"))[
            "num_attention_heads"
        ]
        split = Split.of(ranks.world, ranks.rank, settings.sequence, settings.split_guidance, guided, heads)
        encoded = None
        if ranks.rank == 0:
            self._say(f"encoding {len(todo)} prompts")
            encoded = encode_prompts(cls, family, folder, todo, model.text_tokens, guided, device, dtype)
        self.prompts: list[dict[str, Tensor]] = ranks.share(encoded)
        self._say("loading the transformer")
        self.pipeline = load_pipeline(cls, family, folder, settings, device, dtype)
        self.transformers = transformers_of(self.pipeline)
        self.extension = Extension(self.pipeline, settings, model, split=split, bring=self._bring)
        self.denoiser, self.attention = self.extension.denoiser, self.extension.denoiser.attention
        for line in self.extension.loaded:
            self._say(line)
        for adapter in self.extension.adapters:
            adapter.transformer.requires_grad_(False).eval()
            if settings.offload == "none":
                adapter.transformer.to(device)
            if settings.compile and settings.offload != "layer":
                compile_layers(adapter.layers())
        if settings.offload == "layer":
            stream_models(self.extension.adapters, device, compiled=settings.compile)
        self.pipeline.set_progress_bar_config(unit="step", dynamic_ncols=True, disable=ranks.rank != 0)

    def run(self) -> None:
        """Makes the videos, one after the other."""
        for number, (job, prompt) in enumerate(zip(self.todo, self.prompts, strict=True), 1):
            if len(self.todo) > 1:
                self._say(f"video {number} of {len(self.todo)}: {job.out.name}")
            if self.ranks.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            known = identity(job, self.settings, self.model)  # now: files may be gone when the clip is there
            wanted = {self.attention.pattern.name: self.attention}
            if self.settings.compare is not None:
                wanted["dense"] = self.attention.dense()
            kept = kept_clips(job, known) if self.ranks.rank == 0 else {}
            there = self.ranks.share(sorted(wanted.keys() & kept.keys()))
            if there:
                self._say(f"{job.out}: denoised before ({', '.join(there)})")
            made = {name: self.denoise(job, prompt, wanted[name]) for name in wanted if name not in there}
            if self.ranks.rank == 0:
                clips = {name: (made if name in made else kept)[name] for name in wanted}
                if self.settings.offload == "model":
                    self._bring(None)
                    release(self.ranks.device)
                try:
                    if made:
                        keep_clips(job, known, clips)
                    self.write(job, known, clips)
                    drop_clips(job)
                except OSError as error:
                    place = self._rescue(job, known, clips)
                    raise UserError(f"out {job.out} cannot be written ({error}): {place}") from error

    def denoise(self, job: Job, prompt: dict[str, Tensor], attention: AttentionRecipe) -> Clip:
        """The latent of a job with an attention; every rank must call it."""
        settings, device = self.settings, self.ranks.device
        given: dict[str, Any] = {name: tensor.to(device) for name, tensor in prompt.items()}
        negative = self.family.negative_inputs(given)
        if job.image is not None:
            given["image"] = first_frame(job.image, *size_of(settings))
        if settings.guidance_2 is not None:
            given["guidance_scale_2"] = settings.guidance_2
        self.denoiser.restart(attention, negative)
        self.pipeline.set_progress_bar_config(**{**self.pipeline._progress_bar_config, "desc": attention.pattern.name})
        latent = self.family.call(
            self.pipeline,
            settings.guidance,
            self.model.text_tokens,
            self.denoiser.step_end,
            height=settings.height,
            width=settings.width,
            num_frames=settings.frames,
            num_inference_steps=settings.steps,
            # on the CPU, so that every device and any number of them starts from the same noise
            generator=torch.Generator().manual_seed(settings.seed),
            **given,
        )
        return Clip(latent.cpu(), self.denoiser.seconds, self.denoiser.dense)

    def _bring(self, wanted: Any) -> None:
        """With ``offload=model``: that transformer on the device, the others not."""
        if self.settings.offload != "model":
            return
        for transformer in self.transformers:
            target = self.ranks.device if transformer is wanted else torch.device("cpu")
            if transformer.device != target:
                transformer.to(target)

    def _rescue(self, job: Job, known: dict[str, Any], clips: dict[str, Clip]) -> str:
        """Writes what the disk of ``out`` does not take to the system's folder for temporary files; in words."""
        try:
            place = Path(tempfile.mkdtemp(prefix="sample-"))
            self.write(replace(job, out=place / job.out.name), known, clips)
        except OSError as error:
            return f"nor elsewhere ({error}), it is lost"
        return f"it is in {place}, move what is there to {job.out.parent}, and the same command goes on"

    def write(self, job: Job, known: dict[str, Any], clips: dict[str, Clip]) -> None:
        """Writes a job's clips, and the record that stands beside them.

        Raises:
            OSError: there is no place for them.
        """
        settings = self.settings
        assert settings.fps is not None and settings.tiled is not None
        (name, clip), *others = clips.items()
        with record_of(job, known) as record:
            frames = self._decode(clip, name)
            if others:
                about = self._compare(job, list(frames), clip, others[0][1])
            else:
                about = {}
                with video_file(job.out, settings.fps) as video:
                    for part in frames:
                        video.add(part)
            measured = {**clip.measured(), "peak_memory_gib": _peak_memory(self.ranks.device), **about}
            record |= {
                "execution": execution(settings),
                "loras": self.extension.loaded,
                "measured": measured,
                "gpus": self.ranks.world,
                "device": torch.cuda.get_device_name() if self.ranks.device.type == "cuda" else "cpu",
                "versions": {
                    "radial-lora": __version__,
                    "torch": torch.__version__,
                    "diffusers": diffusers.__version__,
                },
            }
        steps = ", ".join(
            f"{measured[key]:.2f} s a {kind} step"
            for kind in ("dense", "sparse")
            if (key := f"seconds_a_{kind}_step") in measured
        )
        self._say(f"{job.out}: {measured['seconds']:.1f} s, {steps}, {measured['peak_memory_gib']:.1f} GiB")

    def _decode(self, clip: Clip, name: str) -> Iterable[np.ndarray]:
        self._say(f"decoding, {name} attention")
        assert self.settings.tiled is not None
        return decode_frames(self.pipeline.vae, clip.latent, tiled=self.settings.tiled)

    def _compare(self, job: Job, frames: Sequence[np.ndarray], clip: Clip, dense: Clip) -> dict[str, Any]:
        """Writes both clips, and prints how they compare; for the JSON."""
        alike = write_both(job, self.settings.fps or 0.0, frames, self._decode(dense, "dense"))
        fast, slow = clip.steady(), dense.steady()  # without what the first steps build and compile
        self._say(alike.table(self.attention.pattern.name, fast, slow))
        return {"dense": dense.measured(), "speed_up": slow / fast, **alike.measured()}

    def _say(self, line: str) -> None:
        if self.ranks.rank == 0:
            print(line, flush=True)


def _peak_memory(device: torch.device) -> float:
    """GiB: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
