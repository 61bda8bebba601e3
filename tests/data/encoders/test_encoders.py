"""The families' real classes, tiny, saved to disk and loaded: what they store is what their pipelines would use."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLMochi, WanImageToVideoPipeline
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch.nn import functional as F

from data.encoders import check_cut, fingerprint, load_encoder, mochi
from data.encoders.base import Encoder, EncoderSettings, to_video
from data.encoders.decoding import decode_frames, normalized, to_frames
from data.encoders.mochi import MochiEncoder
from data.errors import DataError
from data.shards.manifest import Manifest
from data.shards.sample import Sample
from data.shards.shard_info import SampleInfo, ShardInfo
from tests.helpers.tiny_models import save_hunyuan, save_hunyuan15, save_mochi, save_wan, save_wan_5b

SAVE = {
    "wan": save_wan, "wan22_5b": save_wan_5b, "hunyuan": save_hunyuan, "hunyuan15": save_hunyuan15, "mochi": save_mochi,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save(tmp_path_factory.mktemp(family)) for family, save in SAVE.items()}


def load(family: str, folder: Path, **more: Any) -> Encoder:
    return load_encoder(family, EncoderSettings(folder, torch.device("cpu"), torch.float32, torch.float32, **more))


def moving(frames: int, height: int, width: int) -> np.ndarray:
    """A smooth random picture that slides: frames (F, H, W, 3) uint8."""
    noise = torch.rand(1, 3, height // 16 + 8, width // 16 + 8, generator=torch.Generator().manual_seed(0))
    wide = F.interpolate(noise, size=(height + 128, width + 128), mode="bicubic")[0].clamp(0, 1)
    steps = [(t % 120, t // 2 % 120) for t in range(frames)]
    views = [wide[:, y : y + height, x : x + width].permute(1, 2, 0) for y, x in steps]
    return np.stack([(view * 255).byte().numpy() for view in views])


@pytest.mark.parametrize(("family", "stride"), [("wan", 4), ("wan22_5b", 4), ("hunyuan15", 4), ("mochi", 6)])
def test_a_longer_clip_begins_with_the_latent_of_the_shorter(
    folders: dict[str, Path], family: str, stride: int
) -> None:
    encoder, video = load(family, folders[family]), moving(1 + 5 * stride, 32, 64)
    long, short = encoder.encode(video), encoder.encode(video[: 1 + 2 * stride])
    assert encoder.why_not_cut(len(video), 1 + 2 * stride) is None
    # other kernels for other lengths may round otherwise: by the last bit of bfloat16 at most
    torch.testing.assert_close(long[:, :3], short, rtol=2**-7, atol=1e-5 if family == "mochi" else 0)


def test_what_is_not_causal_is_not_cut(folders: dict[str, Path]) -> None:
    encoder, video = load("hunyuan", folders["hunyuan"]), moving(21, 32, 64)
    long, short = encoder.encode(video).float(), encoder.encode(video[:9]).float()
    assert (long[:, :3] - short).abs().max() > 0.02
    assert "normalises over all frames" in str(encoder.why_not_cut(21, 9))
    assert MochiEncoder.why_not_cut(319, 163) is None
    assert MochiEncoder.why_not_cut(667, 163) == (
        "Mochi's VAE encodes clips of 667 frames in tiles of 224 pixels, of 163 in 256"
    )


def test_a_folder_that_cannot_be_cut_says_which_of_its_lengths_it_is() -> None:
    samples = tuple(SampleInfo(f"{latents}", (12, latents, 2, 2), n, 1) for n, latents in enumerate((56, 112)))
    made = Manifest((ShardInfo("a.tar", samples, 2, ""),), 30.0, "mochi:vae-a", "", "", {})
    why = "latents of 112 frames: Mochi's VAE encodes clips of 667 frames in tiles of 224 pixels, of 163 in 256"
    with pytest.raises(DataError, match=f"clips of 163 frames cannot be cut from its {why}"):
        check_cut(made, 163)


def test_an_image_condition_of_a_longer_clip_begins_with_that_of_the_shorter(tmp_path: Path) -> None:
    encoder, video = load("wan", save_wan(tmp_path, image=True), image_to_video=True), moving(21, 32, 64)
    long, short = encoder.image(video), encoder.image(video[:9])
    clip = Sample("k", encoder.encode(video), {}, {}, long, {"caption": ""}).first_frames(3)
    assert torch.equal(clip.latent, encoder.encode(video[:9]))
    assert clip.image.keys() == short.keys() and torch.equal(clip.image["condition"], short["condition"])
    assert torch.equal(clip.image["clip"], short["clip"])


@pytest.mark.parametrize(("family", "frames", "shape"), [
    ("wan", 9, (16, 3, 6, 8)), ("wan22_5b", 9, (48, 3, 4, 6)), ("hunyuan", 9, (4, 3, 6, 8)),
    ("hunyuan15", 9, (4, 3, 3, 4)), ("mochi", 13, (4, 3, 6, 8)),
])  # fmt: skip
def test_a_clip_becomes_a_valid_sample(folders: dict[str, Path], family: str, frames: int, shape: Any) -> None:
    encoder = load(family, folders[family])
    cell = 16 if family in ("wan22_5b", "hunyuan15") else 8
    height, width = shape[2] * cell, shape[3] * cell
    encoder.check(frames, [(height, width)])
    prompt = encoder.prompt("a red ball")
    latent = encoder.encode(moving(frames, height, width))
    assert latent.dtype == torch.bfloat16 and latent.shape == shape
    Sample("k", latent, prompt.text, prompt.pooled, {}, {"caption": "a red ball"}).validate()
    assert encoder.decode(latent).shape == (frames, height, width, 3)
    encoder.prompt("").validate("the empty prompt")
    time = encoder.facts.strides[0]
    with pytest.raises(DataError, match=rf"frames is {frames + 1}, expected {time} x k \+ 1 "):
        encoder.check(frames + 1, [(48, 64)])
    expected = f"expected sides that divide by {cell * encoder.facts.patch}, such as {height}x64"
    with pytest.raises(DataError, match=f"size is {height}x60, {expected}"):
        encoder.check(frames, [(height, 60)])


@pytest.mark.parametrize(
    ("family", "squares"), [("wan", False), ("mochi", False), ("hunyuan", True), ("hunyuan15", True)]
)
def test_large_frames_are_decoded_whole_where_they_fit(folders: dict[str, Path], family: str, squares: bool) -> None:
    encoder = load(family, folders[family])
    latent = torch.randn(encoder.latent_channels(folders[family]), 1, 2, 40, generator=torch.Generator().manual_seed(0))
    found = encoder.decode(latent)
    whole, cut = (next(decode_frames(encoder.vae, latent[None], tiled=tiled)) for tiled in (False, True))
    assert not np.array_equal(whole, cut)
    assert np.array_equal(found, cut if squares else whole)


def test_wan_stores_what_its_pipeline_uses(folders: dict[str, Path]) -> None:
    encoder: Any = load("wan", folders["wan"])
    text = encoder.prompt("a  red &amp; ball").text["text"]
    padded, _ = encoder.pipeline.encode_prompt(
        "a red & ball", do_classifier_free_guidance=False, max_sequence_length=512
    )
    assert len(text.tokens) == 5 and text.mask.all()
    assert torch.equal(padded[0, :5].bfloat16(), text.tokens) and not padded[0, 5:].any()
    assert len(encoder.prompt("red ball " * 400).text["text"].tokens) == 512
    frames = moving(9, 48, 64)
    mode = encoder.vae.encode(to_video(frames, torch.device("cpu"), torch.float32)).latent_dist.mode()[0]
    mean, std = (
        torch.tensor(v)[:, None, None, None] for v in (encoder.vae.config.latents_mean, encoder.vae.config.latents_std)
    )
    assert torch.equal(encoder.encode(frames), ((mode - mean) / std).bfloat16())


@pytest.mark.parametrize(("family", "frames", "mean", "std"), [
    ("hunyuan", 9, [0.0] * 4, [1.0] * 4), ("hunyuan15", 9, [0.0] * 4, [1.0] * 4),
    ("mochi", 13, [0.1, -0.2, 0.3, 0.0], [0.9, 1.1, 1.2, 0.8]),
])  # fmt: skip
def test_hunyuans_and_mochi_store_what_their_pipelines_denoise(
    folders: dict[str, Path], family: str, frames: int, mean: list[float], std: list[float]
) -> None:
    """Normalised and scaled; decoding is the inverse."""
    encoder: Any = load(family, folders[family])
    encoder.vae.register_to_config(scaling_factor=0.5)
    video = to_video(clip := moving(frames, 48, 64), torch.device("cpu"), torch.float32)
    mode = encoder.vae.encode(video).latent_dist.mode()[0]
    shift, scale = (torch.tensor(v)[:, None, None, None] for v in (mean, std))
    latent = encoder.encode(clip)
    torch.testing.assert_close(latent.float(), (mode - shift) / scale * 0.5, atol=1e-5, rtol=2**-8)
    back = encoder.vae.decode((latent.float() / 0.5 * scale + shift)[None], return_dict=False)[0]
    assert np.abs(encoder.decode(latent).astype(int) - to_frames(back)).max() <= 1


@pytest.mark.parametrize("family", ["wan", "wan22_5b"])
def test_wan_encodes_four_frames_at_a_time_and_equals_the_whole(folders: dict[str, Path], family: str) -> None:
    """Against the VAE's own layers over all frames at once: causal convolutions need no cache then."""
    encoder: Any = load(family, folders[family])
    seen: list[int] = []
    counting = encoder.vae.encoder.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    video = to_video(moving(33, 64, 96), torch.device("cpu"), torch.float32)
    found = encoder.latent(video)
    assert found.shape[1] == 9 and max(seen) == 4 and len(seen) == 9
    counting.remove()
    for layer in encoder.vae.encoder.modules():
        if getattr(layer, "mode", None) == "downsample3d":
            # Without a cache it leaves the time as it is: the first frame stays alone, two of the others become one.
            layer.register_forward_hook(lambda own, _, out: torch.cat([out[:, :, :1], own.time_conv(out)], dim=2))
    size = encoder.vae.config.patch_size
    folded = video if size is None else patchify(video, size)
    whole = DiagonalGaussianDistribution(encoder.vae.quant_conv(encoder.vae.encoder(folded))).mode()
    torch.testing.assert_close(found, normalized(encoder.vae, whole)[0], atol=1e-4, rtol=1e-4)


