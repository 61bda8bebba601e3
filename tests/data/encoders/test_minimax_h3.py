"""MiniMax-H3's shards against the components of diffusers' modular pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.minimax_h3.decoders import MiniMaxH3VideoDecodeStep
from diffusers.modular_pipelines.minimax_h3.encoders import MiniMaxH3TextEncoderStep, encode_vae_condition
from diffusers.modular_pipelines.minimax_h3.modular_pipeline import MiniMaxH3ModularPipeline, video_latent_num_frames
from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from data.encoders import check_cut, fingerprint, load_encoder
from data.encoders.base import EncoderSettings
from data.encoders.decoding import decode_frames, decode_videos, denormalized
from data.encoders.minimax_h3 import EMPTY, MiniMaxH3Encoder
from data.errors import DataError
from data.shards.manifest import Manifest
from data.shards.sample import Sample
from data.shards.shard_info import SampleInfo, ShardInfo
from tests.helpers.tiny_models import save_minimax_h3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_minimax_h3(tmp_path_factory.mktemp("minimax_h3"))


def load(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return load_encoder("minimax_h3", EncoderSettings(folder, torch.device("cpu"), dtype, dtype, **more))


def stock(**blocks: Any) -> Any:
    """A modular pipeline of those of diffusers' blocks."""
    return SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()


