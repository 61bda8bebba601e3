"""Whether a LoRA's file belongs to one of ComfyUI's models; ComfyUI itself only logs what it could not load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from radial.comfyui.attention import Model
from radial.errors import RadialError
from radial.serving import PREFIX, pattern_of

FAMILIES = {"WanModel": ("wan", "wan22_5b"), "HunyuanVideo": ("hunyuan",)}
"""ComfyUI's classes, and the header's families that each of them runs."""
_DOWN = (".lora_A.weight", ".lora_down.weight")
_UP = (".lora_B.weight", ".lora_up.weight")


def model_of(network: Any) -> Model:
    """What attention has to know of a model.

    Args:
        network: ``model.model.diffusion_model``.

    Raises:
        RadialError: it is none that the node serves.
    """
    kind = type(network).__name__
    if kind not in FAMILIES:
        raise RadialError(f"the model is a {kind}, expected {' or '.join(FAMILIES)} (Wan2.1, Wan2.2, HunyuanVideo)")
    patch = tuple(network.patch_size)
    if len(patch) != 3 or getattr(network, "byt5_in", None) is not None:
        raise RadialError("the model is another of the HunyuanVideo class, expected HunyuanVideo itself")
    if kind == "WanModel":
        return Model(kind, patch, len(network.blocks), len(network.blocks), joint=False)
    double = len(network.double_blocks)
    return Model(kind, patch, double + len(network.single_blocks), double, joint=True)


def check_header(header: Mapping[str, str], model: Model, name: str) -> None:
    """Refuses a file that was not trained here, for another family, or with positions that ComfyUI does not have.

    Raises:
        RadialError: what was found and expected.
    """
    try:
        pattern_of(header)
    except RadialError as error:
        raise RadialError(f"{name}: {error}") from error
    family = header.get(f"{PREFIX}family", "None")
    if family not in ("None", *FAMILIES[model.kind]):
        raise RadialError(f"{name} was trained on {family}, the model is a {model.kind}: choose the file of this model")
    rope = header.get(f"{PREFIX}rope", "default")
    if rope not in ("default", "None"):
        raise RadialError(
            f"{name} was trained with rope={rope}, which ComfyUI's models do not have: generate with train.sample"
        )


def check_layers(
    tensors: Mapping[str, Tensor], places: Mapping[str, Any], weights: Mapping[str, Tensor], name: str
) -> int:
    """Refuses a file of which a layer has no place in the model, or another size.

    Args:
        tensors: of the file.
        places: ComfyUI's own map from a LoRA's layers to the model's weights.
        weights: of the model.

    Returns:
        How many layers there are.

    Raises:
        RadialError: the layer, what was found and expected.
    """
    layers = [(key[: -len(down)], down, up) for key in tensors for down, up in zip(_DOWN, _UP, strict=True)
              if key.endswith(down)]  # fmt: skip
    if not layers:
        raise RadialError(f"{name} holds no LoRA: expected the export's file in comfyui/ or kohya/")
    for layer, down, up in layers:
        place = places.get(layer)
        if place is None:
            raise RadialError(
                f"{name} has a layer {layer}, which the model lacks: choose the export's file in comfyui/, for this "
                "model"
            )
        weight = weights[place if isinstance(place, str) else place[0]]
        size = (len(tensors[layer + up]), tensors[layer + down].shape[1])
        if size != tuple(weight.shape):
            raise RadialError(f"{name} is for a {size} weight at {layer}, the model has {tuple(weight.shape)}")
    return len(layers)
