"""The HunyuanVideo-1.5 adapter against diffusers' model, pipeline and scheduler."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data.encoders import fingerprint, load_encoder
from data.encoders.base import EncoderSettings, to_video
from data.shards.sample import Sample, TextTokens
from data.shards.writer import ShardWriter
from radial import Dense
from tests.helpers.attention import step_attention
from tests.helpers.families import TEXT, Perfect, build, conditions, given_to_the_decoder, latents
from tests.helpers.tiny_models import save_hunyuan15
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.flow import noised
from train.lora.layers import inject_lora
from train.measures.euler import generate
from train.models.conditions import Conditions
from train.models.families.hunyuan15 import Hunyuan15Adapter
from train.preflight import preflight
from train.run import RunFolder, train
from train.storage.checkpoints import load_weights

TOKENS = (3, 4, 5)
GLYPHS = 6


def planned(adapter, latent):
    return step_attention(Dense(), adapter.grid(latent), block=16)


def texts(adapter, words, glyphs, seed=3):
    """Both texts with so many valid tokens of each sample, then garbage; together as long as the model's text."""
    torch.manual_seed(seed)
    config, found = adapter.transformer.config, {}
    for name, room, width, lengths in (
        ("text", TEXT - GLYPHS, config.text_embed_dim, words), ("glyphs", GLYPHS, config.text_embed_2_dim, glyphs),
    ):  # fmt: skip
        mask = torch.arange(room) < torch.tensor(lengths)[:, None]
        found[name] = TextTokens(torch.randn(len(lengths), room, width), mask)
    return Conditions(found)


def as_the_pipeline_calls(model, x, sigma, seen, image_tokens=5):
    """Zeros of an image, of given frames and of their mask; both texts padded, with a mask each."""
    text, glyphs = seen.text["text"], seen.text["glyphs"]
    given = torch.zeros(len(x), 5, *x.shape[2:])
    return model(
        torch.cat([x, given], dim=1), 1000 * sigma, text.tokens, text.mask.float(),
        encoder_hidden_states_2=glyphs.tokens, encoder_attention_mask_2=glyphs.mask.float(),
        image_embeds=torch.zeros(len(x), image_tokens, 8), return_dict=False,
    )[0]  # fmt: skip


def original():
    """The model as diffusers makes it: no adapter has touched it."""
    model = HunyuanVideo15Transformer3DModel(**Hunyuan15Adapter.tiny_config)
    model.load_state_dict(build("hunyuan15").transformer.state_dict())
    return model.eval()


def pipeline_of(vae, guidance):
    return HunyuanVideo15Pipeline(
        text_encoder=None, tokenizer=None, transformer=original(), text_encoder_2=None, tokenizer_2=None, vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=9.0), guider=ClassifierFreeGuidance(guidance_scale=guidance),
    )  # fmt: skip


@pytest.mark.parametrize("glyphs", [(6, 6), (0, 4), (0, 0)])
@pytest.mark.parametrize("words", [(14, 14), (4, 11), (1, 13)])
@torch.no_grad()
def test_prompts_of_any_length_equal_the_stock_model(words, glyphs):
    adapter, model = build("hunyuan15"), original()
    x, sigma, seen = latents(adapter, TOKENS), torch.tensor([0.2, 0.95]), texts(adapter, words, glyphs)
    expected = as_the_pipeline_calls(model, x, sigma, seen)
    adapter.set_attention(planned(adapter, x))
    got = adapter.velocity(x, sigma, seen)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    shorter = adapter.velocity(x, sigma, texts(adapter, [min(n, 3) for n in words], glyphs))
    assert (shorter - got).abs().max() > 1e-5 or max(words) <= 3
    if sum(glyphs):
        silent = adapter.velocity(x, sigma, dataclasses.replace(seen, text={"text": seen.text["text"]}))
        assert (silent - got).abs().max() > 1e-5


