"""What a model family must provide so that shards can be made for it."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.encoders.decoding import TILED, decode_frames
from data.encoders.model_facts import Facts
from data.encoders.tokens import check_round_trip, ids_of, open_tokenizer
from data.encoders.weights import count_numbers, fingerprint_of, load_part, read_config
from data.errors import DataError
from data.shards.sample import Prompt
from radial.errors import RadialError


@dataclass(frozen=True)
class EncoderSettings:
    """How an encoder is loaded.

    Attributes:
        folder: the diffusers folder; None for a family without weights.
        device: where VAE and text encoders run.
        vae_dtype, text_dtype: their weights' dtypes.
        image_to_video: load what the first frame's conditions need too.
        vae_only: load no text encoders; the encoder then encodes and decodes clips, but no prompts.
    """

    folder: Path | None
    device: torch.device
    vae_dtype: torch.dtype
    text_dtype: torch.dtype
    image_to_video: bool = False
    vae_only: bool = False


class Encoder(ABC):
    """A family's frozen VAE and text encoders.

    Class attributes:
        family: the name in `data.encoders.FAMILIES`.
        facts: of the family's model: pace, lengths, size, strides; the lengths that clips may have.
        parts: kind (vae, text) -> subfolders of the diffusers folder that make it up.
        latent_is: what the latents are, in words, for the manifest.
        text_is: what the text tensors are, in words, for the manifest.
    """

    family: ClassVar[str]
    facts: ClassVar[Facts]
    parts: ClassVar[dict[str, tuple[str, ...]]]
    image_parts: ClassVar[dict[str, tuple[str, ...]]] = {}
    """The same for image-to-video, where the folder has them."""
    numbers: ClassVar[dict[str, int]]
    """Kind (vae, text, image) -> numbers in the weights that are loaded of it, of the published models."""
    left_out: ClassVar[str | None] = None
    """Regular expression of tensors in the files that are not among those."""
    chat_template: ClassVar[bool] = False
    """Whether captions go through the tokenizer's own chat template, a file beside its vocabulary."""
    latent_is: ClassVar[str]
    text_is: ClassVar[str]
    vae: Any

    @abstractmethod
    def __init__(self, settings: EncoderSettings) -> None:
        """Load the weights."""

    @classmethod
    def size_of(cls, folder: Path | None) -> tuple[int, int]:
        """(height, width) of a clip for the model in a diffusers folder, where none is given."""
        return cls.facts.size

    @classmethod
    def latent_channels(cls, folder: Path | None) -> int:
        """Channels C of the latents that the VAE in a diffusers folder makes.

        Raises:
            DataError: there is no folder, or no VAE in it.
        """
        if folder is None:
            raise DataError(f"weights is not set, family={cls.family} needs its diffusers folder")
        config = read_config(folder / "vae")
        return int(config["z_dim"] if "z_dim" in config else config["latent_channels"])

    @classmethod
    def fingerprint(cls, folder: Path | None, image_to_video: bool = False) -> str:
        """What identifies VAE and encoders, see `data.encoders.fingerprint`."""
        if folder is None:
            raise DataError(f"weights is not set, model={cls.family} needs its diffusers folder")
        image = {kind: parts for kind, parts in cls.image_parts.items() if (folder / parts[0]).is_dir()}
        names = fingerprint_of(folder, cls.parts, chat_template=cls.chat_template)
        tokenizers = [part for part in cls.parts.get("text", ()) if part.startswith("tokenizer")]
        names["ids"] = ids_of([open_tokenizer(folder / part) for part in tokenizers])
        names |= fingerprint_of(folder, image if image_to_video else {})
        return f"{cls.family}:{'+'.join(f'{kind}-{digest}' for kind, digest in names.items())}"

    @classmethod
    def count(cls, folder: Path | None, *, image: bool = False) -> dict[str, int]:
        """Kind -> numbers in the weights that are loaded of it: memory, over the bytes of a number.

        Args:
            folder: where it has no VAE and text encoders, those of the published models are counted.
            image: with what image conditions need.

        Raises:
            DataError: a part of the folder has no weights.
        """
        kinds = cls.parts | (cls.image_parts if image else {})
        if folder is None or not all((folder / part).is_dir() for part in sum(cls.parts.values(), ())):
            return {kind: cls.numbers[kind] for kind in kinds}
        there = {kind: tuple(part for part in parts if (folder / part).is_dir()) for kind, parts in kinds.items()}
        return {kind: count_numbers(folder, parts, cls.left_out) for kind, parts in there.items()}

    @abstractmethod
    def encode(self, frames: np.ndarray) -> Tensor:
        """Frames (F, H, W, 3) uint8 as the latent (C, f, h, w) that the transformer is trained on, bfloat16, CPU."""

    def decode(self, latent: Tensor) -> np.ndarray:
        """A latent (C, f, h, w) as frames (F, H, W, 3) uint8."""
        return np.concatenate(list(decode_frames(self.vae, latent[None], tiled=self.family in TILED)))

    @abstractmethod
    def prompt(self, text: str) -> Prompt:
        """A caption's embeddings, bfloat16, CPU, without padding."""

    def tokens(self, text: str) -> dict[str, tuple[int, int]]:
        """How many tokens a caption has for each text encoder, by its name, and how many of them are used."""
        return {}

    def image(self, frames: np.ndarray) -> dict[str, Tensor]:
        """Image conditions of the first of frames (F, H, W, 3) uint8 by name, bfloat16, CPU.

        Raises:
            DataError: as `check_image_to_video`, or the encoder was loaded without `image_to_video`.
        """
        self.check_image_to_video()
        raise DataError("image conditions are asked for, but the encoder was loaded without image_to_video=true")

    @classmethod
    def check_image_to_video(cls) -> None:
        """Raise a DataError where the family has no image-to-video model here, or needs no conditions for it."""
        raise DataError(
            f"image_to_video is true, but model={cls.family} has no image-to-video encoder here; leave it out"
        )

    @classmethod
    @abstractmethod
    def why_not_cut(cls, frames: int, shorter: int) -> str | None:
        """Why the first latent frames of a clip of `frames` frames are not the latent of its first `shorter` frames;
        None where they are."""

    @classmethod
    def check(cls, frames: int, sizes: list[tuple[int, int]]) -> None:
        """Raise a DataError that names the nearest fit unless clips of this length and these sizes can be encoded."""
        try:
            cls.facts.time.check(frames)
        except RadialError as error:
            raise DataError(str(error)) from error
        step = cls.facts.strides[1] * cls.facts.patch
        for height, width in sizes:
            if min(height, width) < step or height % step or width % step:
                near = "x".join(str(max(step, round(side / step) * step)) for side in (height, width))
                raise DataError(f"size is {height}x{width}, expected sides that divide by {step}, such as {near}")

    @classmethod
    def check_vae(cls, folder: Path, found: tuple[int, int], hint: str) -> None:
        """Raise a DataError that ends in `hint` unless the strides of the VAE in `folder` are the family's."""
        if found != cls.facts.strides:
            there, here = (f"{time}x{space}x{space}" for time, space in (found, cls.facts.strides))
            raise DataError(f"{folder}: a cell of its latents is {there} pixels, model={cls.family} has {here}; {hint}")


