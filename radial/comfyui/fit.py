"""Whether a LoRA's file belongs to one of ComfyUI's models; ComfyUI itself only logs what it could not load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from radial.comfyui.attention import Model
from radial.errors import RadialError
from radial.patterns import Fitted, HeadMasks
from radial.serving import MASKS, PREFIX, pattern_of

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
    # its layers had this attribute, true, as long as the text came behind the video
    text_first = not getattr(network.double_blocks[0], "flipped_img_txt", False)
    return Model(kind, patch, double + len(network.single_blocks), double, joint=True, text_first=text_first)


def masks_beside(path: Path, header: Mapping[str, str]) -> HeadMasks | None:
    """The masks of a LoRA that was trained under fitted ones, from the file beside it; None for another LoRA.

    Raises:
        RadialError: that file is missing, or cannot be read.
    """
    if header.get(f"{PREFIX}pattern") != Fitted.name:
        return None
    file = path.with_suffix(MASKS)
    if not file.is_file():
        raise RadialError(
            f"{path.name} was trained under masks of its own, and {file.name} is missing: copy it from the export into "
            "the folder of the LoRA"
        )
    return HeadMasks.read(file)


def check_header(header: Mapping[str, str], model: Model, name: str, masks: HeadMasks | None = None) -> None:
    """Refuses a file that was not trained here, for another family, or with positions that ComfyUI does not have.

    Args:
        masks: of a LoRA that was trained under fitted ones.

    Raises:
        RadialError: what was found and expected.
    """
    try:
        pattern_of(header, masks)
    except RadialError as error:
        raise RadialError(f"{name}: {error}") from error
    if masks is not None and masks.about.layers[-1] + 1 != model.layers:
        raise RadialError(
            f"{name}: its masks end with layer {masks.about.layers[-1]}, the model has layers 0 to {model.layers - 1}"
        )
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