def noise(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("frames", "height", "width"), [(5, 32, 32), (22, 64, 32), (39, 32, 96), (22, 288, 32)])
def test_latents_are_those_of_the_pipelines_own_encoding(folder: Path, frames: int, height: int, width: int) -> None:
    """Which draws from the posterior and rounds to half precision: here its deviation is next to none."""
    encoder, clip = load(folder), noise(frames, height, width)
    encoder.check(frames, [(height, width)])
    with torch.no_grad():  # the second half of the channels is the logarithm of the variance
        encoder.vae.quant_conv.weight[4:].zero_()
        encoder.vae.quant_conv.bias[4:].fill_(-30.0)
    found = encoder.encode(clip)
    pipeline = MiniMaxH3ModularPipeline()
    video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        expected = encode_vae_condition(encoder.vae, video, pipeline.pixel_mean, pipeline.pixel_std)
    assert found.shape == (4, video_latent_num_frames(frames, 17, 5), height // 16, width // 16)
    assert found.dtype == torch.bfloat16 and found.float().std() > 0.1
    torch.testing.assert_close(found.float(), expected[0], rtol=2**-7, atol=2e-3)
    Sample("k", found, (prompt := encoder.prompt("a red ball")).text, prompt.pooled, {}, {"caption": ""}).validate()


def test_a_clip_is_encoded_17_frames_at_a_time_in_the_authors_tiles(folder: Path) -> None:
    encoder, clip, seen = load(folder), noise(22, 32, 288), []
    encoder.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    tiled = encoder.encode(clip)
    assert seen == [(frames, 32, 256) for frames in (17, 17, 5, 5)]
    encoder.vae.disable_tiling()
    assert (encoder.encode(clip).float() - tiled.float()).abs().max() > 0.05


def test_the_vaes_encoder_stays_in_fp32(folder: Path) -> None:
    clip = noise(22, 32, 64)
    half = load(folder, torch.bfloat16)
    assert torch.equal(half.encode(clip), load(folder).encode(clip))
    assert half.decode(half.encode(clip)).shape == clip.shape


def test_a_longer_clip_begins_with_the_latent_of_the_shorter(folder: Path) -> None:
    encoder, clip = load(folder), noise(56, 32, 64)
    long, short = encoder.encode(clip), encoder.encode(clip[:22])
    assert encoder.why_not_cut(56, 22) is None and short.shape[1] == 7
    torch.testing.assert_close(long[:, :7], short, rtol=2**-7, atol=1e-5)
    sample = SampleInfo("k", (4, 17, 2, 4), 0, 1)
    made = Manifest((ShardInfo("a.tar", (sample,), 1, ""),), 24.0, fingerprint("minimax_h3", folder), "", "", {})
    assert check_cut(made, 22) == 7
    with pytest.raises(DataError, match=r"frames is 25, expected 17 x k \+ 5 .*: use 22 or 39"):
        check_cut(made, 25)


@pytest.mark.parametrize("latents", [7, 12, 22])
def test_streamed_frames_are_those_of_the_pipelines_decoder(folder: Path, latents: int) -> None:
    vae = load(folder, vae_only=True).vae
    latent = torch.randn(1, 4, latents, 2, 17, generator=torch.Generator().manual_seed(1))
    pipeline = stock(decode=MiniMaxH3VideoDecodeStep())
    pipeline.update_components(vae=vae)
    expected = pipeline(latents=latent, output_type="pt", output="videos")[0].permute(1, 0, 2, 3)
    with torch.no_grad():
        parts = list(decode_videos(vae, denormalized(vae, latent), tiled=True))
        whole = torch.cat(list(decode_videos(vae, denormalized(vae, latent), tiled=False)), dim=2)
    got = torch.cat(parts, dim=2)[0]
    assert [part.shape[2] for part in parts] == [17] * (latents // 5) + [5]
    torch.testing.assert_close((got.clamp(-1, 1) + 1) / 2, expected, rtol=0, atol=1e-5)
    assert (got - whole[0]).abs().max() > 1e-2 and vae.use_tiling, "tiles change the frames, and are as they were"
    pixels = np.concatenate(list(decode_frames(vae, latent, tiled=True)))
    assert np.abs(pixels - 255.0 * expected.permute(1, 2, 3, 0).numpy()).max() <= 0.51


def test_a_clip_of_five_frames_is_decoded_as_the_first_of_a_longer_one(folder: Path) -> None:
    """diffusers' class decodes none; it repeats the last latent frame of a clip that ends within a stretch."""
    vae = load(folder, vae_only=True).vae
    latent = torch.randn(1, 4, 2, 2, 3, generator=torch.Generator().manual_seed(1))
    (frames,) = decode_frames(vae, latent, tiled=True)
    longer = torch.cat([latent, *[latent[:, :, -1:]] * 5], dim=2)
    expected = next(decode_frames(vae, longer, tiled=True))
    assert len(frames) == 5 and np.array_equal(frames, expected[:5])


class NoPictures:
    """The pipeline's processor, which needs torchvision, as far as text goes: what in it is a picture."""

    def create_mm_token_type_ids(self, ids: list[list[int]]) -> list[list[int]]:
        return [[0] * len(row) for row in ids]


def stock_text(folder: Path) -> Any:
    """The pipeline's text encoding."""
    pipeline = stock(text=MiniMaxH3TextEncoderStep())
    pipeline.update_components(
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        processor=NoPictures(),
    )
    return lambda text: pipeline(prompt=text, output="prompt_embeds")[0]


def test_texts_are_the_pipelines(folder: Path) -> None:
    encoder, expected = load(folder), stock_text(folder)
    for text in ("a red ball", "  two  spaces, and \N{BALLOON}\n", "x"):
        found = encoder.prompt(text).text["text"]
        assert found.mask.all() and torch.equal(found.tokens, expected(text).bfloat16())
        assert encoder.tokens(text) == {"Qwen3-VL": (len(text.encode()), 1024)}
    assert (encoder.prompt("a red ball").text["text"].tokens.float().std()) > 0.01


def test_a_long_caption_is_cut_and_the_empty_prompt_is_a_space(folder: Path) -> None:
    encoder, expected = load(folder), stock_text(folder)
    long = encoder.prompt("word " * 300).text["text"].tokens
    assert encoder.tokens("word " * 300) == {"Qwen3-VL": (1500, 1024)}
    torch.testing.assert_close(long, expected("word " * 300)[:1024].bfloat16(), rtol=2**-7, atol=1e-5)
    empty = encoder.prompt("")
    empty.validate("the empty prompt")
    assert torch.equal(empty.text["text"].tokens, expected(EMPTY).bfloat16()) and len(expected(EMPTY)) == 1
    assert encoder.tokens("") == {"Qwen3-VL": (0, 1024)}


def test_only_the_layers_that_the_text_goes_through_are_held(folder: Path) -> None:
    encoder = load(folder)
    assert len(encoder.layers.layers) == 50
    assert load(folder, vae_only=True).layers is None


def test_fingerprints_tell_vae_text_encoder_and_tokenizer(tmp_path: Path, folder: Path) -> None:
    known = fingerprint("minimax_h3", folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint("minimax_h3", copy) == known
    assert [part.split("-")[0] for part in known.split(":")[1].split("+")] == ["vae", "text", "ids"]
    for part, changed in (("vae", 0), ("text_encoder", 1)):
        (file,) = (copy / part).glob("*.safetensors")
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, file, {"format": "pt"})
        other = fingerprint("minimax_h3", copy)
        assert [a == b for a, b in zip(known.split("+"), other.split("+"), strict=True)][changed] is False
    assert fingerprint("minimax_h3", copy).split("+")[2] == known.split("+")[2]


def test_what_is_not_minimax_h3_s_is_refused(tmp_path: Path, folder: Path) -> None:
    few = save_minimax_h3(tmp_path / "few", layers=49)
    with pytest.raises(DataError, match="few/text_encoder: has 49 layers, expected at least 50: it is not MiniMax-H3"):
        load(few)
    with pytest.raises(
        DataError, match="a/vae: encodes 13 frames at a time, model=minimax_h3 17; it is not MiniMax-H3"
    ):
        load(save_minimax_h3(tmp_path / "a", clip_length=13))
    with pytest.raises(DataError, match="a cell of its latents is 8x16x16 pixels, model=minimax_h3 has 4x16x16; it is"):
        load(save_minimax_h3(tmp_path / "b", temporal_downsample_factors=(2, 2, 2, 1, 1, 1)))
    with pytest.raises(
        DataError, match=r"frames is 24, expected 17 x k \+ 5 \(the VAE encodes 17 at a time\): use 22 or 39"
    ):
        MiniMaxH3Encoder.check(24, [])
    with pytest.raises(DataError, match="size is 48x64, expected sides that divide by 32, such as 64x64"):
        MiniMaxH3Encoder.check(22, [(48, 64)])
    with pytest.raises(DataError, match="model=minimax_h3 has no image-to-video encoder here"):
        MiniMaxH3Encoder.check_image_to_video()
