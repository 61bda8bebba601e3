"""Wan2.1 and Wan2.2: AutoencoderKLWan and UMT5, through diffusers' own pipelines.

Wan2.1 and Wan2.2-A14B share one VAE and one pace, so that shards of one serve the other; Wan2.2-TI2V-5B has its own.

The VAE encodes four frames at a time and carries its causal convolutions' cache from chunk to chunk, so memory does not
grow with the clip's length and the latent is that of the whole clip. Decoding carries such a cache, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

from data.encoders.base import Encoder, EncoderSettings, load_text, load_tokenizer, stored, to_video
from data.encoders.decoding import normalized
from data.encoders.model_facts import facts_of
from data.encoders.weights import load_part
from data.errors import DataError
from data.shards.sample import Prompt, TextTokens

TEXT_TOKENS = facts_of("wan_14b").text_tokens
HEADS_OF_1_3B = 12


class WanEncoder(Encoder):
    """Encoder of Wan2.1 and Wan2.2-A14B, whose VAE has 16 channels and cells of 4x8x8.

    For image-to-video, `image.condition` is what the pipeline concatenates to the latent, without its mask: the VAE's
    latent of the first frame followed by grey, (C, f, h, w). `image.clip` (tokens, D) is the image encoder's
    second-to-last layer where the folder has an image_encoder (Wan2.1).
    """

    family = "wan"
    facts = facts_of("wan_14b")
    parts = {"vae": ("vae",), "text": ("text_encoder", "tokenizer")}  # noqa: RUF012
    image_parts = {"image": ("image_encoder", "image_processor")}  # noqa: RUF012
    numbers = {"vae": 126_892_531, "text": 5_680_910_336, "image": 630_766_080}  # noqa: RUF012
    latent_is = "mode of AutoencoderKLWan, (x - latents_mean) / latents_std"
    text_is = "text: UMT5 last hidden state, up to 512 tokens, without padding"

    def __init__(self, settings: EncoderSettings) -> None:
        folder = settings.folder
        assert folder is not None
        self.device = settings.device
        self.vae = load_part(AutoencoderKLWan, folder / "vae", self.device, settings.vae_dtype)
        found = (self.vae.config.scale_factor_temporal, self.vae.config.scale_factor_spatial)
        fits = [kind.family for kind in (WanEncoder, Wan5BEncoder) if kind.facts.strides == found]
        self.check_vae(folder / "vae", found, f"choose model={fits[0]}" if fits else "it is none of Wan's")
        text_encoder = load_text(UMT5EncoderModel, settings, "text_encoder")
        tokenizer = load_tokenizer(settings, "tokenizer")
        self.pipeline: Any = WanPipeline(tokenizer, text_encoder, self.vae, scheduler=None, transformer=None)
        self.images: Any = None
        if settings.image_to_video:
            self.check_image_to_video()
            image_encoder, processor = None, None
            if (folder / "image_encoder").is_dir():
                dtype = settings.text_dtype
                image_encoder = load_part(CLIPVisionModel, folder / "image_encoder", self.device, dtype)
                processor = CLIPImageProcessor.from_pretrained(folder / "image_processor")
            self.images = WanImageToVideoPipeline(
                tokenizer, text_encoder, self.vae, None, processor, image_encoder, transformer=None
            )

    @classmethod
    def size_of(cls, folder: Path | None) -> tuple[int, int]:
        """720p, and 480p of the 1.3B, which is made for that; a folder without a transformer may be of either."""
        file = folder / "transformer" / "config.json" if folder is not None else None
        if file is None or not file.is_file():
            return cls.facts.size
        heads = json.loads(file.read_text(encoding="utf-8")).get("num_attention_heads")
        return facts_of("wan_1.3b").size if heads == HEADS_OF_1_3B else cls.facts.size

    @classmethod
    def check_image_to_video(cls) -> None:
        """Wan2.1 and Wan2.2-A14B have such models."""

    @classmethod
    def why_not_cut(cls, frames: int, shorter: int) -> str | None:
        return None  # each latent frame is made of its own frames and those before

    def encode(self, frames: np.ndarray) -> Tensor:
        return stored(self.latent(to_video(frames, self.device, self.vae.dtype)))

    def prompt(self, text: str) -> Prompt:
        with torch.no_grad():
            tokens, _ = self.pipeline.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS, device=self.device
            )
        ids = self.pipeline.tokenizer(prompt_clean(text), truncation=True, max_length=TEXT_TOKENS).input_ids
        return Prompt({"text": TextTokens(stored(tokens[0, : len(ids)]), torch.ones(len(ids), dtype=torch.bool))}, {})

    def tokens(self, text: str) -> dict[str, tuple[int, int]]:
        return {"UMT5": (len(self.pipeline.tokenizer(prompt_clean(text), verbose=False).input_ids), TEXT_TOKENS)}

    def image(self, frames: np.ndarray) -> dict[str, Tensor]:
        if self.images is None:
            return super().image(frames)
        first = to_video(frames[:1], self.device, self.vae.dtype)
        video = first.new_zeros(1, 3, len(frames), *first.shape[3:])  # grey
        video[:, :, :1] = first
        conditions = {"condition": stored(self.latent(video))}
        if self.images.image_encoder is not None:
            from PIL import Image

            with torch.no_grad():
                embeds = self.images.encode_image(Image.fromarray(frames[0]), self.device)
            conditions["clip"] = stored(embeds[0])
        return conditions

    def latent(self, video: Tensor) -> Tensor:
        """(1, 3, F, H, W) in [-1, 1] as the normalised latent (C, f, h, w), float32."""
        with torch.no_grad():
            return normalized(self.vae, self.vae.encode(video).latent_dist.mode().float())[0]


class Wan5BEncoder(WanEncoder):
    """Encoder of Wan2.2-TI2V-5B, whose VAE has 48 channels and cells of 4x16x16.

    Image-to-video needs nothing of its own: the model takes the clip's first latent frame as it is.
    """

    family = "wan22_5b"
    facts = facts_of("wan22_5b")
    numbers = {**WanEncoder.numbers, "vae": 704_688_668}  # noqa: RUF012

    @classmethod
    def check_image_to_video(cls) -> None:
        raise DataError(
            f"image_to_video is true, but model={cls.family} takes the first frame from the clip's own latent: "
            "leave it out, its shards serve image-to-video as they are"
        )


def decode_stream(vae: Any, z: Tensor) -> Iterator[Tensor]:
    """A latent decoded one latent frame after the other.

    The causal convolutions' caches are carried along, so that the frames are those of a whole decode.

    Args:
        vae: an AutoencoderKLWan.
        z: (1, C, f, h, w), as the VAE encodes it.

    Yields:
        (1, 3, n, H, W) in [-1, 1].
    """
    cache: list[Any] = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    z = vae.post_quant_conv(z)
    for i in range(z.shape[2]):
        video = vae.decoder(z[:, :, i : i + 1], feat_cache=cache, feat_idx=[0], first_chunk=i == 0)
        if vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=vae.config.patch_size)
        yield video.clamp(-1, 1)