def test_the_5b_s_first_latent_frame_is_its_image_condition(folders: dict[str, Path]) -> None:
    """Its pipeline conditions on the latent of the first frame alone, which the clip's own latent begins with."""
    encoder: Any = load("wan22_5b", folders["wan22_5b"])
    pipeline: Any = WanImageToVideoPipeline(None, None, encoder.vae, None, expand_timesteps=True)
    frames = moving(9, 64, 96)
    first = to_video(frames[:1], torch.device("cpu"), torch.float32)[:, :, 0]
    _, condition, mask = pipeline.prepare_latents(first, 1, 48, 64, 96, 9, torch.float32, torch.device("cpu"))
    latent = encoder.encode(frames)
    assert torch.equal(condition[0].bfloat16(), latent[:, :1]) and not torch.equal(latent[:, 1:2], latent[:, :1])
    assert mask[0, 0, :, 0, 0].tolist() == [0, 1, 1]
    with pytest.raises(DataError, match="takes the first frame from the clip's own latent: leave it out"):
        load("wan22_5b", folders["wan22_5b"], image_to_video=True)


def test_the_two_vaes_of_wan_are_not_mistaken(folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="4x16x16 pixels, model=wan has 4x8x8; choose model=wan22_5b"):
        load("wan", folders["wan22_5b"])
    with pytest.raises(DataError, match="4x8x8 pixels, model=wan22_5b has 4x16x16; choose model=wan$"):
        load("wan22_5b", folders["wan"])


