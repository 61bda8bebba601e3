"""Between a VAE and the transformer: the scale of latents, and latents to frames, a few at a time.

Each family decodes beside its encoder, in `wan.py`, `mochi.py`, `hunyuan.py`, `hunyuan15_vae.py` and `minimax_h3.py`,
so that the device's memory does not grow with the clip's length. With tiles, each also decodes a frame in overlapping
squares, which are blended; all but HunyuanVideo and MiniMax-H3 decode a square over the whole time, so that the clip is
gathered first, Wan's and Mochi's in CPU memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMiniMaxH3,
    AutoencoderKLWan,
)
from torch import Tensor

TILE, OVERLAP = 32, 8  # latent cells

TILED = frozenset({"hunyuan", "hunyuan15", "minimax_h3"})
"""Encoders, keys of `data.encoders.FAMILIES`, whose VAEs decode frames in squares where nothing else is asked for:
whole frames of HunyuanVideo take more memory than a GPU has, and MiniMax-H3 was released with squares. Mochi's, of
480x848 and `mochi.DECODED` latent frames at a time, take 12 GiB in bf16 and 24 in fp32."""


def normalized(vae: Any, latent: Tensor) -> Tensor:
    """What the transformer works on, from what the VAE encodes: (1, C, f, h, w) both."""
    statistics, scale = _statistics(vae, latent)
    if statistics is None:
        return latent * scale
    mean, std = statistics
    return (latent - mean) / (std / scale)


def denormalized(vae: Any, latent: Tensor) -> Tensor:
    """What the VAE decodes, from what the transformer works on: (1, C, f, h, w) both."""
    statistics, scale = _statistics(vae, latent)
    if statistics is None:
        return latent / scale
    mean, std = statistics
    return latent * std / scale + mean


def _statistics(vae: Any, latent: Tensor) -> tuple[tuple[Tensor, Tensor] | None, float]:
    """Mean and standard deviation of a VAE's latents, (1, C, 1, 1, 1), None where it has none, and their factor."""
    config = vae.config
    scale = getattr(config, "scaling_factor", None) or 1.0
    if getattr(config, "latents_mean", None) is None:
        return None, scale
    mean, std = (latent.new_tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    return (mean, std), scale


@torch.no_grad()
def decode_frames(vae: Any, latent: Tensor, *, tiled: bool) -> Iterator[np.ndarray]:
    """The frames of a clip in order, some at a time.

    Args:
        vae: one of diffusers' five.
        latent: (1, C, f, h, w) as the transformer works on it.
        tiled: decode squares of a frame: less memory, more time.

    Yields:
        (n, H, W, 3) uint8.
    """
    z = denormalized(vae, latent.to(vae.device, torch.float32)).to(vae.dtype)
    for video in decode_videos(vae, z, tiled=tiled):
        yield to_frames(video)


def decode_videos(vae: Any, z: Tensor, *, tiled: bool) -> Iterator[Tensor]:
    """As `decode_frames`, from what the VAE decodes, (1, C, f, h, w), to (1, 3, n, H, W) in [-1, 1]."""
    # Each family's file imports its pipelines, which take seconds.
    if isinstance(vae, AutoencoderKLHunyuanVideo):
        from data.encoders import hunyuan

        return hunyuan.decode_stretches(vae, z, tiled=tiled)
    if isinstance(vae, AutoencoderKLHunyuanVideo15):
        from data.encoders import hunyuan15_vae

        return hunyuan15_vae.decode_stream(vae, z, tiled=tiled)
    if isinstance(vae, AutoencoderKLMiniMaxH3):
        from data.encoders import minimax_h3

        return minimax_h3.decode_stream(vae, z, tiled=tiled)
    if isinstance(vae, AutoencoderKLWan):
        from data.encoders import wan

        stream = functools.partial(wan.decode_stream, vae)
    else:
        from data.encoders import mochi

        stream = functools.partial(mochi.decode_stream, vae)
    return decode_tiles(stream, z) if tiled and max(z.shape[3:]) > TILE else stream(z)


def to_frames(video: Tensor) -> np.ndarray:
    """A video (1, 3, F, H, W) in [-1, 1] as frames (F, H, W, 3) uint8."""
    pixels = video[0].float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).cpu().numpy()


def decode_tiles(
    stream: Callable[[Tensor], Iterator[Tensor]], z: Tensor, side: int = TILE, overlap: int = OVERLAP
) -> Iterator[Tensor]:
    """Each square of the frames decoded over the whole time, gathered in CPU memory and blended.

    Args:
        stream: decodes a square, (1, C, f, h, w) to parts (1, 3, n, H, W) of it in time.
        z: the whole latent.
        side, overlap: of the squares and between them, in latent cells.

    Yields:
        (1, 3, 1, H, W) float32 in CPU memory.
    """
    total: Tensor | None = None
    weights: Tensor | None = None
    for top in _starts(z.shape[3], side, overlap):
        for left in _starts(z.shape[4], side, overlap):
            part = z[:, :, :, top : top + side, left : left + side]
            # half precision holds 11 bits of what becomes 8
            video = torch.cat([chunk.to("cpu", torch.float16) for chunk in stream(part)], dim=2)
            scale = video.shape[3] // part.shape[3]
            if total is None or weights is None:
                total = torch.zeros(1, 3, video.shape[2], z.shape[3] * scale, z.shape[4] * scale)
                weights = torch.zeros(total.shape[3:])
            weight = _ramp(video.shape[3], overlap * scale)[:, None] * _ramp(video.shape[4], overlap * scale)
            rows, columns = (
                slice(at * scale, at * scale + n) for at, n in zip((top, left), video.shape[3:], strict=True)
            )
            weights[rows, columns] += weight
            total[..., rows, columns] += video * weight
    assert total is not None and weights is not None
    for frame in total.split(1, dim=2):
        yield frame / weights


def _starts(cells: int, side: int, overlap: int) -> list[int]:
    """The first cells of tiles that cover a side, evenly spread."""
    if cells <= side:
        return [0]
    count = -(-(cells - overlap) // (side - overlap))
    return [round(i * (cells - side) / (count - 1)) for i in range(count)]


def _ramp(pixels: int, width: int) -> Tensor:
    """Weights along a side, falling towards both ends over so many pixels."""
    places = torch.arange(pixels)
    return torch.minimum(places + 1, pixels - places).clamp(max=width).float()
