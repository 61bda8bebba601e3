"""ComfyUI's own model classes at tiny size, with the weights of a diffusers model.

The variable RADIAL_COMFYUI names the folder of ComfyUI, which is a program, no library.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from train.lora.names import comfyui_names, original_layers, original_parameters

WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 32, "ffn_dim": 48, "freq_dim": 16, "text_dim": 16,
    "num_heads": 2, "num_layers": 3, "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2),
}  # fmt: skip
HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 16,
    "hidden_size": 32, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6],
    "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False,
    "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
SIZES = {"wan": WAN, "wan22_5b": {**WAN, "in_dim": 48, "out_dim": 48}, "hunyuan": HUNYUAN}
DIFFUSERS = {
    "wan": {"in_channels": 16, "out_channels": 16},
    "wan22_5b": {"in_channels": 48, "out_channels": 48},
    "hunyuan": {"in_channels": 16, "out_channels": 16, "num_refiner_layers": 2},
}
"""Changes to `tests.helpers.stock_models.CONFIGS` that make its models these."""


def comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ComfyUI importable while a test runs, on the CPU, or skips the test."""
    folder = os.environ.get("RADIAL_COMFYUI")
    if folder is None:
        pytest.skip("RADIAL_COMFYUI names no ComfyUI: its model classes are not at hand")
    monkeypatch.syspath_prepend(folder)
    importlib.import_module("comfy.cli_args").args.cpu = True


def patcher(family: str, model: Any) -> Any:
    """ComfyUI's ``ModelPatcher`` of a tiny model with a diffusers model's weights."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    kinds = {
        "wan": (comfy.supported_models.WAN21_T2V, comfy.model_base.WAN21),
        "wan22_5b": (comfy.supported_models.WAN22_T2V, comfy.model_base.WAN22),
        "hunyuan": (comfy.supported_models.HunyuanVideo, comfy.model_base.HunyuanVideo),
    }
    config_class, model_class = kinds[family]
    config = config_class(sizes(family))
    config.set_inference_dtype(torch.float32, None)
    own = model_class(config, device=torch.device("cpu"))
    own.diffusion_model.load_state_dict(config.process_unet_state_dict(converted(model)))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(own.eval(), load_device=cpu, offload_device=cpu)


def sizes(family: str) -> dict[str, Any]:
    """The settings of a tiny model, those that this version of ComfyUI knows."""
    import comfy.ldm.hunyuan_video.model

    if family != "hunyuan":
        return dict(SIZES[family])
    known = {field.name for field in fields(comfy.ldm.hunyuan_video.model.HunyuanVideoParams)} | {"image_model"}
    return {name: value for name, value in HUNYUAN.items() if name in known}


def converted(model: Any) -> dict[str, Tensor]:
    """The weights of a diffusers model under ComfyUI's names."""
    kind, state = type(model).__name__, model.state_dict()
    found = {}
    for layer in original_layers(kind, [name.rpartition(".")[0] for name in state]):
        name = comfyui_names(kind, layer.name)[0]
        for end in ("weight", "bias"):
            parts = [state[f"{part}.{end}"] for part in layer.parts if f"{part}.{end}" in state]
            if parts:
                whole = torch.cat(parts)
                own = f"{name}.{end}"
                if own.endswith(("q_norm.weight", "k_norm.weight")):  # RMS norms have their own class there
                    own = hunyuan_norm(own)
                found[own] = torch.cat(whole.chunk(2)[::-1]) if layer.swapped else whole
    return found | {theirs: state[ours] for theirs, ours in original_parameters(kind, state).items()}


def hunyuan_norm(name: str) -> str:
    """ComfyUI's name of a norm over queries or keys."""
    for side in ("query", "key"):
        name = name.replace(f"_attn_{side[0]}_norm.weight", f"_attn.norm.{side}_norm.scale")
        name = name.replace(f".{side[0]}_norm.weight", f".norm.{side}_norm.scale")
    return name
