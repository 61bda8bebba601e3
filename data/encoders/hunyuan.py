"""HunyuanVideo: AutoencoderKLHunyuanVideo, LLaMA and CLIP, through diffusers' own pipeline.

The VAE has no cache to carry, so clips are encoded in tiles of 256 x 256 pixels and 64 frames, each with the frame that
follows, which overlap by a quarter and are blended: those of HunyuanVideo's own code, whose VAE has `sample_tsize` 64,
where diffusers' tiles have 16 frames. `tests/data/encoders/test_encoders.py` says how far that is from the whole:
a PSNR of 25 dB at least.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor
from transformers import CLIPTextModel, LlamaModel

from data.encoders.base import Encoder, EncoderSettings, load_text, load_tokenizer, quiet, stored, to_frames, to_video
from data.encoders.tokens import check_prefix
from data.encoders.weights import load_part
from data.shards.sample import Prompt, TextTokens

_TEMPLATE: Any = DEFAULT_PROMPT_TEMPLATE
TEMPLATE: str = _TEMPLATE["template"]
CROPPED: int = _TEMPLATE["crop_start"]
LLAMA_TOKENS, CLIP_TOKENS = 256, 77
TILES = {"tile_sample_min_num_frames": 64, "tile_sample_stride_num_frames": 48}


class HunyuanEncoder(Encoder):
    """Encoder of HunyuanVideo; `text.text` is LLaMA's, `pooled.clip` is CLIP's pooled output."""

    family = "hunyuan"
    fps = 24.0
    lengths = {"1x": 129, "2x": 253, "4x": 509}  # noqa: RUF012
    size = (720, 1280)
    strides = (4, 8)
    parts = {  # noqa: RUF012
        "vae": ("vae",),
        "text": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    }
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

    def encode(self, frames: np.ndarray) -> Tensor:
        with torch.no_grad():
            latent = self.vae.encode(to_video(frames, self.device, self.vae.dtype)).latent_dist.mode()
        return stored(latent[0].float() * self.vae.config.scaling_factor)

    def decode(self, latent: Tensor) -> np.ndarray:
        latent = latent[None].to(self.device, torch.float32) / self.vae.config.scaling_factor
        with torch.no_grad():
            return to_frames(self.vae.decode(latent.to(self.vae.dtype), return_dict=False)[0])

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