def test_another_hunyuan_vae_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, norm_num_groups=4, spatial_compression_ratio=4
    )
    other = shutil.copytree(folders["hunyuan"], tmp_path / "other")
    vae.save_pretrained(other / "vae")
    with pytest.raises(DataError, match="other/vae: a cell of its latents is 4x4x4 pixels, model=hunyuan has 4x8x8"):
        load("hunyuan", other)


def test_wan_image_conditions_are_the_pipeline_s(tmp_path: Path) -> None:
    encoder: Any = load("wan", save_wan(tmp_path, image=True), image_to_video=True)
    frames = moving(9, 48, 64)
    found = encoder.image(frames)
    first = to_video(frames[:1], torch.device("cpu"), torch.float32)[:, :, 0]
    _, condition = encoder.images.prepare_latents(first, 1, 16, 48, 64, 9, torch.float32, torch.device("cpu"))
    assert torch.equal(found["condition"], condition[0, 4:].bfloat16())
    assert found["clip"].shape == (17, 32)
    with pytest.raises(DataError, match="loaded without image_to_video"):
        load("wan", tmp_path).image(frames)
    with pytest.raises(DataError, match="model=pixels has no image-to-video encoder"):
        load("pixels", None).image(frames)  # type: ignore[arg-type]


def test_hunyuan15_image_conditions_are_the_pipeline_s(tmp_path: Path) -> None:
    """The first frame's latent is also that which the clip's own begins with."""
    encoder: Any = load("hunyuan15", save_hunyuan15(tmp_path, image=True), image_to_video=True)
    frames, cpu = moving(9, 48, 64), torch.device("cpu")
    found = encoder.image(frames)
    picture = Image.fromarray(frames[0])
    latents = torch.zeros(1, 4, 3, 3, 4)
    condition, mask = encoder.images.prepare_cond_latents_and_mask(latents, picture, 1, 48, 64, torch.float32, cpu)
    assert mask[:, :, 0].all() and not mask[:, :, 1:].any() and not condition[:, :, 1:].any()
    torch.testing.assert_close(found["condition"].float(), condition[0, :, :1], atol=1e-5, rtol=2**-7)
    torch.testing.assert_close(encoder.encode(frames)[:, :1], found["condition"], atol=1e-5, rtol=2**-7)
    assert found["vision"].shape == (729, 16)
    torch.testing.assert_close(
        found["vision"], encoder.images.encode_image(picture, 1, cpu, torch.float32)[0].bfloat16()
    )
    assert "+image-" in fingerprint("hunyuan15", tmp_path, image_to_video=True)
    with pytest.raises(DataError, match="loaded without image_to_video"):
        load("hunyuan15", tmp_path).image(frames)


