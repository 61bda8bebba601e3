"""The HunyuanVideo adapter against diffusers' model, pipeline and scheduler."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

from data.encoders import load_encoder
from data.encoders.base import EncoderSettings, to_video
from data.shards.batch import Batch
from data.shards.sample import Prompt, TextTokens
from radial import Dense
from tests.helpers.attention import step_attention
from tests.helpers.families import TEXT, Perfect, build, conditions, given_to_the_decoder, latents, stock
from tests.helpers.tiny_models import save_hunyuan
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.flow import noised
from train.lora.layers import inject_lora
from train.measures.euler import generate
from train.models.conditions import Conditions
from train.models.families.hunyuan import HunyuanAdapter
from train.step.clip_recipe import Recipes
from train.step.module import LengthExtensionModule
from train.step.objective import Objective
from train.step.optimizer import Optimization

TOKENS = (3, 4, 5)
CPU = torch.device("cpu")


def planned(adapter, latent, backend=None):
    return step_attention(Dense(), adapter.grid(latent), block=16, backend=backend)


@pytest.mark.parametrize("lengths", [(20, 20), (4, 16), (1, 13)])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
@torch.no_grad()
def test_prompts_of_any_length_equal_the_stock_model(lengths, guidance):
    """Called as the pipeline calls it: padded prompts with their mask, pooled CLIP, guidance times 1000."""
    adapter, model = build("hunyuan"), stock("hunyuan").transformer
    x = latents(adapter, TOKENS)
    sigma = torch.tensor([0.2, 0.95])
    drawn = adapter.random_conditions(x)
    mask = torch.arange(TEXT) < torch.tensor(lengths)[:, None]
    tokens = drawn.text["text"].tokens * mask[..., None]
    pooled = drawn.pooled["clip"]
    told = torch.full((2,), 1000 * guidance)
    expected = model(x, 1000 * sigma, tokens, mask.float(), pooled, told, return_dict=False)[0]
    seen = Conditions({"text": TextTokens(tokens, mask)}, {"clip": pooled}, guidance=guidance)
    adapter.set_attention(planned(adapter, x))
    torch.testing.assert_close(adapter.velocity(x, sigma, seen), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_sampling_is_the_stock_pipelines():
    """Noise levels, timesteps, guidance input, text masks and direction at once."""
    adapter = build("hunyuan")
    noise = latents(adapter, TOKENS)
    seen = dataclasses.replace(conditions(adapter, noise), guidance=6.0)
    text = seen.text["text"]
    pipeline = HunyuanVideoPipeline(
        None, None, stock("hunyuan").transformer, None, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        height=noise.shape[3] * 8, width=noise.shape[4] * 8, num_frames=4 * noise.shape[2] - 3, latents=noise,
        num_inference_steps=3, guidance_scale=6.0, prompt_embeds=text.tokens, prompt_attention_mask=text.mask,
        pooled_prompt_embeds=seen.pooled["clip"], output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    got = generate(adapter, noise, seen, None, lambda _: planned(adapter, noise), steps=3, shift=7.0, guidance=1.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # three steps' rounding


def test_an_euler_step_of_the_stock_scheduler_returns_the_clean_latent():
    adapter = build("hunyuan")
    clean = latents(adapter, TOKENS)
    noise = torch.randn(clean.shape)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=[0.7])
    x, target = noised(clean, noise, scheduler.sigmas[:1].expand(2))
    perfect = Perfect(adapter, noise - clean)
    velocity = adapter.velocity(x, scheduler.sigmas[:1].expand(2), conditions(adapter, clean))
    torch.testing.assert_close(velocity, target)
    torch.testing.assert_close(perfect.told["timestep"], scheduler.timesteps.expand(2))
    assert perfect.told["guidance"].tolist() == [1000, 1000]
    back = scheduler.step(perfect.output, scheduler.timesteps[0], x, return_dict=False)[0]
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-5)


def test_the_single_blocks_o_projection_is_in_proj_out():
    adapter = build("hunyuan")
    names = inject_lora(adapter.transformer, 4, 4, adapter.targets(text=True), seed=0)
    double = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    assert set(names) == {
        *(f"transformer_blocks.{n}.attn.{layer}" for n in range(2) for layer in double),
        *(f"single_transformer_blocks.{n}.attn.{layer}" for n in range(2) for layer in ("to_q", "to_k", "to_v")),
        *(f"single_transformer_blocks.{n}.proj_out" for n in range(2)),
    }
    assert build("hunyuan").layers()[2].proj_out.in_features == 64 + 128  # attention's output and the MLP's middle


def test_a_model_without_guidance_is_told_none():
    config = {**HunyuanAdapter.tiny_config, "guidance_embeds": False}
    adapter = HunyuanAdapter.from_config(config, text_tokens=TEXT)
    x = latents(adapter, TOKENS)
    adapter.set_attention(planned(adapter, x))
    assert adapter.velocity(x, torch.tensor([0.3, 0.9]), conditions(adapter, x)).isfinite().all()
    perfect = Perfect(adapter, x)
    adapter.velocity(x, torch.tensor([0.3, 0.9]), conditions(adapter, x))
    assert perfect.told["guidance"] is None


def test_image_to_video_weights_and_other_shards_are_refused():
    config = {**HunyuanAdapter.tiny_config, "image_condition_type": "token_replace"}
    with pytest.raises(UserError, match="image_condition_type=token_replace.*expected text-to-video weights"):
        HunyuanAdapter(HunyuanVideoTransformer3DModel(**config), TEXT)
    adapter = build("hunyuan")
    x = latents(adapter, TOKENS)
    with pytest.raises(UserError, match=r"the shards hold pooled \[\], expected 'clip'"):
        adapter.velocity(x, torch.ones(2), Conditions(conditions(adapter, x).text))


def test_a_dropped_caption_takes_the_empty_prompts_pooled_vector_along():
    adapter = build("hunyuan")
    latent = latents(adapter, TOKENS)
    seen = conditions(adapter, latent)
    batch = Batch(latent, dict(seen.text), dict(seen.pooled), {}, ["a", "b"], 0)
    empty = Prompt({"text": TextTokens(torch.ones(2, 24), torch.ones(2, dtype=torch.bool))}, {"clip": torch.ones(12)})
    recipes = Recipes(finish(compose_run({"conf": "hunyuan_4x", "attention": "dense", "objective.shift": "1"})))
    dropped = Objective(0, empty, caption_dropout=1.0, guidance=2.0)
    module = LengthExtensionModule(
        adapter, recipes=recipes, objective=dropped, optimization=Optimization(steps=1), seed=0, lora=True
    )
    perfect = Perfect(adapter, latent)
    module.training_step(batch, 0)
    assert torch.equal(perfect.told["pooled_projections"], torch.ones(2, 12))
    assert perfect.told["encoder_attention_mask"].sum(1).tolist() == [2, 2]
    assert torch.equal(perfect.told["encoder_hidden_states"][:, :2], torch.ones(2, 2, 24))
    assert perfect.told["guidance"].tolist() == [2000, 2000]
    module.objective = replace(dropped, caption_dropout=0.0)
    module.training_step(batch, 0)
    assert torch.equal(perfect.told["pooled_projections"], seen.pooled["clip"])


@torch.no_grad()
def test_the_encoders_latents_are_normalised_as_the_pipeline_undoes_it(tmp_path):
    encoder = load_encoder("hunyuan", EncoderSettings(save_hunyuan(tmp_path), CPU, torch.float32, torch.float32))
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    mode = encoder.vae.encode(to_video(frames, CPU, torch.float32)).latent_dist.mode()
    pipeline = HunyuanVideoPipeline(
        None, None, build("hunyuan").transformer, encoder.vae, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None
    )
    text = {"prompt_embeds": torch.zeros(1, 4, 24), "prompt_attention_mask": torch.ones(1, 4)}
    size = {"height": 32, "width": 48, "num_frames": 9, "pooled_prompt_embeds": torch.zeros(1, 12)}
    got = given_to_the_decoder(pipeline, encoder.encode(frames), **text, **size)
    torch.testing.assert_close(got, mode, rtol=1e-2, atol=1e-4)  # shards hold bfloat16
    assert encoder.vae.config.scaling_factor != 1
