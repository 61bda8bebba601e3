"""Latents to frames, a few at a time: the device's memory does not grow with the clip's length.

    Wan        one latent frame after the other; the causal convolutions' caches are carried along, so that the frames
               are those of a whole decode
    Mochi      the same, two latent frames at a time
    Hunyuan    its decoder attends over time, so that diffusers decodes it in stretches of 16 frames that overlap by 4
               and are blended; the same here, of which only two are ever held

With tiles, each also decodes a frame in overlapping squares, which are blended; Wan and Mochi decode a square over the
whole time, so that the clip is gathered in CPU memory first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLMochi, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor
from torch.nn import functional as F

_TILE, _OVERLAP = 32, 8  # latent cells
_MOCHI_FRAMES = 2  # latent frames at a time


@torch.no_grad()
def decode_frames(vae: Any, latent: Tensor, *, tiled: bool) -> Iterator[np.ndarray]:
    """The frames of a clip in order, some at a time.

    Args:
        vae: one of diffusers' three.
        latent: (1, C, f, h, w) as the family's pipeline gives it with ``output_type="latent"``.
        tiled: decode squares of a frame: less memory, more time.

    Yields:
        (n, H, W, 3) uint8.
    """
    z = denormalized(vae, latent.to(vae.device, torch.float32)).to(vae.dtype)
    for video in _videos(vae, z, tiled):
        pixels = video[0].float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        yield pixels.permute(1, 2, 3, 0).cpu().numpy()


def denormalized(vae: Any, latent: Tensor) -> Tensor:
    """What the decoder takes, from what the transformer works on."""
    config = vae.config
    scale = getattr(config, "scaling_factor", None) or 1.0
    if getattr(config, "latents_mean", None) is None:
        return latent / scale
    mean, std = (latent.new_tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    return latent * std / scale + mean


def _videos(vae: Any, z: Tensor, tiled: bool) -> Iterator[Tensor]:
    if isinstance(vae, AutoencoderKLHunyuanVideo):
        return _hunyuan(vae, z, tiled)
    stream = {AutoencoderKLWan: _wan, AutoencoderKLMochi: _mochi}[type(vae)]
    if tiled and max(z.shape[3:]) > _TILE:
        return _tiles(functools.partial(stream, vae), z)
    return stream(vae, z)


def _wan(vae: Any, z: Tensor) -> Iterator[Tensor]:
    cache: list[Any] = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    z = vae.post_quant_conv(z)
    for i in range(z.shape[2]):
        video = vae.decoder(z[:, :, i : i + 1], feat_cache=cache, feat_idx=[0], first_chunk=i == 0)
        if vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=vae.config.patch_size)
        yield video.clamp(-1, 1)


def _mochi(vae: Any, z: Tensor) -> Iterator[Tensor]:
    cache = None
    with _carrying_time(vae.decoder):
        for i, part in enumerate(z.split(_MOCHI_FRAMES, dim=2)):
            video, cache = vae.decoder(part, conv_cache=cache)
            # the first latent frame is one frame of the clip
            skip = vae.temporal_compression_ratio - 1 if i == 0 and vae.drop_last_temporal_frames else 0
            yield video[:, :, skip:]


@contextmanager
def _carrying_time(decoder: Any) -> Iterator[None]:
    """Makes the causal convolutions take the frames before from their cache; diffusers does so only with zeros at a
    frame's border, where the model was trained with repeated pixels."""

    def forward(conv: Any, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        before = inputs[:, :, :1].expand(-1, -1, conv.time_pad, -1, -1) if conv_cache is None else conv_cache
        inputs = torch.cat([before, inputs], dim=2)
        sides = (conv.width_pad, conv.width_pad, conv.height_pad, conv.height_pad, 0, 0)
        return conv.conv(F.pad(inputs, sides, mode="replicate")), inputs[:, :, -conv.time_pad :].clone()

    convolutions = [module for module in decoder.modules() if isinstance(module, CogVideoXCausalConv3d)]
    for conv in convolutions:
        assert conv.pad_mode == "replicate"
        conv.forward = functools.partial(forward, conv)  # type: ignore
    try:
        yield
    finally:
        for conv in convolutions:
            del conv.forward  # the class's own again


def _hunyuan(vae: Any, z: Tensor, tiled: bool) -> Iterator[Tensor]:
    ratio = vae.temporal_compression_ratio
    whole, stride = vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames  # frames

    def decode(part: Tensor) -> Tensor:
        cells = vae.tile_sample_min_height // vae.spatial_compression_ratio
        if tiled and max(part.shape[3:]) > cells:
            return vae.tiled_decode(part, return_dict=False)[0]
        return vae.decoder(vae.post_quant_conv(part))

    frames = z.shape[2]
    if frames <= whole // ratio:
        yield decode(z)
        return
    left = (frames - 1) * ratio + 1
    before: Tensor | None = None
    for start in range(0, frames, stride // ratio):
        video = decode(z[:, :, start : start + whole // ratio + 1])
        keep = stride
        if before is None:
            keep += 1
        else:
            video = vae.blend_t(before, video[:, :, 1:], whole - stride)
        before = video
        yield video[:, :, : min(keep, left)]
        left -= min(keep, left, video.shape[2])
        if left == 0:  # the stretch that starts at the last latent frame has only what the one before has shown
            return


def _tiles(stream: Callable[[Tensor], Iterator[Tensor]], z: Tensor) -> Iterator[Tensor]:
    """Each square of the frames decoded over the whole time, gathered in CPU memory and blended."""
    total: Tensor | None = None
    weights: Tensor | None = None
    for top in _starts(z.shape[3]):
        for left in _starts(z.shape[4]):
            part = z[:, :, :, top : top + _TILE, left : left + _TILE]
            # half precision holds 11 bits of what becomes 8
            video = torch.cat([chunk.to("cpu", torch.float16) for chunk in stream(part)], dim=2)
            scale = video.shape[3] // part.shape[3]
            if total is None or weights is None:
                total = torch.zeros(1, 3, video.shape[2], z.shape[3] * scale, z.shape[4] * scale)
                weights = torch.zeros(total.shape[3:])
            weight = _ramp(video.shape[3], scale)[:, None] * _ramp(video.shape[4], scale)
            rows, columns = (
                slice(at * scale, at * scale + n) for at, n in zip((top, left), video.shape[3:], strict=True)
            )
            weights[rows, columns] += weight
            total[..., rows, columns] += video * weight
    assert total is not None and weights is not None
    for frame in total.split(1, dim=2):
        yield frame / weights


def _starts(cells: int) -> list[int]:
    """The first cells of tiles that cover a side, evenly spread."""
    if cells <= _TILE:
        return [0]
    count = -(-(cells - _OVERLAP) // (_TILE - _OVERLAP))
    return [round(i * (cells - _TILE) / (count - 1)) for i in range(count)]


def _ramp(pixels: int, scale: int) -> Tensor:
    """Weights along a side, falling towards both ends."""
    places = torch.arange(pixels)
    return torch.minimum(places + 1, pixels - places).clamp(max=_OVERLAP * scale).float()