def test_hunyuan_text_is_without_template_and_padding(folders: dict[str, Path]) -> None:
    encoder: Any = load("hunyuan", folders["hunyuan"])
    prompt = encoder.prompt("a red ball")
    tokens, pooled, mask = encoder.pipeline.encode_prompt("a red ball", device=torch.device("cpu"))
    assert tokens.shape[1] == 256 and 0 < mask.sum() < 256
    assert torch.equal(prompt.text["text"].tokens, tokens[0, : int(mask.sum())].bfloat16())
    assert torch.equal(prompt.pooled["clip"], pooled[0].bfloat16())


def test_hunyuan15_texts_are_the_pipelines_without_template_and_padding(folders: dict[str, Path]) -> None:
    """What a caption quotes is a text of its own; where it quotes nothing, one token that nothing may see."""
    encoder: Any = load("hunyuan15", folders["hunyuan15"])
    assert encoder.facts.text_tokens == 1000 + 256
    for caption, quoted in (('a "red ball" moving', 'Text "red ball". '), ("a red ball", "")):
        words, words_mask, glyphs, glyphs_mask = encoder.pipeline.encode_prompt(caption, device=torch.device("cpu"))
        assert words.shape[1] == 1000 and glyphs.shape[1] == 256
        found = encoder.prompt(caption).text
        assert found["text"].mask.all() and torch.equal(found["text"].tokens, words[words_mask.bool()].bfloat16())
        assert encoder.tokens(caption) == {
            "Qwen2.5-VL": (int(words_mask.sum()), 1000), "byT5": (int(glyphs_mask.sum()), 256),
        }  # fmt: skip
        if quoted:
            assert len(found["glyphs"].tokens) == len(quoted.encode()) + 1  # bytes, and the end
            assert torch.equal(found["glyphs"].tokens, glyphs[glyphs_mask.bool()].bfloat16())
        else:
            assert found["glyphs"].mask.tolist() == [False] and not found["glyphs"].tokens.any()


def test_hunyuan15_encodes_a_tile_a_few_frames_at_a_time_and_equals_the_whole(folders: dict[str, Path]) -> None:
    """Against diffusers' own tiles over the whole time, in the middle of which tiles are blended."""
    encoder: Any = load("hunyuan15", folders["hunyuan15"])
    clip, seen = moving(13, 288, 272), []
    counting = encoder.vae.encoder.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2]))
    found = encoder.encode(clip)
    counting.remove()
    assert seen == [1, 4, 4, 4] * 4
    mode = encoder.vae.encode(to_video(clip, torch.device("cpu"), torch.float32)).latent_dist.mode()
    torch.testing.assert_close(found.float(), normalized(encoder.vae, mode)[0], atol=1e-4, rtol=2**-7)
    untiled = encoder.vae.encoder(to_video(clip, torch.device("cpu"), torch.float32)).chunk(2, dim=1)[0]
    assert (mode - untiled).abs().max() > 1e-2


