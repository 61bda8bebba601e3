"""HunyuanVideo-1.5's VAE, a few frames at a time: what it computes of a whole clip, in memory that does not grow.

diffusers' class takes a tile's whole time at once: 2 and 4 times the native length do not fit, and the mask of its
attention has the square of all places. But all of it is causal. The convolutions look two frames back, the attention at
all frames before, and the first frame is a stretch of its own where time is halved or doubled. So each layer keeps what
it needs of the frames before, and a tile goes through one latent frame after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    HunyuanVideo15AttnBlock,
    HunyuanVideo15CausalConv3d,
    HunyuanVideo15Downsample,
    HunyuanVideo15Upsample,
)
from torch import Tensor, nn
from torch.nn import functional as F

SHOWN = 16
"""Frames that are handed on at a time."""


@contextmanager
def in_time(vae: Any) -> Iterator[None]:
    """Within it a VAE's encoder and decoder take each tile part by part; `encode` and `tiled_decode` stay diffusers'.

    Args:
        vae: an AutoencoderKLHunyuanVideo15.
    """
    ratio = vae.temporal_compression_ratio
    vae.encoder.forward = lambda x: _whole(vae.encoder, x, ratio)
    vae.decoder.forward = lambda x: _whole(vae.decoder, x, 1)
    try:
        yield
    finally:
        del vae.encoder.forward, vae.decoder.forward


def decode_stream(vae: Any, z: Tensor, *, tiled: bool) -> Iterator[Tensor]:
    """A latent decoded one latent frame after the other; or in squares, diffusers' own, each of them like that.

    Args:
        vae: an AutoencoderKLHunyuanVideo15.
        z: (1, C, f, h, w), as the VAE encodes it.
        tiled: decode squares of a frame, which are gathered on the device and blended.

    Yields:
        (1, 3, n, H, W), about within [-1, 1].
    """
    if tiled and max(z.shape[3:]) > vae.tile_latent_min_height:
        with in_time(vae):
            video = vae.tiled_decode(z)
        yield from video.split(SHOWN, dim=2)
    else:
        yield from _parts(vae.decoder, z, 1)


def _whole(half: nn.Module, x: Tensor, frames: int) -> Tensor:
    return torch.cat(list(_parts(half, x, frames)), dim=2)


def _parts(half: nn.Module, x: Tensor, frames: int) -> Iterator[Tensor]:
    """What an encoder or decoder makes of the first frame, and then of so many ``frames`` at a time."""
    kinds: dict[type, Any] = {
        HunyuanVideo15CausalConv3d: _Convolution,
        HunyuanVideo15AttnBlock: _Attention,
        HunyuanVideo15Downsample: _Resampling,
        HunyuanVideo15Upsample: _Resampling,
    }
    changed = {module: kinds[type(module)] for module in half.modules() if type(module) in kinds}
    for module, kind in changed.items():
        module.forward = kind(module)
    try:
        for part in (x[:, :, :1], *(x[:, :, 1:].split(frames, dim=2) if x.shape[2] > 1 else ())):
            yield type(half).forward(half, part)
    finally:
        for module in changed:
            del module.forward


class _Convolution:
    """A causal convolution that keeps the frames that its next call looks back at."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.before: Tensor | None = None
        self.stand_in = False  # the first frame of its input is none of the clip's

    def __call__(self, x: Tensor) -> Tensor:
        if self.stand_in:
            out = self._next(x[:, :, 1:])
            return torch.cat([out[:, :, :1], out], dim=2)
        return self._next(x)

    def _next(self, x: Tensor) -> Tensor:
        *sides, back, _ = self.module.time_causal_padding
        before = x[:, :, :1].expand(-1, -1, back, -1, -1) if self.before is None else self.before
        x = torch.cat([before, x], dim=2)
        self.before = x[:, :, x.shape[2] - back :].clone()
        return self.module.conv(F.pad(x, (*sides, 0, 0), mode=self.module.pad_mode))


class _Resampling:
    """A layer that halves or doubles space, and some of them time, all but the first frame of its input by pairs.

    From the second call on, a stand-in goes before the input, and what becomes of it is cut off.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        up = isinstance(module, HunyuanVideo15Upsample)
        self.paired = module.add_temporal_upsample if up else module.add_temporal_downsample
        self.first = True

    def __call__(self, x: Tensor) -> Tensor:
        stock = type(self.module).forward
        if self.first or not self.paired:
            self.first = False
            return stock(self.module, x)
        self.module.conv.forward.stand_in = True
        return stock(self.module, torch.cat([x[:, :, :1], x], dim=2))[:, :, 1:]


class _Attention:
    """The attention of a frame to itself and all before it, whose keys and values it keeps."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        assert x.shape[2] == 1, "a latent frame at a time"
        normed = self.module.norm(x)
        query, key, value = (
            layer(normed).flatten(2).transpose(1, 2)[:, None]
            for layer in (self.module.to_q, self.module.to_k, self.module.to_v)
        )
        self.keys.append(key)
        self.values.append(value)
        out = F.scaled_dot_product_attention(query, torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2))
        return x + self.module.proj_out(out[:, 0].transpose(1, 2).reshape(x.shape))
