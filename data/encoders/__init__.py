"""What turns clips and captions into shard entries: one file a model family, around diffusers' own classes.

`data.encoders.base.Encoder` says what a family tells; `fingerprint` names its weights without loading them.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError

if TYPE_CHECKING:
    from data.encoders.base import Encoder, EncoderSettings
    from data.manifest import Manifest

__all__ = ["FAMILIES", "check_encoder", "encoder_class", "fingerprint", "load_encoder"]

log = logging.getLogger(__name__)

# By name, not by class: torch, diffusers and transformers take seconds to import, and decoding processes need none.
FAMILIES = {
    "wan": "data.encoders.wan:WanEncoder",
    "wan22_5b": "data.encoders.wan:Wan5BEncoder",
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


def fingerprint(family: str, folder: Path | None, image_to_video: bool = False) -> str:
    """What identifies a family's VAE and text encoders: a manifest's `encoder`. Reads headers and samples of weights.

    Args:
        family: a key of `FAMILIES`.
        folder: the diffusers folder; a family without weights has none.
        image_to_video: the image encoder too, where the folder has one.

    Raises:
        DataError: an unknown family, or a part of it is missing in the folder.
    """
    return encoder_class(family).fingerprint(folder, image_to_video)


def check_encoder(manifest: Manifest, family: str, folder: Path | None) -> None:
    """Refuse shards that were made for another model, or by another VAE, text or image encoder.

    Args:
        manifest: of the shards.
        family: the model that they are for, a key of `FAMILIES`.
        folder: its diffusers folder. Where that has no VAE and text encoders, only the family is compared, and where
            it has no image encoder, all but that; the log says so.

    Raises:
        DataError: naming both.
    """
    kind = encoder_class(family)
    missing = [] if folder is None else [p for p in sum(kind.parts.values(), ()) if not (folder / p).is_dir()]
    mine = f"{family}:" if missing else fingerprint(family, folder, "+image-" in manifest.encoder)
    if not manifest.encoder.startswith(mine):
        hint = "give the weights that made them, or make the shards anew with data.prepare"
        raise DataError(f"{manifest.home}: was made with {manifest.encoder}, expected {mine}; {hint}")
    if missing:
        named = f"{folder} has no {', '.join(missing)}"
        log.warning("%s: made with %s, only its family is compared: %s", manifest.home, manifest.encoder, named)
    elif mine != manifest.encoder:
        log.warning(
            "%s: made with %s, all but the image encoder is compared: %s has none",
            manifest.home,
            manifest.encoder,
            folder,
        )


def load_encoder(family: str, settings: EncoderSettings) -> Encoder:
    """The family's encoder, its weights loaded onto the device.

    Raises:
        DataError: an unknown family, a part of it is missing in the folder, or it holds another class.
    """
    return encoder_class(family)(settings)
