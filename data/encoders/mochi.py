"""Mochi-1: AutoencoderKLMochi and T5, through diffusers' own pipeline.

The encoder attends over all frames of a place, so a clip cannot be cut in time; it is encoded in square tiles that
overlap by a quarter and are blended: of 256 pixels, and smaller ones for long clips (`tile_of`), 224 at 667 frames.
`tests/data/encoders/test_encoders.py` holds the floor for how far that is from the whole: a PSNR of 35 dB.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLMochi, MochiPipeline
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from diffusers.pipelines.mochi import pipeline_mochi
from torch import Tensor
from torch.nn import functional as F
from transformers import T5EncoderModel

from data.encoders.base import Encoder, EncoderSettings, load_text, load_tokenizer, quiet, stored, to_video
from data.encoders.decoding import normalized
from data.encoders.model_facts import facts_of
from data.encoders.weights import load_part
from data.errors import DataError
from data.shards.sample import Prompt, TextTokens

# diffusers cuts a layer's input of more numbers than this in time. That is exact in layers of stride 1; in those of
# stride 2 the frames behind a cut may be shifted by one.
UNCUT = 1 << 30
TEXT_TOKENS = facts_of("mochi").text_tokens
DECODED = 2  # latent frames at a time
CHANNELS = 128  # of the largest input of a layer with a stride in time, which has half the tile's height and width


def tile_of(frames: int) -> int:
    """Side in pixels of the largest tile, of at most 256, in which no layer with a stride in time is cut.

    Raises:
        DataError: there is none of 128 pixels or more.
    """
    for side in range(256, 127, -32):
        if CHANNELS * (frames + 1) * (side // 2) ** 2 <= UNCUT:  # one frame is padded in front
            return side
    most = UNCUT // (CHANNELS * (128 // 2) ** 2) - 1
    raise DataError(f"frames is {frames}, but model=mochi encodes at most {most} in one clip; choose fewer")


class MochiEncoder(Encoder):
    """Encoder of Mochi-1; the empty prompt is one masked token where model_index.json says that it is zeroed."""

    family = "mochi"
    facts = facts_of("mochi")
    parts = {"vae": ("vae",), "text": ("text_encoder", "tokenizer")}  # noqa: RUF012
    numbers = {"vae": 459_748_611, "text": 4_762_310_656}  # noqa: RUF012
    latent_is = "mode of AutoencoderKLMochi in blended tiles, (x - latents_mean) / latents_std * scaling_factor"
    text_is = "text: T5 last hidden state, up to 256 tokens, without padding"

    def __init__(self, settings: EncoderSettings) -> None:
        folder = settings.folder
        assert folder is not None
        self.device = settings.device
        self.vae = load_part(AutoencoderKLMochi, folder / "vae", self.device, settings.vae_dtype)
        self.vae.enable_tiling()
        index = MochiPipeline.load_config(folder) if (folder / "model_index.json").is_file() else {}
        self.pipeline: Any = MochiPipeline(
            scheduler=None,
            vae=self.vae,
            text_encoder=load_text(T5EncoderModel, settings, "text_encoder"),
            tokenizer=load_tokenizer(settings, "tokenizer"),
            transformer=None,
            force_zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", False),
        )

    @classmethod
    def check(cls, frames: int, sizes: list[tuple[int, int]]) -> None:
        super().check(frames, sizes)
        tile_of(frames)

    @classmethod
    def why_not_cut(cls, frames: int, shorter: int) -> str | None:
        one, other = tile_of(frames), tile_of(shorter)
        if one == other:
            return None  # its layers look back alone, and tiles are cut in space
        return f"Mochi's VAE encodes clips of {frames} frames in tiles of {one} pixels, of {shorter} in {other}"

    def encode(self, frames: np.ndarray) -> Tensor:
        side = tile_of(len(frames))
        self.vae.tile_sample_min_height = self.vae.tile_sample_min_width = side
        self.vae.tile_sample_stride_height = self.vae.tile_sample_stride_width = side * 3 // 4
        with torch.no_grad():
            latent = self.vae.encode(to_video(frames, self.device, self.vae.dtype)).latent_dist.mode().float()
        return stored(normalized(self.vae, latent)[0])

    def tokens(self, text: str) -> dict[str, tuple[int, int]]:
        return {"T5": (len(self.pipeline.tokenizer(text, verbose=False).input_ids), TEXT_TOKENS)}

    def prompt(self, text: str) -> Prompt:
        with torch.no_grad(), quiet(pipeline_mochi.__name__):
            tokens, mask, _, _ = self.pipeline.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device=self.device
            )
        kept = tokens[0][mask[0]] if mask.any() else torch.zeros_like(tokens[0, :1])
        return Prompt({"text": TextTokens(stored(kept), mask[0, : len(kept)].cpu())}, {})


def decode_stream(vae: Any, z: Tensor) -> Iterator[Tensor]:
    """A latent decoded two latent frames at a time, as in one piece: the causal convolutions' caches are carried along.

    Args:
        vae: an AutoencoderKLMochi.
        z: (1, C, f, h, w), as the VAE encodes it.

    Yields:
        (1, 3, n, H, W) in [-1, 1].
    """
    cache = None
    with _carrying_time(vae.decoder):
        for i, part in enumerate(z.split(DECODED, dim=2)):
            video, cache = vae.decoder(part, conv_cache=cache)
            # the first latent frame is one frame of the clip
            skip = vae.temporal_compression_ratio - 1 if i == 0 and vae.drop_last_temporal_frames else 0
            yield video[:, :, skip:]


@contextmanager
def _carrying_time(decoder: Any) -> Iterator[None]:
    """Makes the causal convolutions take the frames before from their cache; diffusers does so only with zeros at a
    frame's border, where the model was trained with repeated pixels."""

    def forward(conv: Any, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        before = inputs[:, :, :1].expand(-1, -1, conv.time_pad, -1, -1) if conv_cache is None else conv_cache
        inputs = torch.cat([before, inputs], dim=2)
        sides = (conv.width_pad, conv.width_pad, conv.height_pad, conv.height_pad, 0, 0)
        return conv.conv(F.pad(inputs, sides, mode="replicate")), inputs[:, :, -conv.time_pad :].clone()

    convolutions = [module for module in decoder.modules() if isinstance(module, CogVideoXCausalConv3d)]
    for conv in convolutions:
        assert conv.pad_mode == "replicate"
        conv.forward = functools.partial(forward, conv)  # type: ignore
    try:
        yield
    finally:
        for conv in convolutions:
            del conv.forward  # the class's own again
