"""The layers of a model under the names of its original checkpoint, and under those of ComfyUI.

ComfyUI, kohya's trainers and most published LoRAs use the names of the checkpoint that a family was released in
(`train.lora.name_tables`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from train.lora.name_tables import PARAMETERS, TABLES

_HUNYUANS = ("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel")
# ComfyUI has names of its own for the modules of both HunyuanVideos. Those of the layers it also takes as the original
# has them, after `diffusion_model.`; the others not (its comfy/lora.py, and the loading of checkpoints).
_COMFYUI_EMBEDDERS = {
    "mlp.0": "in_layer",
    "mlp.2": "out_layer",
    "linear_1": "in_layer",
    "linear_2": "out_layer",
}
_COMFYUI_BLOCKS = {
    "_mod.linear": "_mod.lin",
    ".modulation.linear": ".modulation.lin",
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}


@dataclass(frozen=True)
class OriginalLayer:
    """A layer of the original checkpoint.

    Attributes:
        name: what it is called there, without ``.weight``.
        parts: the diffusers layers that it holds, from the first output row on.
        swapped: the two halves of its rows lie the other way round in diffusers.
    """

    name: str
    parts: tuple[str, ...]
    swapped: bool = False


def original_layers(model_class: str, modules: Iterable[str]) -> list[OriginalLayer]:
    """The layers of the checkpoint that a model was released in.

    Args:
        model_class: name of the diffusers class; one without a table has no other names.
        modules: names of the model's layers that hold weights.
    """
    present = set(modules)
    found = []
    for theirs, ours, lines in TABLES.get(model_class, []):
        block = re.compile(re.escape(ours).replace(r"\{\}", r"(\d+)"))
        numbers = sorted({int(match[1]) for name in present if (match := block.match(name))}) if "{}" in ours else [0]
        for number in numbers:
            for line in lines.strip().splitlines():
                name, *inner = line.split()
                parts = tuple(ours.format(number) + part.removeprefix("*") for part in inner)
                if present.issuperset(parts):
                    found.append(OriginalLayer(theirs.format(number) + name, parts, inner[0].startswith("*")))
    return found


def original_parameters(model_class: str, parameters: Iterable[str]) -> dict[str, str]:
    """Name in the original checkpoint -> name in diffusers, of what lies in no layer.

    Args:
        model_class: name of the diffusers class.
        parameters: names of the model's parameters.
    """
    found = {}
    for theirs, ours in PARAMETERS.get(model_class, []):
        named = re.compile(re.escape(ours).replace(r"\{\}", r"(\d+)"))
        for name in parameters:
            if match := named.fullmatch(name):
                found[theirs.format(*match.groups())] = name
    return found


def comfyui_layers(model_class: str, modules: Iterable[str]) -> list[OriginalLayer]:
    """The layers of the checkpoint that ComfyUI loads; arguments as for `original_layers`.

    It is the original one, but that q, k and v of HunyuanVideo-1.5's layers are stacked there, as HunyuanVideo's are.
    """
    found: dict[str, OriginalLayer] = {}
    for layer in original_layers(model_class, modules):
        name = layer.name
        if not comfyui_names(model_class, name):
            name = re.sub("[qkv]$", "qkv", name)
            layer = OriginalLayer(name, (*(found[name].parts if name in found else ()), *layer.parts))
        found[name] = layer
    return list(found.values())


def comfyui_names(model_class: str, name: str) -> tuple[str, ...]:
    """What ComfyUI calls a layer of the original checkpoint.

    Returns:
        Its own name, which is also the one that ``lora_unet_`` goes before with underscores; then the name of the
        original checkpoint where it takes that too, after ``diffusion_model.`` alone. Nothing for a layer that is a
        part of another one there (`comfyui_layers`).
    """
    if model_class in _HUNYUANS:
        if re.search(r"(img|txt)_attn_[qkv]$", name):
            return ()
        for theirs, own in _COMFYUI_EMBEDDERS.items():
            if name.endswith((f"_in.{theirs}", f"_embedder.{theirs}")):
                return (name.removesuffix(theirs) + own,)
        for theirs, own in _COMFYUI_BLOCKS.items():
            if name.endswith(theirs):
                return name.removesuffix(theirs) + own, name
    return (name,)
