"""LPIPS (Zhang et al. 2018, AlexNet), where the weights of its network are at hand: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

_BATCH = 8  # frames
_WEIGHTS = "alexnet-owt-7be5be79.pth"


def lpips(one: np.ndarray, other: np.ndarray) -> tuple[float | None, str]:
    """Mean distance of the frames of two clips, (n, H, W, 3) uint8; or None and why it cannot be told."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # missing, or built for another torch
        return None, f"needs torchvision ({error})"
    file = Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS
    if not file.is_file():
        return None, f"needs {file}"
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    total = 0.0
    for start in range(0, len(one), _BATCH):
        a, b = (
            torch.from_numpy(np.ascontiguousarray(clip[start : start + _BATCH])).permute(0, 3, 1, 2).float() / 255
            for clip in (one, other)
        )
        distance = learned_perceptual_image_patch_similarity(a, b, net_type="alex", normalize=True, reduction="sum")
        total += distance.item()  # type: ignore[union-attr]
    return total / len(one), ""
