"""Tiny transformers of every family in diffusers' own classes, in diffusers' format, with inputs for them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": (
        "WanTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 16}
        | {"freq_dim": 16, "ffn_dim": 48, "num_layers": 3},
    ),
    "wan_i2v": (
        "WanTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 8, "out_channels": 4, "text_dim": 16}
        | {"freq_dim": 16, "ffn_dim": 48, "num_layers": 2, "image_dim": 12, "added_kv_proj_dim": 32},
    ),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2}
        | {"num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8}
        | {"rope_axes_dim": (4, 6, 6)},
    ),
    "hunyuan15": (
        "HunyuanVideo15Transformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 9, "out_channels": 4, "num_layers": 3}
        | {"num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 8}
        | {"rope_axes_dim": (4, 6, 6), "task_type": "t2v"},
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {"num_attention_heads": 8, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "text_embed_dim": 16}
        | {"pooled_projection_dim": 32, "time_embed_dim": 16, "max_sequence_length": 8},
    ),
}
TARGETS = {
    "wan": r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
    "wan_i2v": r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
    "hunyuan": r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)"
    r"|single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_out)",
    "hunyuan15": r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
    "mochi": r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
}
"""Q, K, V and O of self-attention, those of the text's tokens for mochi."""


def save_transformer(family: str, folder: Path, seed: int = 0, **save: Any) -> Path:
    """A random transformer of the family, every parameter away from its trivial start."""
    name, config = CONFIGS[family]
    torch.manual_seed(seed)
    model = getattr(diffusers, name)(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save)
    return folder


def load_transformer(folder: Path) -> Any:
    """The model of a diffusers folder, by the class that its config names."""
    return diffusers.AutoModel.from_pretrained(str(folder)).eval()


def linear_layers(model: nn.Module, targets: str) -> dict[str, nn.Linear]:
    """The linear layers whose names match."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(targets, n)}


def random_lora(model: nn.Module, targets: str, rank: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """A trained-looking LoRA as checkpoints hold it, ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``."""
    torch.manual_seed(seed)
    found = {}
    for name, layer in linear_layers(model, targets).items():
        found[f"{name}.lora_A.weight"] = 0.2 * torch.randn(rank, layer.in_features)
        found[f"{name}.lora_B.weight"] = 0.2 * torch.randn(layer.out_features, rank)
    return found


def inputs(family: str) -> dict[str, Any]:
    """What a forward of the family's model takes."""
    torch.manual_seed(2)
    channels = CONFIGS[family][1]["in_channels"]
    given: dict[str, Any] = {
        "hidden_states": torch.randn(1, channels, 3, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
        "return_dict": False,
    }
    if family == "wan_i2v":
        given["encoder_hidden_states_image"] = torch.randn(1, 5, 12)
    if family in ("hunyuan", "hunyuan15", "mochi"):
        given["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    if family == "hunyuan":
        given |= {"pooled_projections": torch.randn(1, 8), "guidance": torch.tensor([6000.0])}
    if family == "hunyuan15":
        given |= {"encoder_hidden_states_2": torch.randn(1, 4, 8), "image_embeds": torch.zeros(1, 5, 8)}
        given["encoder_attention_mask_2"] = torch.tensor([[1, 1, 0, 0]], dtype=torch.bool)
    return given


@torch.no_grad()
def output(model: Callable[..., Any], family: str) -> Tensor:
    """The model's output on `inputs`."""
    return model(**inputs(family))[0]
