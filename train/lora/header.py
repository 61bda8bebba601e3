"""How a LoRA was trained, in the header of its safetensors file: exports write it, whatever uses the LoRA reads it.

It holds enough to set up inference from the file alone. Safetensors headers hold strings: None is ``"None"``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.config.schema import ROPE_KINDS
from train.errors import UserError

PREFIX = "radial."
"""Of this project's keys."""
KINDS: dict[str, type] = {
    "base_model": str,
    "family": str,
    "expert": str,
    "rope": str,
    "rank": int,
    "shift": float,
    "fp8": bool,  # whether the frozen layers beside it computed in float8, or were stored so
    "step": int,
    "version": str,
    "pattern": str,
    "rule": str,
    "decay": float,
    "reach": float,  # of the patterns that have one
    "per_head": bool,  # of random blocks
    "masks_sha256": str,  # of fitted ones: of the file beside the LoRA
    "masks_share": float,
    "masks_coverage": float,
    "masks_seed": int,
    "masks_separable": bool,  # fitted to masses that fall off exponentially
    "block": int,
    "dense_layers": int,
    "dense_sigma": float,  # the noise level at which training changed sides
    "dense_steps": int,  # of ``sampling_steps`` of the model's own, from which that level follows
    "sampling_steps": int,
    "frames": int,
    "height": int,
    "width": int,
}
"""Every key without its prefix, and the type of its value."""


def to_header(values: Mapping[str, Any]) -> dict[str, str]:
    """The header's entries of some values, by the names of `KINDS`."""
    unknown = values.keys() - KINDS.keys()
    assert not unknown, f"no keys of the header: {unknown}"
    return {f"{PREFIX}{name}": str(value) for name, value in values.items()}


def read_values(path: Path) -> dict[str, str]:
    """This project's entries of a file's header, or of the file in an export's folder, without their prefix."""
    from train.lora.reading import read_header  # takes seconds to import

    return {key.removeprefix(PREFIX): value for key, value in read_header(path).items() if key.startswith(PREFIX)}


def typed(text: str, name: str, file: Path) -> Any:
    """The value of an entry.

    Raises:
        UserError: it is of another type than the key's.
    """
    if text == "None":
        return None
    kind = KINDS[name]
    try:
        value = {"True": True, "False": False}.get(text) if kind is bool else kind(text)
        if value is None:
            raise ValueError
        if (name == "rope" and text not in ROPE_KINDS) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError
    except ValueError as error:
        wanted = f"a {'whole ' * (kind is int)}number"
        if name == "rope" or kind is bool:
            wanted = f"one of {', '.join(ROPE_KINDS if name == 'rope' else ('True', 'False'))}"
        raise UserError(
            f"{file}: its header's {PREFIX}{name} is {text!r}, expected {wanted}: give {name}=... yourself"
        ) from error
    return value
