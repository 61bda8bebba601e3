"""What turns clips and captions into shard entries: one file a model family, around diffusers' own classes.

`data.encoders.base.Encoder` says what a family tells; `fingerprint` names its weights without loading them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError

if TYPE_CHECKING:
    from data.encoders.base import Encoder, EncoderSettings

__all__ = ["FAMILIES", "encoder_class", "fingerprint", "load_encoder"]

# By name, not by class: torch, diffusers and transformers take seconds to import, and decoding processes need none.
FAMILIES = {
    "wan": "data.encoders.wan:WanEncoder",
    "hunyuan": "data.encoders.hunyuan:HunyuanEncoder",
    "mochi": "data.encoders.mochi:MochiEncoder",
    "pixels": "data.encoders.pixels:PixelEncoder",
}


def encoder_class(family: str) -> type[Encoder]:
    """The class of a family.

    Raises:
        DataError: an unknown family.
    """
    if family not in FAMILIES:
        raise DataError(f"model is {family!r}, expected one of {', '.join(FAMILIES)}")
    module, _, name = FAMILIES[family].partition(":")
    found: type[Encoder] = getattr(importlib.import_module(module), name)
    return found


def fingerprint(family: str, folder: Path | None) -> str:
    """What identifies a family's VAE and text encoders: a manifest's `encoder`. Reads headers and samples of weights.

    Args:
        family: a key of `FAMILIES`.
        folder: the diffusers folder; a family without weights has none.

    Raises:
        DataError: an unknown family, or a part of it is missing in the folder.
    """
    return encoder_class(family).fingerprint(folder)


def load_encoder(family: str, settings: EncoderSettings) -> Encoder:
    """The family's encoder, its weights loaded onto the device.

    Raises:
        DataError: an unknown family, a part of it is missing in the folder, or it holds another class.
    """
    return encoder_class(family)(settings)
