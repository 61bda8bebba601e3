"""The masks that a LoRA was trained under, where they differ by head: a file beside the LoRA.

    mine.safetensors    mine.masks.safetensors          merged/    merged/masks.safetensors

Not in the LoRA's own file, since loaders drop or refuse names that they do not know. Its header has the SHA-256.
"""

from __future__ import annotations

from pathlib import Path

from radial import HeadMasks, RadialError
from radial.serving import MASKS
from train.errors import UserError
from train.lora.header import PREFIX, read_values


def masks_beside(path: Path) -> Path:
    """Where the masks of a LoRA's file, or of a merged model's folder, lie."""
    return path / MASKS.lstrip(".") if path.is_dir() else path.with_suffix(MASKS)


def check_masks(masks: Path, lora: Path) -> None:
    """Holds a file of masks against the header of the LoRA, or of the merged weights, that they are used with.

    Raises:
        UserError: it is missing, or another one than the LoRA was trained under.
    """
    wanted = read_values(lora).get("masks_sha256")
    if wanted is None:
        return
    if not masks.is_file():
        raise UserError(
            f"{lora} was trained under masks of its own, and {masks} is missing: copy it there from the export, "
            "or give masks=FILE"
        )
    try:
        found = HeadMasks.read(masks)
    except RadialError as error:
        raise UserError(str(error)) from error
    if found.digest != wanted:
        raise UserError(
            f"masks {masks} are not those that {lora} was trained under (SHA-256 {found.digest[:16]}…, its "
            f"{PREFIX}masks_sha256 is {wanted[:16]}…): give masks=FILE with those"
        )
