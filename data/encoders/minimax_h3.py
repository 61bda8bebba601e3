"""MiniMax-H3: AutoencoderKLMiniMaxH3 and Qwen3-VL, as diffusers' modular pipeline uses them; no sound.

The VAE encodes each stretch of 17 frames by itself, and so does the encoder, one after the other: memory does not grow
with a clip's length. A clip's last stretch has 5 frames. diffusers repeats its last one up to 17, and drops the latent
frames of what is repeated; its layers look back alone, so that without the repetition the latent is the same. The
pipeline draws the latents of its own conditions, keyframes and references, from the VAE's distribution; shards hold the
mean, as of every family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLMiniMaxH3
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from data.encoders.base import Encoder, EncoderSettings, load_text, load_tokenizer, stored
from data.encoders.decoding import normalized
from data.encoders.model_facts import facts_of
from data.encoders.weights import load_part
from data.errors import DataError
from data.shards.sample import Prompt, TextTokens

LAYERS = 50
"""Layers of Qwen3-VL that the text goes through: what they give is the condition, without the norm after the last."""
EMPTY = " "
"""What stands for the empty prompt, which has no token. The pipeline has none: its model is distilled for guidance. Of
the texts that say nothing, a space, an end of text and zeros served alike as the prompt without guidance
(github.com/kohya-ss/musubi-tuner, PR 1045)."""


class MiniMaxH3Encoder(Encoder):
    """Encoder of MiniMax-H3; `text.text` is Qwen3-VL's."""

    family = "minimax_h3"
    facts = facts_of("minimax_h3")
    parts = {"vae": ("vae",), "text": ("text_encoder", "tokenizer")}  # noqa: RUF012
    numbers = {"vae": 2_603_868_984, "text": 25_157_829_120}  # noqa: RUF012
    left_out = r"lm_head\..*|model\.visual\..*|model\.language_model\.(norm|layers\.([5-9]\d|\d{3,}))\..*"
    latent_is = "mode of AutoencoderKLMiniMaxH3 in blended tiles, normalised by latents_mean and latents_std"
    text_is = "text: Qwen3-VL hidden state 50 of the caption alone, up to 1,024 tokens; the empty prompt is a space"

    def __init__(self, settings: EncoderSettings) -> None:
        folder = settings.folder
        assert folder is not None
        self.device = settings.device
        self.vae = load_part(AutoencoderKLMiniMaxH3, folder / "vae", self.device, settings.vae_dtype)
        found = (self.vae.temporal_compression_ratio, self.vae.spatial_compression_ratio)
        self.check_vae(folder / "vae", found, "it is not MiniMax-H3's")
        assert self.facts.time.chunks is not None
        self.stretch = self.facts.time.chunks[0]
        if self.vae.config.clip_length != self.stretch:
            raise DataError(
                f"{folder / 'vae'}: encodes {self.vae.config.clip_length} frames at a time, model={self.family} "
                f"{self.stretch}; it is not MiniMax-H3's"
            )
        self.tokenizer = load_tokenizer(settings, "tokenizer")
        # whole in CPU memory: the device has to hold the layers that the text goes through alone
        on_cpu = dataclasses.replace(settings, device=torch.device("cpu"))
        whole = load_text(Qwen3VLForConditionalGeneration, on_cpu, "text_encoder")
        self.layers = None if whole is None else first_layers(whole).to(self.device)

    @classmethod
    def why_not_cut(cls, frames: int, shorter: int) -> str | None:
        return None  # stretches are encoded each by itself, and each latent frame of its own frames and those before

    def encode(self, frames: np.ndarray) -> Tensor:
        stretches = [frames[start : start + self.stretch] for start in range(0, len(frames), self.stretch)]
        with torch.no_grad():
            # a clip's pixels stay on the CPU but for the stretch in work
            moments = torch.cat([self.vae._encode_clip(_pixels(part, self.device)) for part in stretches], dim=2)
            latent = DiagonalGaussianDistribution(moments).mode()
        return stored(normalized(self.vae, latent)[0])

    def prompt(self, text: str) -> Prompt:
        states = stored(text_states(self.layers, self.tokenizer, text or EMPTY, self.device, self.facts.text_tokens))
        return Prompt({"text": TextTokens(states, torch.ones(len(states), dtype=torch.bool))}, {})

    def tokens(self, text: str) -> dict[str, tuple[int, int]]:
        return {"Qwen3-VL": (len(token_ids(self.tokenizer, text)), self.facts.text_tokens)}