def find_device(asked: str | None, local: int = 0) -> torch.device:
    """Where to encode: `asked`, or a GPU where there is one; GPU number `local`, round and round, unless it says which.

    Raises:
        DataError: it is no device, or this machine has no such GPU.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(asked or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DataError(f"device is {asked!r}, expected cpu, cuda or one GPU such as cuda:0")
    if device.type == "cpu":
        return device
    if (device.index or 0) >= gpus:
        found = f"{gpus} GPU{'s' * (gpus != 1)}" if gpus else "no GPU"
        raise DataError(f"device is {asked}, but torch {torch.__version__} finds {found} here; choose another or cpu")
    return torch.device("cuda", local % gpus) if device.index is None else device


def load_text(loader: Any, settings: EncoderSettings, part: str) -> Any:
    """A text encoder of the class `loader`, or None for `vae_only`.

    Raises:
        DataError: as `load_part`.
    """
    if settings.vae_only:
        return None
    assert settings.folder is not None
    return load_part(loader, settings.folder / part, settings.device, settings.text_dtype)


def load_tokenizer(settings: EncoderSettings, part: str) -> Any:
    """A tokenizer, or None for `vae_only`.

    Raises:
        DataError: it is missing, cannot be loaded, or loses words.
    """
    if settings.vae_only:
        return None
    assert settings.folder is not None
    tokenizer = open_tokenizer(settings.folder / part)
    check_round_trip(tokenizer, settings.folder / part)
    return tokenizer


@contextlib.contextmanager
def quiet(pipeline: str) -> Iterator[None]:
    """Silences the warnings of a pipeline's module for each caption that is cut: `data.prepare` counts them."""
    loggers = [logging.getLogger(name) for name in (pipeline, "transformers.tokenization_utils_base")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def to_video(frames: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Frames (F, H, W, 3) uint8 as a video (1, 3, F, H, W) in [-1, 1]."""
    # Bytes travel to the device, floats are made there.
    video = torch.from_numpy(frames).to(device).permute(3, 0, 1, 2)[None]
    return video.to(dtype).div_(127.5).sub_(1)


def stored(tensor: Tensor) -> Tensor:
    """A tensor as shards hold it: bfloat16 on the CPU."""
    return tensor.detach().to("cpu", torch.bfloat16)
