"""Frames from latents: streamed decoding gives what a whole decode gives."""

import functools

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideo15, AutoencoderKLMochi, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXCausalConv3d

from data.encoders import mochi, wan
from data.encoders.decoding import decode_frames, decode_tiles, decode_videos, denormalized, normalized

WAN = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}


def make(family):
    torch.manual_seed(0)
    if family == "wan":
        vae = AutoencoderKLWan(**WAN, z_dim=16)
    elif family == "wan_5b":
        mean, std = [0.1] * 8, [0.5] * 8
        vae = AutoencoderKLWan(
            **WAN, z_dim=8, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16, is_residual=True,
            decoder_base_dim=4, latents_mean=mean, latents_std=std,
        )  # fmt: skip
    elif family == "hunyuan":
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
    elif family == "hunyuan15":
        vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)
    else:
        vae = AutoencoderKLMochi(
            latent_channels=4, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1, 1, 1, 1, 1), latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.9, 1.1, 1.2, 0.8],
        )  # fmt: skip
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vae.eval()


def latent_for(vae, frames, height=2, width=3):
    torch.manual_seed(1)
    channels = vae.config.z_dim if "z_dim" in vae.config else vae.config.latent_channels
    return torch.randn(1, channels, frames, height, width)


def whole(vae, latent):
    with torch.no_grad():
        video = vae.decode(denormalized(vae, latent), return_dict=False)[0]
    return video


@pytest.mark.parametrize(
    ("family", "ratio", "frames"),
    [("wan", 4, 1), ("wan", 4, 4), ("wan_5b", 4, 3)]
    + [("hunyuan", 4, frames) for frames in (1, 4, 5, 7, 9, 10)]
    + [("hunyuan15", 4, frames) for frames in (1, 2, 5)]
    + [("mochi", 6, frames) for frames in (1, 2, 5)],
)
def test_streamed_frames_are_those_of_a_whole_decode(family, ratio, frames):
    vae = make(family)
    latent = latent_for(vae, frames)
    expected = whole(vae, latent)
    parts = list(decode_videos(vae, denormalized(vae, latent), tiled=False))
    got = torch.cat(parts, dim=2)
    assert got.shape[2] == (frames - 1) * ratio + 1
    assert all(0 < part.shape[2] <= 17 for part in parts)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    pixels = np.concatenate(list(decode_frames(vae, latent, tiled=False)))
    assert pixels.shape == (got.shape[2], *got.shape[3:], 3)
    reference = ((expected[0] + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 3, 0).numpy()
    assert np.abs(pixels.astype(float) - reference).max() <= 1


def test_mochis_convolutions_are_as_they_were():
    vae = make("mochi")
    latent = latent_for(vae, 3)
    expected = whole(vae, latent)
    list(decode_frames(vae, latent, tiled=False))
    torch.testing.assert_close(whole(vae, latent), expected, rtol=0, atol=0)
    assert not any("forward" in vars(m) for m in vae.modules() if isinstance(m, CogVideoXCausalConv3d))


def test_hunyuans_tiles_are_diffusers_own():
    vae = make("hunyuan")
    vae.tile_sample_min_height = vae.tile_sample_min_width = 32
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 24
    latent = latent_for(vae, 5, 5, 4)
    got = torch.cat(list(decode_videos(vae, denormalized(vae, latent), tiled=True)), dim=2)
    untiled = whole(vae, latent)
    vae.enable_tiling()
    torch.testing.assert_close(got, whole(vae, latent), rtol=1e-4, atol=1e-5)
    assert (got - untiled).abs().max() > 1e-3


def test_hunyuan15s_tiles_are_diffusers_own_and_its_layers_as_they_were():
    vae = make("hunyuan15")
    vae.tile_sample_min_height = vae.tile_sample_min_width = 64
    vae.tile_latent_min_height = vae.tile_latent_min_width = 4
    latent = latent_for(vae, 5, 7, 6)
    parts = list(decode_videos(vae, denormalized(vae, latent), tiled=True))
    assert all(part.shape[2] <= 17 for part in parts)
    untiled = whole(vae, latent)
    assert not any("forward" in vars(module) for module in vae.modules())
    vae.enable_tiling()
    torch.testing.assert_close(torch.cat(parts, dim=2), whole(vae, latent), rtol=1e-4, atol=1e-5)
    assert (torch.cat(parts, dim=2) - untiled).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["wan", "mochi"])
def test_tiles_are_blended_into_the_frames(family):
    """Tiles see less of the frame, and these decoders average over all that they see: alike is all to be asked."""
    vae = make(family)
    latent = latent_for(vae, 2, 4, 7)
    expected = whole(vae, latent)
    stream = functools.partial({"wan": wan, "mochi": mochi}[family].decode_stream, vae)
    with torch.no_grad():
        got = torch.cat(list(decode_tiles(stream, denormalized(vae, latent), side=4, overlap=2)), dim=2)
    assert got.shape == expected.shape
    alike = torch.corrcoef(torch.stack([got.flatten(), expected.flatten()]))[0, 1]
    assert 0.7 < alike < 0.9999


def test_tiles_of_a_pointwise_decoder_are_exact():
    z = torch.randn(1, 3, 2, 40, 71)

    def stream(part):
        for frame in part.split(1, dim=2):
            yield frame.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)

    got = torch.cat(list(decode_tiles(stream, z)), dim=2)
    expected = z.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["wan", "wan_5b", "hunyuan", "hunyuan15", "mochi"])
def test_latents_of_the_transformer_are_those_of_the_vae_scaled(family):
    """By the VAE's own statistics and factor, and back."""
    vae = make(family)
    if "wan" not in family:
        vae.register_to_config(scaling_factor=0.5)
    encoded = latent_for(vae, 2)
    config = vae.config
    mean, std = ([0.0], [1.0]) if "hunyuan" in family else (config.latents_mean, config.latents_std)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (mean, std))
    found = normalized(vae, encoded)
    torch.testing.assert_close(found, (encoded - mean) / std * (0.5 if "wan" not in family else 1.0))
    torch.testing.assert_close(denormalized(vae, found), encoded)
