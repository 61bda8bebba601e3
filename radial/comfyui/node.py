"""The node *Load Radial LoRA*. What is ComfyUI's is imported when the node runs, inside of ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from radial.comfyui.attention import OVERRIDE, RadialOverride
from radial.comfyui.fit import check_header, check_layers, masks_beside, model_of
from radial.patterns import HeadMasks
from radial.serving import PREFIX, pattern_of

_KEY = "radial"  # of our wrapper


class LoadRadialLora:
    """A LoRA of this project on a model, with the attention that it was trained with.

    The names and shapes of its class attributes are ComfyUI's.
    """

    RETURN_TYPES: ClassVar = ("MODEL", "STRING")
    RETURN_NAMES: ClassVar = ("model", "what was set")
    FUNCTION = "load"
    CATEGORY = "loaders/video_models"
    DESCRIPTION = (
        "Loads a LoRA that was trained under radial attention, and sets the attention that it was trained with."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node shows: the model, the files of the folder ``loras``, the strength."""
        import folder_paths

        return {
            "required": {
                "model": ("MODEL", {}),
                "lora_name": (folder_paths.get_filename_list("loras"), {"tooltip": "The export's file in comfyui/."}),
                "strength_model": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}),
            }
        }

    def load(self, model: Any, lora_name: str, strength_model: float) -> dict[str, Any]:
        """The model with the LoRA and its attention, and what was set, in words.

        Raises:
            RadialError: a file or a model that do not fit, which ComfyUI shows at the node.
        """
        import folder_paths

        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        changed, text = load_radial_lora(model, Path(path), strength_model)
        return {"ui": {"text": [text]}, "result": (changed, text)}


def load_radial_lora(model: Any, path: Path, strength: float = 1.0) -> tuple[Any, str]:
    """A clone of a ComfyUI model with a LoRA and its attention, and what was set, in words.

    Args:
        model: ComfyUI's ``ModelPatcher``.
        path: of the LoRA.
        strength: of the LoRA.

    Raises:
        RadialError: a file or a model that do not fit.
    """
    import comfy.lora
    import comfy.patcher_extension
    import comfy.sd
    import comfy.utils

    kind = model_of(model.model.diffusion_model)
    tensors, header = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    header = header or {}
    masks = masks_beside(path, header)
    check_header(header, kind, path.name, masks)
    places = comfy.lora.model_lora_keys_unet(model.model, {})
    layers = check_layers(tensors, places, model.model.state_dict(), path.name)
    changed, _ = comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0)

    wrappers = comfy.patcher_extension.WrappersMP
    options = changed.model_options.setdefault("transformer_options", {})
    before = options.get(OVERRIDE)
    if isinstance(before, RadialOverride):  # of a LoRA before this one: the attention of the last one holds
        before = before.before
    override = RadialOverride(header, kind, before, masks)
    options[OVERRIDE] = override
    changed.remove_wrappers_with_key(wrappers.APPLY_MODEL, _KEY)
    changed.add_wrapper_with_key(wrappers.APPLY_MODEL, _KEY, override.around)
    shift = getattr(changed.get_model_object("model_sampling"), "shift", None)
    return changed, description(header, layers, strength, path.name, shift, masks)


def description(
    header: Mapping[str, str], layers: int, strength: float, name: str, shift: float | None,
    masks: HeadMasks | None = None,
) -> str:  # fmt: skip
    """What was set, in words.

    Args:
        shift: of the noise levels that the model samples with.
        masks: of a LoRA that was trained under fitted ones.
    """

    def value(key: str) -> str:
        return header.get(PREFIX + key, "None")

    lines = [f"{name}: {layers} layers at strength {strength:g}", f"trained on: {value('base_model')}"]
    if value("expert") in ("high", "low"):
        lines.append(f"for the model of {value('expert')} noise levels")
    pattern = pattern_of(header) if masks is None else f"fitted, {value('masks_share')} of the blocks"
    lines.append(f"attention: {pattern}, blocks of {value('block')} tokens")
    dense = f"dense: the first {value('dense_layers')} layers"
    if value("dense_sigma") != "None":
        dense += f", and all from noise level {float(value('dense_sigma')):.4g} on"
    elif value("dense_steps") != "None":
        dense += f", and all in the first {value('dense_steps')} steps"
    lines.append(dense)
    lines.append(f"trained clips: {value('frames')} frames of {value('height')} x {value('width')} pixels")
    if value("shift") != "None":
        trained = float(value("shift"))
        lines.append(f"shift of the noise levels: {trained:g}")
        if shift is not None and abs(shift - trained) > 1e-6:
            lines.append(f"the model samples with shift {shift:g}: set {trained:g} in ModelSamplingSD3")
    return "\n".join(lines)


NODE_CLASS_MAPPINGS = {"LoadRadialLora": LoadRadialLora}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadRadialLora": "Load Radial LoRA"}
