"""The facts of a model that shards are made for, from their only home, the model's file in conf/model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from radial.grid import LatentTime

_CONF = Path(__file__).resolve().parents[2] / "conf" / "model"


@dataclass(frozen=True)
class Facts:
    """What an encoder takes from conf/model.

    Attributes:
        fps: frames of video a second.
        lengths: frames of a clip at 1x, 2x and 4x of the native length, those of the published recipes.
        size: (height, width) in pixels of what the model's authors generate.
        strides: (time, space), pixels of a latent cell.
        time: the lengths that clips may have, and their latent frames.
        patch: latent cells of a token in height and width.
        text_tokens: that a prompt is padded or cut to.
    """

    fps: float
    lengths: dict[str, int]
    size: tuple[int, int]
    strides: tuple[int, int]
    time: LatentTime
    patch: int
    text_tokens: int


@cache
def facts_of(model: str) -> Facts:
    """The facts in the file ``conf/model/<model>.yaml``."""
    found = yaml.safe_load((_CONF / f"{model}.yaml").read_text(encoding="utf-8"))
    return Facts(
        fps=float(found["fps"]),
        lengths={"1x": found["native_frames"], **found["longer"]},
        size=(found["native_size"][0], found["native_size"][1]),
        strides=(found["vae"][0], found["vae"][1]),
        time=LatentTime(found["vae"][0], tuple(found["vae_chunks"]) if "vae_chunks" in found else None),
        patch=found["patch"][1],
        text_tokens=found["text_tokens"],
    )
