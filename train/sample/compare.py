"""A clip beside the same one with dense attention: the videos, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from train.sample.jobs import Job
from train.sample.records import both_file, dense_file
from train.sample.video import video_file

_LPIPS_BATCH = 8  # frames
_LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"


@dataclass
class Likeness:
    """How alike two clips are, frame by frame.

    PSNR (dB) is of the mean squared error over the whole clip, pixels from 0 to 1; SSIM (Wang et al. 2004, 11 x 11
    Gaussian window) is the frames' mean; LPIPS is that of `lpips`, or None and why.
    """

    squared: float = 0.0
    similar: float = 0.0
    frames: int = 0
    lpips: float | None = None
    why: str = ""

    def add(self, one: np.ndarray, other: np.ndarray) -> None:
        """Takes frames of both, (n, H, W, 3) uint8, for PSNR and SSIM."""
        for x, y in zip(_pixels(one).split(1), _pixels(other).split(1), strict=True):
            self.squared += (x - y).square().mean().item()
            self.similar += structural_similarity_index_measure(x, y, data_range=1.0).item()  # type: ignore[union-attr]
            self.frames += 1

    @property
    def psnr(self) -> float:
        """Infinite for equal clips."""
        mean = self.squared / self.frames
        return float("inf") if mean == 0 else -10 * float(np.log10(mean))

    @property
    def ssim(self) -> float:
        """1 for equal clips."""
        return self.similar / self.frames

    def measured(self) -> dict[str, Any]:
        """The differences, as the JSON has them, which knows no infinity."""
        return {"psnr": self.psnr if math.isfinite(self.psnr) else None, "ssim": self.ssim, "lpips": self.lpips}

    def table(self, name: str, seconds: float, dense: float) -> str:
        """What is printed: the dense clip's row and that of the pattern called ``name``, with their seconds."""
        distance = f"{self.lpips:.3f}" if self.lpips is not None else f"not measured ({self.why})"
        return (
            f"{'':>10} {'seconds':>9} {'speed-up':>9} {'PSNR':>7} {'SSIM':>7}  LPIPS\n"
            f"{'dense':>10} {dense:>9.1f}\n"
            f"{name:>10} {seconds:>9.1f} {dense / seconds:>8.2f}x {self.psnr:>7.2f} {self.ssim:>7.3f}  {distance}"
        )


def write_both(job: Job, fps: float, frames: Sequence[np.ndarray], dense: Iterable[np.ndarray]) -> Likeness:
    """Writes a job's clip, the one with dense attention as it comes, and both side by side; how alike they are."""
    alike, at, others = Likeness(), 0, []
    one = np.concatenate(frames)
    with (
        video_file(job.out, fps) as video,
        video_file(dense_file(job), fps) as other,
        video_file(both_file(job), fps) as both,
    ):
        for part in dense:
            mine = one[at : at + len(part)]
            at += len(part)
            alike.add(mine, part)
            video.add(mine)
            other.add(part)
            both.add(_beside(mine, part))
            others.append(part)
    alike.lpips, alike.why = lpips(one, np.concatenate(others))
    return alike


def lpips(one: np.ndarray, other: np.ndarray) -> tuple[float | None, str]:
    """LPIPS (Zhang et al. 2018, AlexNet), the mean of the frames, of two clips (n, H, W, 3) uint8.

    Nothing is downloaded: None, and why, where the weights of its network are not at hand.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # missing, or built for another torch
        return None, f"needs torchvision, pip install torchvision ({error})"
    file = Path(torch.hub.get_dir()) / "checkpoints" / _LPIPS_WEIGHTS
    if not file.is_file():
        return None, f"needs {file}"
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    total = 0.0
    for start in range(0, len(one), _LPIPS_BATCH):
        a, b = (_pixels(clip[start : start + _LPIPS_BATCH]) for clip in (one, other))
        distance = learned_perceptual_image_patch_similarity(a, b, net_type="alex", normalize=True, reduction="sum")
        total += distance.item()  # type: ignore[union-attr]
    return total / len(one), ""


def _pixels(frames: np.ndarray) -> Tensor:
    """(n, H, W, 3) uint8 as (n, 3, H, W) from 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255


def _beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Frames of two clips, (n, H, W, 3), with a white line between."""
    line = np.full((*left.shape[:2], 4, 3), 255, np.uint8)
    return np.concatenate([left, line, right], axis=2)
