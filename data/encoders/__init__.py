"""What turns clips and captions into shard entries: one file a model family, around diffusers' own classes.

`data.encoders.base.Encoder` lists what a family provides; `fingerprint` names its weights without loading them.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError

if TYPE_CHECKING:
    from data.encoders.base import Encoder, EncoderSettings
    from data.shards.manifest import Manifest

__all__ = [
    "FAMILIES", "check_cut", "check_encoder", "encoder_class", "family_of", "fingerprint", "load_encoder",
    "same_encoder", "same_vae",
]  # fmt: skip

log = logging.getLogger(__name__)

# By name, not by class: torch, diffusers and transformers take seconds to import, and decoding processes need none.
FAMILIES = {
    "wan": "data.encoders.wan:WanEncoder",
    "wan22_5b": "data.encoders.wan:Wan5BEncoder",
    "hunyuan": "data.encoders.hunyuan:HunyuanEncoder",
    "hunyuan15": "data.encoders.hunyuan15:Hunyuan15Encoder",
    "mochi": "data.encoders.mochi:MochiEncoder",
    "minimax_h3": "data.encoders.minimax_h3:MiniMaxH3Encoder",
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
    there, here = _kinds(manifest.encoder), _kinds(mine)
    told = manifest.encoder if "image" in here else _but(manifest.encoder, "image")
    if not (manifest.encoder.startswith(mine) if missing else same_encoder(told, mine)):
        hint = "give the weights that made them, or make the shards anew with data.prepare"
        if not missing and same_encoder(_but(told, "ids"), mine):
            hint = "its captions were tokenised otherwise than transformers does it here; make the shards anew"
        raise DataError(f"{manifest.home}: was made with {manifest.encoder}, expected {mine}; {hint}")
    if missing:
        named = f"{folder} has no {', '.join(missing)}"
        log.warning("%s: made with %s, only its family is compared: %s", manifest.home, manifest.encoder, named)
        return
    if "image" in there and "image" not in here:
        log.warning(
            "%s: made with %s, all but the image encoder is compared: %s has none",
            manifest.home,
            manifest.encoder,
            folder,
        )
    if "ids" in here and "ids" not in there:
        log.warning(
            "%s: made with %s, which does not record how captions were tokenised: that is not compared",
            manifest.home,
            manifest.encoder,
        )


def family_of(encoder: str) -> str:
    """The family that a fingerprint is of.

    Raises:
        DataError: it is none of `FAMILIES`.
    """
    family = "pixels" if encoder.startswith("pixels-") else encoder.partition(":")[0]
    if family not in FAMILIES:
        raise DataError(f"was made with {encoder}, which is none of {', '.join(FAMILIES)}")
    return family


def check_cut(manifest: Manifest, frames: int) -> int:
    """How many latent frames a clip of `frames` frames has, which is going to be cut from longer ones of a folder.

    Raises:
        DataError: no clip of the family has so many, or the family's longer clips do not begin with the shorter ones.
    """
    try:
        kind = encoder_class(family_of(manifest.encoder))
        kind.check(frames, [])
    except DataError as error:
        raise DataError(f"{manifest.home}: {error}") from error
    time = kind.facts.time
    latent = time.latents(frames)
    for longer in sorted({sample.shape[1] for sample in manifest.samples if sample.shape[1] > latent}):
        why = kind.why_not_cut(time.frames(longer), frames)
        if why is not None:
            raise DataError(
                f"{manifest.home}: clips of {frames} frames cannot be cut from its latents of {longer} frames: {why}; "
                f"make shards of frames={frames}"
            )
    return latent


def same_vae(one: str, other: str) -> bool:
    """Whether two fingerprints are of one family, VAE and image encoder, whatever the text encoders."""
    mine, its = _kinds(one), _kinds(other)
    if not mine or not its:
        return one == other
    named = [name for name in mine.keys() | its.keys() if name not in ("text", "ids")]
    return one.partition(":")[0] == other.partition(":")[0] and all(mine.get(n) == its.get(n) for n in named)


def same_encoder(one: str, other: str) -> bool:
    """Whether two fingerprints are equal, but for the ids that captions become, which earlier versions lack."""
    if "ids" in _kinds(one) and "ids" in _kinds(other):
        return one == other
    return _but(one, "ids") == _but(other, "ids")


def _kinds(name: str) -> dict[str, str]:
    """The parts of a fingerprint such as `wan:vae-0123+text-4567`; none of one of another make."""
    _, colon, parts = name.partition(":")
    return dict(part.partition("-")[::2] for part in parts.split("+")) if colon else {}


def _but(name: str, kind: str) -> str:
    """A fingerprint without one kind of its parts."""
    family, colon, parts = name.partition(":")
    return family + colon + "+".join(part for part in parts.split("+") if not part.startswith(f"{kind}-"))


def load_encoder(family: str, settings: EncoderSettings) -> Encoder:
    """The family's encoder, its weights loaded onto the device.

    Raises:
        DataError: an unknown family, a part of it is missing in the folder, or it holds another class.
    """
    return encoder_class(family)(settings)
