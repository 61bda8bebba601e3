"""Tiny diffusers pipelines of every family, whole, in the folders' real format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3Blocks
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionModel,
    LlamaModel,
    Qwen2_5_VLTextModel,
    Qwen3VLForConditionalGeneration,
    SiglipImageProcessor,
    SiglipVisionModel,
    T5EncoderModel,
    UMT5EncoderModel,
)

from tests.helpers.stock_models import CONFIGS, TARGETS, random_lora
from tests.helpers.tiny_models import save_hunyuan, save_hunyuan15, save_minimax_h3, save_mochi, save_wan
from train.export.formats import FORMATS, Adapter
from train.export.run import folded
from train.models.families.minimax_h3 import MiniMaxH3Adapter
from train.models.pretrained import stand_in

TOKENS = 24
CLIP = {"frames": 33, "height": 32, "width": 48, "steps": 4, "guidance": 5, "seed": 7}
"""A clip of these pipelines, cut down to seconds."""
HEADER = {
    f"radial.{key}": str(value)
    for key, value in {
        "pattern": "released", "rule": "wan", "decay": 0.4, "block": 16, "dense_layers": 1, "dense_sigma": None,
        "frames": 33, "height": 32, "width": 48, "shift": 5.0, "rank": 3, "base_model": "base",
    }.items()
}  # fmt: skip
"""What a LoRA's file says of how it was trained."""
WAN_SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
WAN_SHIFTS = {"wan": 5.0, "wan_i2v": 3.0, "wan_a14b": 12.0, "wan_5b": 5.0}  # the models' own at less than 720 lines


def _transformer(family: str, **changes: Any) -> Any:
    name, config = CONFIGS[family]
    return _random(getattr(diffusers, name)(**{**config, **changes}))


def _random(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def _part(kind: Any, folder: Path, name: str) -> Any:
    return kind.from_pretrained(folder / name)


def save_pipeline(family: str, folder: Path) -> Path:
    """A pipeline of random weights.

    Args:
        family: wan, wan_i2v, wan_a14b (two experts), wan_5b (its own VAE, a timestep for each token), hunyuan,
            hunyuan15, hunyuan15_i2v, minimax_h3 (without its sound's parts), mochi.
    """
    torch.manual_seed(0)
    parts = folder.with_name(f"{folder.name}_parts")
    makers = {
        "hunyuan": _hunyuan, "hunyuan15": _hunyuan15, "hunyuan15_i2v": _hunyuan15, "minimax_h3": _minimax_h3,
        "mochi": _mochi,
    }  # fmt: skip
    make = makers.get(family, _wan)
    make(family, parts).save_pretrained(str(folder))
    return folder


def _wan(family: str, parts: Path) -> Any:
    save_wan(parts, image=family == "wan_i2v")
    transformer = {"in_channels": 16, "out_channels": 16, "text_dim": 32}
    given = {
        "tokenizer": _part(AutoTokenizer, parts, "tokenizer"),
        "text_encoder": _part(UMT5EncoderModel, parts, "text_encoder"),
        "vae": _part(diffusers.AutoencoderKLWan, parts, "vae"),
        "scheduler": diffusers.UniPCMultistepScheduler(**WAN_SCHEDULER, flow_shift=WAN_SHIFTS.get(family)),
    }
    if family == "wan_i2v":
        # 16 latent channels, 4 of the mask, 16 of the condition; 17 image tokens of width 32
        transformer |= {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 32}
        return diffusers.WanImageToVideoPipeline(
            **given,
            image_encoder=_part(CLIPVisionModel, parts, "image_encoder"),
            image_processor=_part(CLIPImageProcessor, parts, "image_processor"),
            transformer=_transformer("wan_i2v", **transformer),
        )
    if family == "wan_a14b":
        both = {name: _transformer("wan", **transformer) for name in ("transformer", "transformer_2")}
        return diffusers.WanPipeline(**given, **both, boundary_ratio=0.875)
    if family == "wan_5b":
        given["vae"] = _random(
            diffusers.AutoencoderKLWan(
                base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], z_dim=8,
                patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16, is_residual=True,
                decoder_base_dim=4, latents_mean=[0.1] * 8, latents_std=[0.5] * 8,
            )
        )  # fmt: skip
        model = _transformer("wan", **{**transformer, "in_channels": 8, "out_channels": 8})
        return diffusers.WanPipeline(**given, transformer=model, expand_timesteps=True)
    return diffusers.WanPipeline(**given, transformer=_transformer("wan", **transformer))


