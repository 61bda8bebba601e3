"""A run of a tiny model of Wan's: its folder, shards of four clips, its config."""

from pathlib import Path

import numpy as np
import torch

from data.encoders import load_encoder
from data.encoders.base import EncoderSettings
from data.shards.sample import Sample
from data.shards.writer import ShardWriter
from tests.helpers import wan_variants as wan
from tests.helpers.tiny_models import save_wan, save_wan_5b
from train.config.compose import compose_run, finish

FRAMES = 9


def model_folder(root: Path, variant: str) -> Path:
    """A whole diffusers folder of a tiny model."""
    folder = wan.save_folder(root / variant, variant)
    save_wan_5b(folder) if variant == "5b" else save_wan(folder, image=variant == "i2v")
    return folder


def make_shards(out: Path, folder: Path, variant: str, image: bool) -> Path:
    """Four clips, encoded and written as data.prepare does."""
    settings = EncoderSettings(folder, torch.device("cpu"), torch.float32, torch.float32, image_to_video=image)
    family = "wan22_5b" if variant == "5b" else "wan"
    encoder = load_encoder(family, settings)
    writer = ShardWriter(
        out,
        fps=encoder.facts.fps,
        encoder=type(encoder).fingerprint(folder),
        latent=encoder.latent_is,
        text=encoder.text_is,
        arguments={},
        empty_prompt=encoder.prompt(""),
    )
    height, width = (64, 96) if variant == "5b" else (32, 48)
    for number in range(4):
        frames = np.random.default_rng(number).integers(0, 256, (FRAMES, height, width, 3), dtype=np.uint8)
        prompt = encoder.prompt("a red ball")
        conditions = encoder.image(frames) if image else {}
        writer.write(Sample(f"clip-{number}", encoder.encode(frames), prompt.text, {}, conditions, {"caption": "a"}))
    writer.close()
    return out


def config_of(root: Path, conf: str, folder: Path, shards: Path, size: tuple[int, int], **changes: object):
    given = {
        "conf": conf,
        "runs": root / "runs",
        "model.path": folder,
        "model.dimensions": "null",
        "data.shards": shards,
        "data.workers": 0,
        "clip.frames": FRAMES,
        "clip.height": size[0],
        "clip.width": size[1],
        "attention.block": 16,
        "attention.dense_layers": 0,
        "lora.rank": 4,
        "lora.alpha": 4,
        "optim.accumulate": 1,
        "optim.warmup": 0,
        "trainer.steps": 3,
        "trainer.compile": "false",
        "trainer.precision": "fp32",
        "log.wandb": "disabled",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return finish(compose_run({key: str(value) for key, value in given.items()}))
