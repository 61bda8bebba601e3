"""HunyuanVideo: AutoencoderKLHunyuanVideo, LLaMA and CLIP, through diffusers' own pipeline.

The VAE has no cache to carry, so clips are encoded in tiles of 256 x 256 pixels and 64 frames, each with the frame that
follows, which overlap by a quarter and are blended: those of HunyuanVideo's own code, whose VAE has `sample_tsize` 64,
where diffusers' tiles have 16 frames. `tests/data/encoders/test_encoders.py` says how far that is from the whole:
a PSNR of 25 dB at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor
from transformers import CLIPTextModel, LlamaModel

from data.encoders.base import Encoder, EncoderSettings, load_text, load_tokenizer, quiet, stored, to_video
from data.encoders.decoding import normalized
from data.encoders.model_facts import facts_of
from data.encoders.tokens import check_prefix
from data.encoders.weights import load_part
from data.shards.sample import Prompt, TextTokens

_TEMPLATE: Any = DEFAULT_PROMPT_TEMPLATE
TEMPLATE: str = _TEMPLATE["template"]
CROPPED: int = _TEMPLATE["crop_start"]
LLAMA_TOKENS, CLIP_TOKENS = facts_of("hunyuan").text_tokens, 77
TILES = {"tile_sample_min_num_frames": 64, "tile_sample_stride_num_frames": 48}


class HunyuanEncoder(Encoder):
    """Encoder of HunyuanVideo; `text.text` is LLaMA's, `pooled.clip` is CLIP's pooled output."""

    family = "hunyuan"
    facts = facts_of("hunyuan")
    parts = {  # noqa: RUF012
        "vae": ("vae",),
        "text": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    }
    numbers = {"vae": 246_478_803, "text": 7_505_186_816 + 123_060_480}  # noqa: RUF012  # LLaMA, CLIP
    latent_is = "mode of AutoencoderKLHunyuanVideo in blended tiles, times scaling_factor"
    text_is = "text: LLaMA hidden state, third from last, up to 256 tokens, without template and padding; pooled: CLIP"

    def __init__(self, settings: EncoderSettings) -> None:
        folder = settings.folder
        assert folder is not None
        self.device = settings.device
        self.vae = load_part(AutoencoderKLHunyuanVideo, folder / "vae", self.device, settings.vae_dtype)
        found = (self.vae.config.temporal_compression_ratio, self.vae.config.spatial_compression_ratio)
        self.check_vae(folder / "vae", found, "it is none of HunyuanVideo's")
        self.vae.enable_tiling(**TILES)
        tokenizer = load_tokenizer(settings, "tokenizer")
        if tokenizer is not None:
            check_prefix(tokenizer, folder / "tokenizer", TEMPLATE.partition("{}")[0], CROPPED)
        self.pipeline: Any = HunyuanVideoPipeline(
            text_encoder=load_text(LlamaModel, settings, "text_encoder"),
            tokenizer=tokenizer,
            transformer=None,
            vae=self.vae,
            scheduler=None,
            text_encoder_2=load_text(CLIPTextModel, settings, "text_encoder_2"),
            tokenizer_2=load_tokenizer(settings, "tokenizer_2"),
        )

    @classmethod
    def why_not_cut(cls, frames: int, shorter: int) -> str | None:
        return "HunyuanVideo's VAE normalises over all frames of a tile, so that each depends on the later ones"

    def encode(self, frames: np.ndarray) -> Tensor:
        with torch.no_grad():
            latent = self.vae.encode(to_video(frames, self.device, self.vae.dtype)).latent_dist.mode().float()
        return stored(normalized(self.vae, latent)[0])

    def tokens(self, text: str) -> dict[str, tuple[int, int]]:
        llama = len(self.pipeline.tokenizer(TEMPLATE.format(text), verbose=False).input_ids) - CROPPED
        clip = len(self.pipeline.tokenizer_2(text, verbose=False).input_ids)
        return {"LLaMA": (llama, LLAMA_TOKENS), "CLIP": (clip, CLIP_TOKENS)}

    def prompt(self, text: str) -> Prompt:
        with torch.no_grad(), quiet(pipeline_hunyuan_video.__name__):
            tokens, pooled, mask = self.pipeline.encode_prompt(text, device=self.device)
        tokens = stored(tokens[0][mask[0].bool()])
        words = TextTokens(tokens, torch.ones(len(tokens), dtype=torch.bool))
        return Prompt({"text": words}, {"clip": stored(pooled[0])})


def decode_stretches(vae: Any, z: Tensor, *, tiled: bool) -> Iterator[Tensor]:
    """A latent decoded in stretches of time that overlap and are blended, of which only two are ever held.

    The decoder attends over time, so that diffusers decodes it like that, too: its frames are the same.

    Args:
        vae: an AutoencoderKLHunyuanVideo, which has the length of the stretches.
        z: (1, C, f, h, w), as the VAE encodes it.
        tiled: each stretch in squares, too, which are blended.

    Yields:
        (1, 3, n, H, W) in [-1, 1].
    """
    ratio = vae.temporal_compression_ratio
    whole, stride = vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames  # frames

    def decode(part: Tensor) -> Tensor:
        cells = vae.tile_sample_min_height // vae.spatial_compression_ratio
        if tiled and max(part.shape[3:]) > cells:
            return vae.tiled_decode(part, return_dict=False)[0]
        return vae.decoder(vae.post_quant_conv(part))

    frames = z.shape[2]
    if frames <= whole // ratio:
        yield decode(z)
        return
    left = (frames - 1) * ratio + 1
    before: Tensor | None = None
    for start in range(0, frames, stride // ratio):
        video = decode(z[:, :, start : start + whole // ratio + 1])
        keep = stride
        if before is None:
            keep += 1
        else:
            video = vae.blend_t(before, video[:, :, 1:], whole - stride)
        before = video
        yield video[:, :, : min(keep, left)]
        left -= min(keep, left, video.shape[2])
        if left == 0:  # the stretch that starts at the last latent frame has only what the one before has shown
            return
