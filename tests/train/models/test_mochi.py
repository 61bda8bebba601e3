"""The Mochi-1 adapter against diffusers' model, pipeline and scheduler."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

from data.encoders import load_encoder
from data.encoders.base import EncoderSettings, to_video
from data.shards.sample import TextTokens
from radial import Dense
from tests.helpers.attention import step_attention
from tests.helpers.families import TEXT, Perfect, build, conditions, given_to_the_decoder, latents, stock
from train.flow import noised
from train.lora.layers import inject_lora
from train.measures.euler import generate
from train.models.conditions import Conditions
from train.sample.denoise import noise_level

TOKENS = (3, 4, 5)
CPU = torch.device("cpu")


def planned(adapter, latent):
    return step_attention(Dense(), adapter.grid(latent), block=16)


@pytest.mark.parametrize("lengths", [(20, 20), (4, 16), (0, 13)])
@torch.no_grad()
def test_prompts_of_any_length_equal_the_stock_model(lengths):
    """The empty prompt too, which some checkpoints zero and mask out whole. Mochi predicts x0 - eps at 1 - sigma."""
    adapter, model = build("mochi"), stock("mochi").transformer
    x = latents(adapter, TOKENS)
    sigma = torch.tensor([0.2, 0.95])
    mask = torch.arange(TEXT) < torch.tensor(lengths)[:, None]
    tokens = adapter.random_conditions(x).text["text"].tokens
    expected = -model(x, tokens, 1000 * (1 - sigma), mask, return_dict=False)[0]
    adapter.set_attention(planned(adapter, x))
    got = adapter.velocity(x, sigma, Conditions({"text": TextTokens(tokens, mask)}))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_sampling_is_the_stock_pipelines():
    """Noise levels, reversed time, text masks, direction and classifier-free guidance at once."""
    adapter = build("mochi")
    noise = latents(adapter, TOKENS)
    seen = conditions(adapter, noise)
    text, nothing = seen.text["text"], torch.zeros(2, TEXT, dtype=torch.bool)
    empty = Conditions({"text": TextTokens(torch.zeros_like(text.tokens), nothing)})
    # as in the model's scheduler_config.json
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipeline = MochiPipeline(scheduler, None, None, None, stock("mochi").transformer)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        height=noise.shape[3] * 8, width=noise.shape[4] * 8, num_frames=6 * noise.shape[2] - 5, latents=noise,
        num_inference_steps=4, guidance_scale=3.0, prompt_embeds=text.tokens, prompt_attention_mask=text.mask,
        negative_prompt_embeds=empty.text["text"].tokens, negative_prompt_attention_mask=nothing,
        output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    got = generate(adapter, noise, seen, empty, lambda _: planned(adapter, noise), steps=4, shift=1.0, guidance=3.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 7, 64])
def test_the_noise_levels_are_the_pipelines(steps):
    adapter, levels = build("mochi"), linear_quadratic_schedule(steps, 0.025)
    assert adapter.noise_levels(steps, 1.0) == pytest.approx(levels)
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(sigmas=np.array(levels))
    # a step's attention follows its noise level, which the scheduler counts from noise to data
    assert [noise_level(scheduler, step) for step in range(steps)] == pytest.approx(levels, abs=1e-6)


def test_an_euler_step_of_the_stock_scheduler_returns_the_clean_latent():
    adapter = build("mochi")
    clean = latents(adapter, TOKENS)
    noise = torch.randn(clean.shape)
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(sigmas=np.array([0.7]))
    level = 1 - scheduler.sigmas[:1].expand(2)  # it counts from noise to data
    x, target = noised(clean, noise, level)
    perfect = Perfect(adapter, clean - noise)
    velocity = adapter.velocity(x, level, conditions(adapter, clean))
    torch.testing.assert_close(velocity, target)
    torch.testing.assert_close(perfect.told["timestep"], scheduler.timesteps.expand(2))
    back = scheduler.step(perfect.output, scheduler.timesteps[0], x, return_dict=False)[0]
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-5)


def test_the_last_block_has_no_text_output():
    adapter = build("mochi")
    names = inject_lora(adapter.transformer, 4, 4, adapter.targets(text=True), seed=0)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    expected = {f"transformer_blocks.{n}.attn1.{layer}" for n in range(3) for layer in layers}
    assert set(names) == expected - {f"transformer_blocks.2.attn1.{layer}" for layer in ("to_add_out", "add_q_proj")}


@torch.no_grad()
def test_the_encoders_latents_are_normalised_as_the_pipeline_undoes_it(tmp_path):
    mean, std = torch.linspace(-0.3, 0.4, 12).tolist(), torch.linspace(0.6, 1.4, 12).tolist()
    torch.manual_seed(0)
    AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5, latents_mean=mean, latents_std=std, scaling_factor=0.8,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    encoder = load_encoder("mochi", EncoderSettings(tmp_path, CPU, torch.float32, torch.float32, vae_only=True))
    frames = np.random.default_rng(0).integers(0, 256, (13, 32, 48, 3), dtype=np.uint8)
    mode = encoder.vae.encode(to_video(frames, CPU, torch.float32)).latent_dist.mode()
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipeline = MochiPipeline(scheduler, encoder.vae, None, None, build("mochi").transformer)
    text = {"prompt_embeds": torch.zeros(1, 4, 32), "prompt_attention_mask": torch.ones(1, 4, dtype=torch.bool)}
    size = {"height": 32, "width": 48, "num_frames": 13, "guidance_scale": 1.0}
    got = given_to_the_decoder(pipeline, encoder.encode(frames), **text, **size)
    torch.testing.assert_close(got, mode, rtol=1e-2, atol=1e-2)  # shards hold bfloat16