@torch.no_grad()
def test_captions_that_quote_nothing_need_no_glyphs():
    """A row behind the mask, as shards hold it, is the same as none."""
    adapter = build("hunyuan15")
    x, sigma, seen = latents(adapter, TOKENS), torch.tensor([0.2, 0.95]), texts(adapter, (5, 14), (0, 0))
    adapter.set_attention(planned(adapter, x))
    silent = dataclasses.replace(seen, text={"text": seen.text["text"]})
    torch.testing.assert_close(adapter.velocity(x, sigma, seen), adapter.velocity(x, sigma, silent), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_call_of_the_pipelines_has_no_image_tokens():
    """Its zeros of an image are left out before the layers, so that the text is as long as the layout says."""
    adapter, model = build("hunyuan15"), original()
    x, sigma, seen = latents(adapter, TOKENS), torch.tensor([0.2, 0.95]), texts(adapter, (5, 14), (0, 4))
    adapter.set_attention(planned(adapter, x))
    found = []
    adapter.layers()[0].register_forward_hook(lambda _, inputs, outputs: found.append(outputs[1].shape[1]))
    got = as_the_pipeline_calls(adapter.transformer, x, sigma, seen)
    torch.testing.assert_close(got, as_the_pipeline_calls(model, x, sigma, seen), rtol=0, atol=1e-5)
    assert found == [TEXT]


@torch.no_grad()
def test_sampling_is_the_stock_pipelines():
    """Noise levels, timesteps, both texts and their masks, direction and classifier-free guidance at once."""
    adapter = build("hunyuan15")
    noise = latents(adapter, TOKENS)
    seen, empty = texts(adapter, (3, 14), (0, 5)), texts(adapter, (2, 2), (0, 0), seed=4)
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)
    pipeline = pipeline_of(vae, guidance=6.0)
    pipeline.set_progress_bar_config(disable=True)
    given = {}
    for side, both in (("", seen), ("negative_", empty)):
        for number, name in (("", "text"), ("_2", "glyphs")):
            given[f"{side}prompt_embeds{number}"] = both.text[name].tokens
            given[f"{side}prompt_embeds_mask{number}"] = both.text[name].mask.float()
    expected = pipeline(
        height=noise.shape[3] * 16, width=noise.shape[4] * 16, num_frames=4 * noise.shape[2] - 3, latents=noise,
        num_inference_steps=3, output_type="latent", return_dict=False, **given,
    )[0]  # fmt: skip
    got = generate(adapter, noise, seen, empty, lambda _: planned(adapter, noise), steps=3, shift=9.0, guidance=6.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # three steps' rounding, times the guidance


def test_an_euler_step_of_the_stock_scheduler_returns_the_clean_latent():
    adapter = build("hunyuan15")
    clean = latents(adapter, TOKENS)
    noise = torch.randn(clean.shape)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=9.0)
    scheduler.set_timesteps(sigmas=[0.7])
    x, target = noised(clean, noise, scheduler.sigmas[:1].expand(2))
    perfect = Perfect(adapter, noise - clean)
    velocity = adapter.velocity(x, scheduler.sigmas[:1].expand(2), conditions(adapter, clean))
    torch.testing.assert_close(velocity, target)
    torch.testing.assert_close(perfect.told["timestep"], scheduler.timesteps.expand(2))
    assert torch.equal(perfect.told["hidden_states"][:, :4], x)
    assert not perfect.told["hidden_states"][:, 4:].any()
    back = scheduler.step(perfect.output, scheduler.timesteps[0], x, return_dict=False)[0]
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-5)


@torch.no_grad()
def test_timesteps_are_not_rounded_to_the_weights_precision():
    """The class rounds them to its input's, bf16, which has 996 for 994.1: the adapter gives them in float32."""
    adapter = build("hunyuan15")
    adapter.transformer.to(torch.bfloat16)
    x, seen = latents(adapter, TOKENS), texts(adapter, (5, 14), (0, 4))
    adapter.set_attention(planned(adapter, x))
    near, far = (adapter.velocity(x, torch.full((2,), sigma), seen) for sigma in (0.9941, 0.9959))
    assert torch.tensor([994.1, 995.9]).to(torch.bfloat16).unique().numel() == 1
    assert (near - far).abs().max() > 0