def test_mochi_empty_prompt(tmp_path: Path, folders: dict[str, Path]) -> None:
    assert load("mochi", folders["mochi"]).prompt("").text["text"].mask.tolist() == [True]
    zeroed = load("mochi", save_mochi(tmp_path, force_zeros=True)).prompt("").text["text"]
    assert zeroed.mask.tolist() == [False] and not zeroed.tokens.any()


def test_mochi_tiles_are_so_small_that_no_layer_with_a_stride_in_time_is_cut(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With diffusers' threshold lowered to that of a tiny clip: cut and whole layers give one latent."""
    encoder: Any = load("mochi", folders["mochi"])
    clip, cut = moving(13, 32, 160), []
    monkeypatch.setattr(mochi, "CHANNELS", 32)
    monkeypatch.setattr(mochi, "UNCUT", 32 * 14 * 64 * 64)
    whole, limit = encoder.encode(clip), 32 * 14 * 16 * 64  # the clip is a quarter as high as its tiles

    def as_diffusers(self: Any, video: torch.Tensor) -> torch.Tensor:
        """`CogVideoXSafeConv3d.forward` with the threshold lowered."""
        if video.numel() <= limit:
            return torch.nn.Conv3d.forward(self, video)
        cut.append(self.stride)
        parts, kernel = list(video.chunk(int(video.numel() / limit) + 1, dim=2)), self.kernel_size[0]
        if kernel > 1:
            parts = parts[:1] + [torch.cat((a[:, :, 1 - kernel :], b), dim=2) for a, b in itertools.pairwise(parts)]
        return torch.cat([torch.nn.Conv3d.forward(self, part) for part in parts], dim=2)

    monkeypatch.setattr(CogVideoXSafeConv3d, "forward", as_diffusers)
    found = encoder.encode(clip)
    assert cut and all(stride[0] == 1 for stride in cut)
    torch.testing.assert_close(found.float(), whole.float(), atol=1e-2, rtol=2**-7)
    encoder.vae.use_tiling = False
    encoder.encode(clip)
    assert (2, 2, 2) in cut, "a larger tile is cut"


def test_mochi_tiles_follow_from_the_clip_s_length() -> None:
    assert [mochi.tile_of(frames) for frames in (163, 331, 667, 2047)] == [256, 256, 224, 128]
    with torch.device("meta"):
        vae = AutoencoderKLMochi()  # the released one's layout
    frames, side, found = 667, 224, []
    for block in vae.encoder.down_blocks:
        layer = block.conv_in.conv
        if layer.stride[0] > 1:
            found.append(layer.in_channels * (frames + layer.kernel_size[0] - 1) * side**2)
        frames, side = (frames - 1) // layer.stride[0] + 1, side // layer.stride[1]
    assert max(found) == mochi.CHANNELS * 668 * 112 * 112 <= mochi.UNCUT
    MochiEncoder.check(2047, [(480, 848)])
    with pytest.raises(DataError, match="frames is 2053, but model=mochi encodes at most 2047 in one clip"):
        MochiEncoder.check(2053, [(480, 848)])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "frames", "floor"), [("hunyuan", 33, 25.0), ("mochi", 19, 35.0)])
def test_tiles_are_near_the_whole(folders: dict[str, Path], family: str, frames: int, floor: float) -> None:
    """PSNR in dB over the latent's range, for random weights, whose norms know nothing of natural pictures."""
    encoder: Any = load(family, folders[family])
    clip = moving(frames, 288, 384)
    tiled = encoder.encode(clip).float()
    encoder.vae.use_tiling = encoder.vae.use_framewise_encoding = False
    whole = encoder.encode(clip).float()
    assert not torch.equal(tiled, whole)
    psnr = 10 * torch.log10((whole.max() - whole.min()) ** 2 / (whole - tiled).square().mean())
    assert psnr > floor, psnr
