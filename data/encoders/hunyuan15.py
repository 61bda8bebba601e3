"""HunyuanVideo-1.5: AutoencoderKLHunyuanVideo15, Qwen2.5-VL and byT5, through diffusers' own pipeline.

Clips are encoded in diffusers' own tiles of 256 x 256 pixels, which overlap by a quarter and are blended, each a few
frames at a time (`hunyuan15_vae.py`). byT5 reads what a caption quotes, the glyphs that its video shows, and nothing of
the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Pipeline
from diffusers.pipelines.hunyuan_video1_5 import pipeline_hunyuan_video1_5
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts, format_text_input
from torch import Tensor
from transformers import Qwen2_5_VLTextModel, SiglipImageProcessor, SiglipVisionModel, T5EncoderModel

from data.encoders.base import Encoder, EncoderSettings, load_text, load_tokenizer, quiet, stored, to_video
from data.encoders.decoding import normalized
from data.encoders.hunyuan15_vae import in_time
from data.encoders.model_facts import facts_of
from data.encoders.tokens import check_prefix
from data.encoders.weights import load_part
from data.shards.sample import Prompt, TextTokens

_MARK = "the caption"


class Hunyuan15Encoder(Encoder):
    """Encoder of HunyuanVideo-1.5; `text.text` is Qwen2.5-VL's, `text.glyphs` byT5's.

    A caption that quotes nothing has one token of glyphs, zeros behind the mask. For image-to-video, `image.condition`
    is the first frame's latent, (C, 1, h, w), and `image.vision` (tokens, D) the image encoder's last layer.
    """

    family = "hunyuan15"
    facts = facts_of("hunyuan15")
    parts = {  # noqa: RUF012
        "vae": ("vae",),
        "text": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    }
    chat_template = True
    image_parts = {"image": ("image_encoder", "feature_extractor")}  # noqa: RUF012
    numbers = {  # noqa: RUF012
        "vae": 1_260_634_115,
        "text": 7_070_619_136 + 219_314_944,  # Qwen2.5-VL, byT5
        "image": 428_225_600,
    }
    latent_is = "mode of AutoencoderKLHunyuanVideo15 in blended tiles, times scaling_factor"
    text_is = (
        "text: Qwen2.5-VL hidden state, third from last, up to 1,000 tokens, without the template before the caption "
        "and padding; glyphs: byT5 last hidden state of what the caption quotes, up to 256 tokens"
    )

    def __init__(self, settings: EncoderSettings) -> None:
        folder = settings.folder
        assert folder is not None
        self.device = settings.device
        self.vae = load_part(AutoencoderKLHunyuanVideo15, folder / "vae", self.device, settings.vae_dtype)
        found = (self.vae.temporal_compression_ratio, self.vae.spatial_compression_ratio)
        self.check_vae(folder / "vae", found, "it is none of HunyuanVideo-1.5's")
        self.vae.enable_tiling()
        tokenizer = load_tokenizer(settings, "tokenizer")
        parts: dict[str, Any] = {
            "text_encoder": load_text(Qwen2_5_VLTextModel, settings, "text_encoder"),
            "tokenizer": tokenizer,
            "transformer": None,
            "vae": self.vae,
            "scheduler": None,
            "text_encoder_2": load_text(T5EncoderModel, settings, "text_encoder_2"),
            "tokenizer_2": load_tokenizer(settings, "tokenizer_2"),
            "guider": None,
        }
        self.pipeline: Any = HunyuanVideo15Pipeline(**parts)
        if tokenizer is not None:
            before = self._in_template(_MARK, tokenize=False).partition(_MARK)[0]
            check_prefix(tokenizer, folder / "tokenizer", before, self.cropped)

        self.images: Any = None
        if settings.image_to_video:
            self.images = HunyuanVideo15ImageToVideoPipeline(
                **parts,
                image_encoder=load_part(SiglipVisionModel, folder / "image_encoder", self.device, settings.text_dtype),
                feature_extractor=SiglipImageProcessor.from_pretrained(folder / "feature_extractor"),
            )

    @classmethod
    def check_image_to_video(cls) -> None:
        """It has such a model."""

    @property
    def cropped(self) -> int:
        """Tokens of the template before the caption, which the pipeline cuts off."""
        return int(self.pipeline.prompt_template_encode_start_idx)

    @classmethod
    def why_not_cut(cls, frames: int, shorter: int) -> str | None:
        return None  # each latent frame is made of its own frames and those before

    def encode(self, frames: np.ndarray) -> Tensor:
        with torch.no_grad(), in_time(self.vae):
            latent = self.vae.encode(to_video(frames, self.device, self.vae.dtype)).latent_dist.mode().float()
        return stored(normalized(self.vae, latent)[0])

    def image(self, frames: np.ndarray) -> dict[str, Tensor]:
        if self.images is None:
            return super().image(frames)
        from PIL import Image

        with torch.no_grad():
            seen = self.images.encode_image(Image.fromarray(frames[0]), 1, self.device, torch.float32)
        return {"condition": self.encode(frames[:1]), "vision": stored(seen[0])}

    def prompt(self, text: str) -> Prompt:
        with torch.no_grad(), quiet(pipeline_hunyuan_video1_5.__name__):
            found = self.pipeline.encode_prompt(text, device=self.device)
        words, words_mask, glyphs, glyphs_mask = (tensor[0] for tensor in found)
        return Prompt({"text": _valid(words, words_mask), "glyphs": _valid(glyphs, glyphs_mask)}, {})

    def tokens(self, text: str) -> dict[str, tuple[int, int]]:
        words = len(self._in_template(text, tokenize=True, return_dict=True)["input_ids"]) - self.cropped
        quoted = extract_glyph_texts(text)
        glyphs = 0 if quoted is None else len(self.pipeline.tokenizer_2(quoted, verbose=False).input_ids)
        return {
            "Qwen2.5-VL": (words, self.pipeline.tokenizer_max_length),
            "byT5": (glyphs, self.pipeline.tokenizer_2_max_length),
        }

    def _in_template(self, text: str, **settings: Any) -> Any:
        """A caption in the chat that the text encoder reads, as the pipeline puts it."""
        (chat,) = format_text_input([text], self.pipeline.system_message)
        return self.pipeline.tokenizer.apply_chat_template(chat, add_generation_prompt=True, **settings)


def _valid(tokens: Tensor, mask: Tensor) -> TextTokens:
    """The tokens of a text (L, D) where its mask (L,) is 1; one masked token of zeros where it is nowhere."""
    kept = stored(tokens[mask.bool()])
    if not len(kept):
        return TextTokens(stored(tokens.new_zeros(1, tokens.shape[1])), torch.zeros(1, dtype=torch.bool))
    return TextTokens(kept, torch.ones(len(kept), dtype=torch.bool))
