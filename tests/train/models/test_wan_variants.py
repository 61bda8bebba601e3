"""Every model of Wan: its adapter against diffusers' class and pipelines, called as those call it."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from data.encoders import load_encoder
from data.encoders.base import EncoderSettings
from data.shards.batch import collate
from data.shards.sample import Sample, TextTokens
from radial import Dense, Released
from tests.helpers import wan_ranks
from tests.helpers import wan_variants as wan
from tests.helpers.attention import step_attention
from tests.helpers.families import Perfect
from tests.helpers.oracles import attend_exactly
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_models import save_wan, save_wan_5b
from train.errors import UserError
from train.lora.layers import inject_lora
from train.measures.euler import generate
from train.models.conditions import Conditions
from train.models.families.wan import WanAdapter


def ready(adapter, variant, pattern=None, tokens=wan.TOKENS, **settings):
    x, sigma, seen = wan.batch(adapter, variant, tokens=tokens)
    adapter.set_attention(step_attention(pattern or Dense(), adapter.grid(x), block=16, **settings))
    return x, sigma, seen


def moved(adapter, variant, out):
    """Our output without the frames that are given, where the pipeline's is not used."""
    return out[:, :, 1:] if variant == "5b_first" else out


@pytest.mark.parametrize("length", [1, 7, 512])
@pytest.mark.parametrize("variant", wan.VARIANTS)
@torch.no_grad()
def test_dense_equals_the_stock_model(variant, length):
    adapter = wan.adapter_of(variant)
    x, sigma, seen = ready(adapter, variant)
    words = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(9))
    seen = dataclasses.replace(seen, text={"text": TextTokens(words, torch.ones(2, length, dtype=torch.bool))})
    x = x + torch.randn_like(x)
    got = adapter.velocity(x, sigma, seen)
    assert got.shape == x.shape and got.dtype == torch.float32
    expected = wan.as_the_pipeline(wan.model(variant), variant, x, sigma, seen)
    torch.testing.assert_close(*(moved(adapter, variant, out) for out in (got, expected)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", wan.VARIANTS)
def test_lora_gradients_equal_the_stock_models_with_peft(variant):
    adapter, stock = wan.adapter_of(variant), wan.model(variant)
    names = inject_lora(adapter.transformer, 4, 8, adapter.targets(text=False), seed=3)
    assert len(names) == 4 * 2 and all(".attn1." in name for name in names)
    stock.requires_grad_(False)
    stock.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=WanAdapter.lora_targets))
    gradients = []
    for model, run in (
        (adapter.transformer, adapter.velocity),
        (stock, lambda *batch: wan.as_the_pipeline(stock, variant, *batch)),
    ):
        torch.manual_seed(4)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        x, sigma, seen = ready(adapter, variant)
        moved(adapter, variant, run(x + 1, sigma, seen)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * len(names)
    for name, expected in gradients[1].items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", wan.VARIANTS)
@torch.no_grad()
def test_released_equals_a_masked_softmax_model(variant):
    adapter = wan.adapter_of(variant)
    x, sigma, seen = ready(adapter, variant, Released(), (12, 8, 8), dense_layers=1)
    got = adapter.velocity(x, sigma, seen)
    attend_exactly(adapter)
    torch.testing.assert_close(got, adapter.velocity(x, sigma, seen), rtol=0, atol=1e-5)
    dense = wan.adapter_of(variant)
    assert (got - dense.velocity(*ready(dense, variant, tokens=(12, 8, 8)))).abs().max() > 1e-4


@pytest.mark.parametrize("variant", ["i2v", "5b_first", "experts"])
def test_sequence_parallel_gradients_are_the_single_processs(variant):
    """45 tokens on 2 ranks; the 5B's timesteps, one a token, are shared with them."""
    ranks = run_ranks(2, wan_ranks.gradients, variant, 2)
    expected = wan_ranks.gradients(variant, 1)
    idle = 0
    for got in ranks:
        np.testing.assert_allclose(got["loss"], expected["loss"], rtol=2e-5)
        for name, gradient in expected["gradients"].items():
            if gradient is None:
                assert got["gradients"][name] is None and name.startswith("transformer.")
                idle += 1
                continue
            scale = gradient.abs().max().item()
            assert scale > 0
            np.testing.assert_allclose(got["gradients"][name], gradient, rtol=1e-4, atol=1e-4 * scale, err_msg=name)
    assert idle == (2 * 2 * 4 * 2 if variant == "experts" else 0)


def pipelines(folder, variant, scheduler):
    """The pipeline of a tiny folder, with our tiny transformers, and the encoder that makes shards for it."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    image = variant.startswith("i2v")
    save_wan_5b(folder) if variant.startswith("5b") else save_wan(folder, image=variant == "i2v")
    settings = EncoderSettings(folder, torch.device("cpu"), torch.float32, torch.float32, image_to_video=image)
    encoder: Any = load_encoder("wan22_5b" if variant.startswith("5b") else "wan", settings)
    shared = {"tokenizer": encoder.pipeline.tokenizer, "text_encoder": encoder.pipeline.text_encoder}
    shared |= {"vae": encoder.vae, "scheduler": scheduler, "transformer": wan.model(_kind(variant))}
    if variant == "experts":
        shared |= {"transformer_2": wan.model("t2v", 1), "boundary_ratio": wan.BOUNDARY}
    if variant.startswith("5b"):
        shared["expand_timesteps"] = True
    if image or variant == "5b_first":
        parts = {"image_encoder": encoder.images.image_encoder} if variant == "i2v" else {}
        parts |= {"image_processor": encoder.images.image_processor} if variant == "i2v" else {}
        return WanImageToVideoPipeline(**shared, **parts), encoder
    return WanPipeline(**shared), encoder


def _kind(variant):
    return "t2v" if variant == "experts" else variant


@pytest.mark.parametrize("variant", [*wan.VARIANTS, "experts"])
def test_sampling_from_shards_equals_the_pipeline(tmp_path, monkeypatch, variant):
    """The whole way: a clip through our encoder, its sample in a batch, four guided Euler steps, to the latent."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Euler(FlowMatchEulerDiscreteScheduler):
        """On the noise levels of the pipelines' own sampler, which takes other steps between them."""

        def set_timesteps(self, steps, device=None):
            super().set_timesteps(sigmas=wan.adapter_of(variant).noise_levels(steps, 5.0), device=device)

    monkeypatch.setattr("data.encoders.wan.stored", lambda tensor: tensor.detach().float())  # shards round to bf16
    pipeline, encoder = pipelines(tmp_path, variant, Euler())
    pipeline.set_progress_bar_config(disable=True)
    height, width = (64, 96) if variant.startswith("5b") else (32, 48)
    frames = np.random.default_rng(0).integers(0, 256, (9, height, width, 3), dtype=np.uint8)
    latent, prompt, empty = encoder.encode(frames), encoder.prompt("a red ball"), encoder.prompt("")
    image = encoder.image(frames) if variant.startswith("i2v") else {}
    if variant == "5b_first":
        image = {"first_frame": latent[:, :1]}
    batches = [collate([Sample("k", latent, p.text, {}, image, {"caption": ""})], 0) for p in (prompt, empty)]
    adapter = wan.adapter_of(variant)
    noise = torch.randn(1, *latent.shape, generator=torch.Generator().manual_seed(1))
    got = generate(
        adapter,
        noise,
        *(Conditions.of(batch) for batch in batches),
        lambda sigma: step_attention(Dense(), adapter.grid(noise), block=16),
        steps=4,
        shift=5.0,
        guidance=3.0,
    )
    first = {"image": Image.fromarray(frames[0])} if image else {}
    expected = pipeline(
        prompt="a red ball", negative_prompt="", height=height, width=width, num_frames=9, num_inference_steps=4,
        guidance_scale=3.0, latents=noise, output_type="latent", **first,
    ).frames  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - noise).abs().max() > 0.1


