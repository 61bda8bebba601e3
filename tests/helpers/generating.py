"""Clips of tiny pipelines before they are decoded: ours, and those of diffusers' own pipeline."""

import torch
from diffusers import WanPipeline

from tests.helpers.tiny_pipelines import CLIP, TOKENS, words
from train.sample.generate import Generator
from train.sample.jobs import jobs
from train.sample.pipeline import pipeline_class
from train.sample.ranks import Ranks
from train.sample.settings import parse_settings


def generator(folder, **changes):
    settings, model = parse_settings(words(folder, **changes))
    todo = jobs(settings)
    cls = pipeline_class(str(folder), settings.image is not None)
    return Generator(settings, model, str(folder), cls, Ranks(1, 0, torch.device("cpu")), todo)


def latent(folder, **changes):
    made = generator(folder, **changes)
    return made.denoise(made.todo[0], made.prompts[0], made.attention)


def stock(folder, change=lambda pipeline: None, step_end=None):
    pipeline = WanPipeline.from_pretrained(folder)
    change(pipeline)
    return pipeline(
        "a red ball, moving & it's a clip",
        "the bar",
        height=CLIP["height"],
        width=CLIP["width"],
        num_frames=CLIP["frames"],
        num_inference_steps=CLIP["steps"],
        guidance_scale=CLIP["guidance"],
        generator=torch.Generator().manual_seed(CLIP["seed"]),
        max_sequence_length=TOKENS,
        output_type="latent",
        callback_on_step_end=step_end,
    ).frames


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