def _hunyuan(family: str, parts: Path) -> Any:
    save_hunyuan(parts)
    return diffusers.HunyuanVideoPipeline(
        text_encoder=_part(LlamaModel, parts, "text_encoder"),
        tokenizer=_part(AutoTokenizer, parts, "tokenizer"),
        transformer=_transformer("hunyuan", text_embed_dim=32, pooled_projection_dim=24),
        vae=_part(diffusers.AutoencoderKLHunyuanVideo, parts, "vae"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=_part(CLIPTextModel, parts, "text_encoder_2"),
        tokenizer_2=_part(AutoTokenizer, parts, "tokenizer_2"),
    )


def _hunyuan15(family: str, parts: Path) -> Any:
    image = family == "hunyuan15_i2v"
    save_hunyuan15(parts, image=image)
    widths = {"text_embed_dim": 32, "text_embed_2_dim": 24, "image_embed_dim": 16}
    given = {
        "text_encoder": _part(Qwen2_5_VLTextModel, parts, "text_encoder"),
        "tokenizer": _part(AutoTokenizer, parts, "tokenizer"),
        "transformer": _transformer("hunyuan15", **widths, task_type="i2v" if image else "t2v"),
        "vae": _part(diffusers.AutoencoderKLHunyuanVideo15, parts, "vae"),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),  # as at less than 720 lines
        "text_encoder_2": _part(T5EncoderModel, parts, "text_encoder_2"),
        "tokenizer_2": _part(AutoTokenizer, parts, "tokenizer_2"),
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
    }
    if not image:
        return diffusers.HunyuanVideo15Pipeline(**given)
    return diffusers.HunyuanVideo15ImageToVideoPipeline(
        **given,
        image_encoder=_part(SiglipVisionModel, parts, "image_encoder"),
        feature_extractor=_part(SiglipImageProcessor, parts, "feature_extractor"),
    )


def _minimax_h3(family: str, parts: Path) -> Any:
    save_minimax_h3(parts)
    pipeline = MiniMaxH3Blocks().init_pipeline()
    pipeline.update_components(
        transformer=_random(
            diffusers.MiniMaxH3Transformer3DModel(**{**MiniMaxH3Adapter.tiny_config, "audio_in_channels": 32})
        ),
        vae=_part(diffusers.AutoencoderKLMiniMaxH3, parts, "vae"),
        text_encoder=_part(Qwen3VLForConditionalGeneration, parts, "text_encoder"),
        tokenizer=_part(AutoTokenizer, parts, "tokenizer"),
        scheduler=diffusers.MiniMaxH3Scheduler(12.0),
    )
    return pipeline


def _mochi(family: str, parts: Path) -> Any:
    save_mochi(parts)
    return diffusers.MochiPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=_part(diffusers.AutoencoderKLMochi, parts, "vae"),
        text_encoder=_part(T5EncoderModel, parts, "text_encoder"),
        tokenizer=_part(AutoTokenizer, parts, "tokenizer"),
        transformer=_transformer("mochi", text_embed_dim=32, max_sequence_length=256),
    )


def words(folder: Path, **changes: Any) -> list[str]:
    """Of the command line that generates such a clip."""
    given = {
        "model": "wan_14b",
        "model.path": folder,
        "model.text_tokens": TOKENS,
        "model.dimensions": "null",
        "prompt": "a red ball, moving & it's a clip",
        "negative": "the bar",
        "block": 16,
        "dtype": "fp32",
        **CLIP,
        **changes,
    }
    return [f"{key.replace('__', '.')}={value}" for key, value in given.items() if value is not None]


def save_lora(
    folder: Path,
    file: Path,
    *,
    header: dict[str, str],
    seed: int = 1,
    format_name: str = "comfyui",
    family: str = "wan",
) -> Path:
    """A random LoRA for the pipeline in ``folder``, in a file of the format."""
    model = stand_in(folder / "transformer")
    pairs = folded(random_lora(model, TARGETS[family], seed=seed), 3)
    FORMATS[format_name](Adapter(pairs, model, header, "base", file.stem), file.parent)
    return file
