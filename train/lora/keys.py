"""What tools call the tensors of a LoRA: prefixes before a layer's name, endings behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator

# of PEFT, torch's DistributedDataParallel, DiffSynth, checkpoints, diffusers, ComfyUI, kohya's trainers, OneTrainer and
# LyCORIS; several may stand before a name
_PREFIXES = (
    "base_model.model.",
    "module.",
    "pipe.dit.",
    "model.",
    "transformer.",
    "diffusion_model.",
    "unet.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
# the name of an adapter may stand in the middle (.lora_A.default.weight); Genmo's files end with .lora_A
_DOWN = r"\.lora_A(?:\.[^.]+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down"
_UP = r"\.lora_B(?:\.[^.]+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up"
_ENDINGS = re.compile(
    rf"(?:(?P<down>(?:{_DOWN})\.weight|\.lora_A)|(?P<down_scale>(?:{_DOWN})\.scale_weight)"
    rf"|(?P<up>(?:{_UP})\.weight|\.lora_B)|(?P<up_scale>(?:{_UP})\.scale_weight)|(?P<up_bias>(?:{_UP})\.bias)"
    r"|(?P<alpha>\.(?:lora_)?alpha)|(?P<diff>\.diff)|(?P<modulation>\.diff_m)|(?P<bias>\.diff_b))$"
)
_OTHER_KINDS = {
    "DoRA": r"\.dora_scale$|\.lora_magnitude_vector\b",
    "LoHa": r"\.hada_[wt]\d",
    "LoKr": r"\.lokr_[wt]\d",
    "GLoRA": r"\.[ab][12]\.weight$",
    "OFT": r"\.(oft|boft)_\w+",
    "VeRA": r"\bvera_(lambda|[AB])\w*",
    "Tucker LoRA": r"\.lora_mid\.weight$",
}
MARKERS = frozenset({"scaled_fp8"})
"""Tensors that describe a whole file and change no layer."""


def split_key(key: str) -> tuple[str, str] | None:
    """A key as the layer's name with its prefixes, and what the tensor is of that layer; None: no ending of a LoRA.

    Returns:
        The second is ``down``, ``up``, ``alpha``, ``up_bias``, ``down_scale`` or ``up_scale`` (what 8-bit numbers are
        to be multiplied by), or ``diff`` and ``bias`` of whole changes.
    """
    ending = _ENDINGS.search(key)
    if ending is None:
        return None
    kind, name = str(ending.lastgroup), key[: ending.start()]
    return (f"{name}.modulation", "diff") if kind == "modulation" else (name, kind)  # short for that of a layer


def possible_names(name: str) -> Iterator[str]:
    """What a layer may be called, from the whole name on: without each prefix that it starts with."""
    name = name.replace(".processor.", ".")  # which diffusers' first LoRAs belonged to
    yield name
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            yield from possible_names(name.removeprefix(prefix))


def other_kind(key: str) -> str | None:
    """The kind of adapter that a key belongs to, where it is another than a LoRA."""
    return next((kind for kind, pattern in _OTHER_KINDS.items() if re.search(pattern, key)), None)


def of_kohya(key: str) -> bool:
    """Whether a key is one of kohya's trainers."""
    return key.startswith("lora_unet_")
