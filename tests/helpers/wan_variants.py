"""The models of Wan as tiny ones of the real class, and how diffusers' pipelines call them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn import functional as F

from data.shards.sample import TextTokens
from train.models.base import ModelAdapter
from train.models.conditions import Conditions
from train.models.experts import TwoExperts
from train.models.families.wan import WanAdapter
from train.models.families.wan22 import Wan5BAdapter

TEXT = 512  # tokens; the image cross-attention of the class needs this many
BASE = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "t2v": BASE,
    "i2v": {**BASE, "in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 64},  # Wan2.1
    "i2v_a14b": {**BASE, "in_channels": 36},  # one expert of Wan2.2
    "5b": {**BASE, "in_channels": 48, "out_channels": 48},
    "5b_first": {**BASE, "in_channels": 48, "out_channels": 48},  # the same, from a first frame
}
VARIANTS = sorted(CONFIGS)
TOKENS = (6, 4, 5)
BOUNDARY = 0.875


def model(variant: str, seed: int = 0) -> Any:
    """A tiny model with all weights drawn, the same for the same seed."""
    torch.manual_seed(seed)
    made = WanTransformer3DModel(**CONFIGS[variant])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def adapter_of(variant: str, seed: int = 0) -> ModelAdapter:
    """Our adapter with the weights of `model`; ``experts`` is two of the text-to-video models."""
    if variant == "experts":
        high, low = (WanAdapter(model("t2v", seed + part), TEXT) for part in (0, 1))
        return TwoExperts(high, low, BOUNDARY)
    return (Wan5BAdapter if variant.startswith("5b") else WanAdapter)(model(variant, seed), TEXT)


def batch(adapter: ModelAdapter, variant: str, samples: int = 2, tokens: tuple[int, ...] = TOKENS) -> Any:
    """(clean latent, noise levels, conditions); the prompts have 7 and 2 tokens."""
    generator = torch.Generator().manual_seed(2)
    cells = [count * step for count, step in zip(tokens, adapter.patch, strict=True)]
    latent = torch.randn(samples, adapter.latent_channels, *cells, generator=generator)
    torch.manual_seed(3)
    drawn = adapter.random_conditions(latent)
    words = drawn.text["text"].tokens[:, :7].clone()
    mask = torch.arange(7).expand(samples, 7) < torch.tensor([7, 2])[:samples, None]
    words[~mask] = 0  # as a batch is put together
    image = dict(drawn.image)
    if variant == "5b_first":
        image["first_frame"] = latent[:, :, :1]
    seen = dataclasses.replace(drawn, text={"text": TextTokens(words, mask)}, image=image)
    return latent, torch.tensor([0.3, 0.6])[:samples], seen


def as_the_pipeline(stock: Any, variant: str, x: Tensor, sigma: Tensor, seen: Conditions) -> Tensor:
    """What diffusers' pipelines of Wan compute in a step: their lines, for a batch of noise levels."""
    words = seen.text["text"].tokens
    words = F.pad(words, (0, 0, 0, TEXT - words.shape[1]))
    timestep, clip = 1000 * sigma, seen.image.get("clip")
    if "condition" in seen.image:
        first_frame_mask = torch.zeros(len(x), 4, *x.shape[2:])
        first_frame_mask[:, :, 0] = 1
        x = torch.cat([x, first_frame_mask, seen.image["condition"]], dim=1)
    if variant.startswith("5b"):
        mask = torch.ones(1, 1, *x.shape[2:])
        if "first_frame" in seen.image:
            mask[:, :, 0] = 0
            x = (1 - mask) * seen.image["first_frame"] + mask * x
        timestep = torch.stack([(mask[0][0][:, ::2, ::2] * t).flatten() for t in timestep])
    return stock(x, timestep, words, clip, return_dict=False)[0]


def save_folder(folder: Path, variant: str, **index: Any) -> Path:
    """A diffusers folder with the transformer, or both experts, in several files, and a model_index.json."""
    parts = {"transformer": model("t2v" if variant == "experts" else variant)}
    if variant == "experts":
        parts["transformer_2"] = model("t2v", 1)
    for name, part in parts.items():
        part.save_pretrained(folder / name, max_shard_size="100KB")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}), encoding="utf-8")
    return folder
