"""A study cut down to seconds: a random tiny base, clips of 16 frames of 12 x 12 tokens, two steps a row."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.tiny import save_model


def study_settings(tmp: Path, **changes: object) -> list[str]:
    """The command line; ``changes`` are keys with ``__`` for the dot."""
    base = tmp / "base"
    if not base.exists():
        save_model(base)
    given = {
        "base": base,
        "runs": tmp / "runs",
        "out": tmp / "study",
        "length": "4x",
        "seeds": "0",
        "sigmas": "0.6",
        "held_out": 4,
        "clips": 2,
        "at_once": 2,
        "sampling_steps": 2,
        "enough": 1000,
        "model.native_frames": 4,
        "model.longer": "{2x: 8, 4x: 16}",
        "clip.height": 48,
        "clip.width": 48,
        "attention.block": 32,
        "lora.rank": 4,
        "lora.alpha": 4,
        "data.synthetic_clips": 6,
        "data.batch_size": 1,
        "data.workers": 0,
        "trainer.steps": 2,
        "trainer.precision": "fp32",
        "trainer.compile": "false",
        "trainer.checkpoint_every": 1,
        "validation.every": 1,
        "validation.clips": 1,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [f"{key}={value}" for key, value in given.items()]
