"""Small real things for the tests of train/: a Wan checkpoint in diffusers' format, shards, a run config."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from train.config.compose import compose_run, finish
from train.config.schema import RunConfig

ARCHITECTURE = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 3,
}


def save_model(folder: Path, seed: int = 0) -> Path:
    """A random tiny Wan transformer, saved by diffusers; norms and tables away from their trivial start."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**ARCHITECTURE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def settings(tmp: Path, **changes: object) -> dict[str, str]:
    """conf=shapes_4x cut down to seconds, as the command line takes it: 8 frames, a tiny model, 4 steps, no report.

    ``changes`` are keys of the config with ``__`` for the dot.
    """
    model = tmp / "model"
    if not model.exists():
        save_model(model)
    given = {
        "conf": "shapes_4x",
        "runs": tmp / "runs",
        "model.path": model,
        "clip.frames": 8,
        "attention.block": 64,
        "lora.rank": 4,
        "lora.alpha": 8,
        "data.synthetic_clips": 12,
        "data.workers": 0,
        "optim.lr": 2e-3,
        "optim.warmup": 5,
        "trainer.steps": 4,
        "trainer.precision": "fp32",
        "trainer.checkpoint_every": 2,
        "report.clips": 0,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return {key: str(value) for key, value in given.items()}


def run_config(tmp: Path, **changes: object) -> RunConfig:
    """The config of `settings`."""
    return finish(compose_run(settings(tmp, **changes)))


def words(tmp: Path, **changes: object) -> list[str]:
    """The command line of `settings`."""
    return [f"{key}={value}" for key, value in settings(tmp, **changes).items()]