@pytest.mark.parametrize("variant", wan.VARIANTS)
def test_an_euler_step_with_the_true_velocity_returns_the_clean_latent(variant):
    """Each model's own scheduler: from our noised latent to the clean one; a given frame needs no model for it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from train.flow import noised

    scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    adapter = wan.adapter_of(variant)
    latent, _, seen = ready(adapter, variant)
    sigma, noise = scheduler.sigmas[2].expand(2), torch.randn(latent.shape)
    x, target = noised(latent, noise, sigma)
    perfect = Perfect(adapter, noise - latent)
    velocity = adapter.velocity(x, sigma, seen)
    torch.testing.assert_close(velocity, target, rtol=0, atol=1e-5)
    expected = scheduler.timesteps[2].expand(2)
    given = adapter.given_frames(seen)
    assert given == (variant == "5b_first")
    if given:
        tokens = adapter.grid(x).tokens_per_frame
        expected = expected[:, None].repeat(1, adapter.grid(x).tokens)
        expected[:, :tokens] = 0
        assert torch.equal(perfect.told["hidden_states"][:, :, :1], latent[:, :, :1])
    torch.testing.assert_close(perfect.told["timestep"], expected)
    assert torch.equal(perfect.told["hidden_states"][:, : x.shape[1], given:], x[:, :, given:])
    scheduler.sigmas[3] = 0
    clean = scheduler.step(velocity, scheduler.timesteps[2], x, return_dict=False)[0]
    torch.testing.assert_close(clean, latent, rtol=0, atol=1e-5)


def test_models_of_the_class_that_are_none_of_these_are_refused():
    for change, message in (
        ({"in_channels": 17}, "takes 17 channels and gives 16: expected Wan's text-to-video, or image-to-video"),
        ({"in_channels": 48}, "takes 48 channels and gives 16: .*, which takes twice the channels that it gives and 4"),
        ({"in_channels": 32}, "takes 32 channels and gives 16: "),
        ({"in_channels": 36, "image_dim": 32, "pos_embed_seq_len": 514}, "from first and last frames"),
    ):
        with pytest.raises(UserError, match=message):
            WanAdapter.from_config({**wan.BASE, **change}, text_tokens=512)
    with pytest.raises(UserError, match="model.text_tokens is 32, image cross-attention needs 512"):
        WanAdapter.from_config(wan.CONFIGS["i2v"], text_tokens=32)