def first_layers(whole: Any) -> Any:
    """Qwen3-VL's text model up to layer `LAYERS`; the others, and the norm after them, are taken out of it.

    Raises:
        DataError: it has fewer layers.
    """
    model = whole.model.language_model
    if len(model.layers) < LAYERS:
        raise DataError(
            f"{whole.name_or_path}: has {len(model.layers)} layers, expected at least {LAYERS}: it is not MiniMax-H3's"
        )
    del model.layers[LAYERS:]
    model.norm = nn.Identity()
    return model


@torch.no_grad()
def text_states(layers: Any, tokenizer: Any, text: str, device: torch.device, most: int | None = None) -> Tensor:
    """What the transformer sees of a text, (tokens, D): the text as it stands, without a template.

    Args:
        layers: as `first_layers` gives them.
        most: tokens; the text is cut behind them, which changes nothing in those before.
    """
    ids = torch.tensor([token_ids(tokenizer, text)[:most]], device=device)
    states: Tensor = layers(input_ids=ids, use_cache=False).last_hidden_state[0]
    return states


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text as it stands, without special ones."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _pixels(frames: np.ndarray, device: torch.device) -> Tensor:
    """Frames (F, H, W, 3) uint8 as the VAE takes them, (1, 3, F, H, W) float32, which its encoder is kept in."""
    mean, std = _statistics(device)
    video = torch.from_numpy(frames).to(device).permute(3, 0, 1, 2)[None].float().div_(255)
    return video.sub_(mean).div_(std)


def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's pixels, of a range from 0 to 1, (1, 3, 1, 1, 1) both."""
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return mean, std


def decode_stream(vae: Any, z: Tensor, *, tiled: bool) -> Iterator[Tensor]:
    """A latent decoded a stretch after the other: each with the latent frames that overlap the next, and blended.

    diffusers' class decodes the same stretches, and gathers the whole clip.

    Args:
        vae: an AutoencoderKLMiniMaxH3.
        z: (1, C, f, h, w), as the VAE encodes it.
        tiled: decode squares of a frame, which are blended.

    Yields:
        (1, 3, n, H, W), about within [-1, 1].
    """
    mean, std = _statistics(z.device)
    shared = vae.token_overlap  # latent frames that a stretch has in common with the next
    lacking = max(0, shared + 1 - z.shape[2])  # of a clip so short that the class decodes no stretch of it
    z = torch.cat([z, z[:, :, -1:].expand(-1, -1, lacking, -1, -1)], dim=2)
    before: Tensor | None = None
    for start in range(0, z.shape[2] - shared, vae.tokens_chunk_size):
        video = _decoded(vae, z[:, :, start : start + vae.tokens_chunk_size + shared], tiled) * std + mean
        video = video[:, :, : video.shape[2] - lacking * vae.temporal_compression_ratio]
        if before is not None:
            weights = torch.arange(before.shape[2], device=z.device).view(-1, 1, 1) / before.shape[2]
            video[:, :, : before.shape[2]] = torch.lerp(before, video[:, :, : before.shape[2]], weights)
        yield video[:, :, : vae.config.clip_length] * 2 - 1
        before = video[:, :, vae.config.clip_length :]
    if before is not None and before.shape[2]:
        yield before * 2 - 1


def _decoded(vae: Any, z: Tensor, tiled: bool) -> Tensor:
    """What the VAE makes of a stretch, float32, with tiles or without, whatever it is set to."""
    own, vae.use_tiling = vae.use_tiling, tiled
    try:
        video: Tensor = vae.decode(z, return_dict=False)[0]
    finally:
        vae.use_tiling = own
    return video.float()
