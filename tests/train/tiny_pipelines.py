"""Tiny diffusers pipelines of every family, whole, in the folders' real format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from stock_models import CONFIGS
from tiny_models import save_hunyuan, save_mochi, save_wan

WAN_SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def _transformer(family: str, **changes: Any) -> Any:
    name, config = CONFIGS[family]
    model = getattr(diffusers, name)(**{**config, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def _part(kind: Any, folder: Path, name: str) -> Any:
    return kind.from_pretrained(folder / name)


def save_pipeline(family: str, folder: Path) -> Path:
    """A pipeline of random weights."""
    from transformers import AutoTokenizer, CLIPTextModel, LlamaModel, T5EncoderModel, UMT5EncoderModel

    torch.manual_seed(0)
    parts = folder.with_name(f"{folder.name}_parts")
    if family == "wan":
        save_wan(parts)
        pipeline = diffusers.WanPipeline(
            tokenizer=_part(AutoTokenizer, parts, "tokenizer"),
            text_encoder=_part(UMT5EncoderModel, parts, "text_encoder"),
            vae=_part(diffusers.AutoencoderKLWan, parts, "vae"),
            scheduler=diffusers.UniPCMultistepScheduler(**WAN_SCHEDULER),
            transformer=_transformer("wan", in_channels=16, out_channels=16, text_dim=32),
        )
    elif family == "hunyuan":
        save_hunyuan(parts)
        pipeline = diffusers.HunyuanVideoPipeline(
            text_encoder=_part(LlamaModel, parts, "text_encoder"),
            tokenizer=_part(AutoTokenizer, parts, "tokenizer"),
            transformer=_transformer("hunyuan", text_embed_dim=32, pooled_projection_dim=24),
            vae=_part(diffusers.AutoencoderKLHunyuanVideo, parts, "vae"),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=_part(CLIPTextModel, parts, "text_encoder_2"),
            tokenizer_2=_part(AutoTokenizer, parts, "tokenizer_2"),
        )
    else:
        save_mochi(parts)
        pipeline = diffusers.MochiPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            vae=_part(diffusers.AutoencoderKLMochi, parts, "vae"),
            text_encoder=_part(T5EncoderModel, parts, "text_encoder"),
            tokenizer=_part(AutoTokenizer, parts, "tokenizer"),
            transformer=_transformer("mochi", text_embed_dim=32),
        )
    pipeline.save_pretrained(folder)
    return folder