def test_the_last_blocks_text_gets_no_lora():
    adapter = build("hunyuan15")
    names = inject_lora(adapter.transformer, 4, 4, adapter.targets(text=True), seed=0)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    expected = {f"transformer_blocks.{n}.attn.{layer}" for n in range(3) for layer in layers}
    assert set(names) == expected - {f"transformer_blocks.2.attn.{layer}" for layer in ("to_add_out", "add_q_proj")}


@pytest.mark.parametrize(
    ("change", "found"),
    [({"use_meanflow": True}, "use_meanflow=True"), ({"in_channels": 4}, "4 channels in and 4 out")],
)
def test_other_models_of_the_class_are_refused(change, found):
    model = HunyuanVideo15Transformer3DModel(**{**Hunyuan15Adapter.tiny_config, **change})
    with pytest.raises(UserError, match=f"{found}.*text- or image-to-video weights"):
        Hunyuan15Adapter(model, TEXT)


def test_other_shards_are_refused():
    adapter = build("hunyuan15")
    x, seen = latents(adapter, TOKENS), texts(adapter, (5, 14), (0, 4))
    adapter.check(x, seen)
    wide = TextTokens(torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(UserError, match=r"text glyphs is \(tokens, width\) \(3, 8\), the model takes a width of 12"):
        adapter.check(x, dataclasses.replace(seen, text={**seen.text, "glyphs": wide}))
    long = TextTokens(torch.zeros(2, 15, 24), torch.ones(2, 15, dtype=torch.bool))
    with pytest.raises(
        UserError, match="has 15 tokens and 6 of glyphs and image, model.text_tokens is 20 for all of them"
    ):
        adapter.velocity(x, torch.ones(2), dataclasses.replace(seen, text={**seen.text, "text": long}))


@torch.no_grad()
def test_the_encoders_latents_are_normalised_as_the_pipeline_undoes_it(tmp_path):
    cpu = torch.device("cpu")
    encoder = load_encoder("hunyuan15", EncoderSettings(save_hunyuan15(tmp_path), cpu, torch.float32, torch.float32))
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    mode = encoder.vae.encode(to_video(frames, cpu, torch.float32)).latent_dist.mode()
    pipeline = pipeline_of(encoder.vae, guidance=1.0)
    text = {"prompt_embeds": torch.zeros(1, 4, 24), "prompt_embeds_mask": torch.ones(1, 4)}
    text |= {"prompt_embeds_2": torch.zeros(1, 2, 12), "prompt_embeds_mask_2": torch.zeros(1, 2)}
    got = given_to_the_decoder(pipeline, encoder.encode(frames), height=32, width=48, num_frames=9, **text)
    torch.testing.assert_close(got, mode, rtol=1e-2, atol=1e-4)  # shards hold bfloat16
    assert encoder.vae.config.scaling_factor != 1


@torch.no_grad()
def test_image_to_video_equals_the_stock_model():
    """Called as its pipeline calls it: the first frame's latent and a mask of it, and the image before the texts."""
    config = {**Hunyuan15Adapter.tiny_config, "task_type": "i2v"}
    model = HunyuanVideo15Transformer3DModel(**config)
    model.load_state_dict(build("hunyuan15").transformer.state_dict())
    adapter = Hunyuan15Adapter(HunyuanVideo15Transformer3DModel(**config), 729 + TEXT)
    adapter.transformer.load_state_dict(model.state_dict())
    x, sigma, seen = latents(adapter, TOKENS), torch.tensor([0.2, 0.95]), texts(adapter, (5, 14), (0, 4))
    drawn = adapter.random_conditions(x)
    assert drawn.text["text"].tokens.shape[1] == TEXT and drawn.image["vision"].shape == (2, 729, 8)
    short = Hunyuan15Adapter(HunyuanVideo15Transformer3DModel(**config), 729)
    with pytest.raises(UserError, match="model.text_tokens is 729, expected more than 729: image-to-video's image"):
        short.random_conditions(x)
    given = torch.zeros(2, 5, *x.shape[2:])
    given[:, :4, 0], given[:, 4, 0] = drawn.image["condition"][:, :, 0], 1
    text, glyphs = seen.text["text"], seen.text["glyphs"]
    expected = model(
        torch.cat([x, given], dim=1), 1000 * sigma, text.tokens, text.mask.float(),
        encoder_hidden_states_2=glyphs.tokens, encoder_attention_mask_2=glyphs.mask.float(),
        image_embeds=drawn.image["vision"], return_dict=False,
    )[0]  # fmt: skip
    adapter.set_attention(planned(adapter, x))
    got = adapter.velocity(x, sigma, dataclasses.replace(seen, image=drawn.image))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    adapter.check(x, dataclasses.replace(seen, image=drawn.image))
    with pytest.raises(UserError, match="the shards hold image .*make them with python -m data.prepare --image-to-vid"):
        adapter.velocity(x, sigma, seen)


def test_image_to_videos_flops_are_those_that_torch_counts():
    config = {**Hunyuan15Adapter.tiny_config, "task_type": "i2v"}
    adapter = Hunyuan15Adapter(HunyuanVideo15Transformer3DModel(**config), 729 + TEXT)
    for layer in adapter.layers():
        layer.attn.processor = HunyuanVideo15AttnProcessor2_0()
    x = latents(adapter, (24, 8, 8), 1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        adapter.velocity(x, torch.tensor([0.5]), adapter.random_conditions(x))
    attention = planned(adapter, x).attention_flops(*adapter.attention_shape)
    assert adapter.linear_flops(adapter.grid(x)) + attention == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_run_on_shards_of_the_encoder(tmp_path, task):
    """Captions that quote something and one that does not, some of them dropped; a first frame."""
    image, cpu = task == "i2v", torch.device("cpu")
    folder = save_hunyuan15(tmp_path / "model", image=image)
    widths = {"text_embed_dim": 32, "text_embed_2_dim": 24, "image_embed_dim": 16}
    config = {**Hunyuan15Adapter.tiny_config, **widths, "task_type": task}
    HunyuanVideo15Transformer3DModel(**config).save_pretrained(folder / "transformer")
    encoder = load_encoder(
        "hunyuan15", EncoderSettings(folder, cpu, torch.float32, torch.float32, image_to_video=image)
    )
    about = {"fps": 24.0, "latent": "", "text": "", "arguments": {}}
    about["encoder"] = fingerprint("hunyuan15", folder, image_to_video=image)
    with ShardWriter(tmp_path / "shards", empty_prompt=encoder.prompt(""), **about) as writer:
        for row, caption in enumerate(('a red "ball" moving', "a red ball", 'the "a" and the “bar”', "a clip")):
            frames = np.random.default_rng(row).integers(0, 256, (9, 64, 96, 3), dtype=np.uint8)
            prompt, seen = encoder.prompt(caption), encoder.image(frames) if image else {}
            latent = encoder.encode(frames)
            writer.write(Sample(f"clip-{row}", latent, prompt.text, prompt.pooled, seen, {"caption": caption}))
    settings = {
        "conf": "hunyuan15_2x", "model": "hunyuan15_i2v" if image else "hunyuan15", "model.dimensions": "null",
        "model.path": folder, "data.shards": tmp_path / "shards", "data.workers": 0, "runs": tmp_path / "runs",
        "clip.frames": 9, "clip.height": 64, "clip.width": 96, "attention.block": 16, "attention.dense_layers": 1,
        "lora.rank": 4, "lora.text": True, "objective.caption_dropout": 0.5, "trainer.steps": 2,
        "trainer.checkpoint_every": 2, "trainer.devices": 1, "trainer.compile": False, "parallel.sequence": 1,
        "parallel.activations": "full", "optim.global_batch": 2, "data.batch_size": 2, "report.clips": 0,
        "log.wandb": "disabled",
    }  # fmt: skip
    run = finish(compose_run({key: str(value) for key, value in settings.items()}))
    preflight(run)
    place = RunFolder.create(run)
    train(run, place)
    trained = load_weights(place.path / "checkpoints" / "step-000002")
    assert len(trained) == 2 * (3 * 8 - 2) and all(tensor.abs().max() > 0 for tensor in trained.values())
