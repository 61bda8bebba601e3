"""The MiniMax-H3 adapter against diffusers' model, pipeline and scheduler."""

import dataclasses
import functools

import pytest
import torch
from diffusers import MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3 import before_denoise
from diffusers.modular_pipelines.minimax_h3.decoders import MiniMaxH3AfterDenoiseStep
from diffusers.modular_pipelines.minimax_h3.denoise import MiniMaxH3DenoiseStep
from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks

from data.prepare.__main__ import main as prepare
from data.shards.sample import TextTokens
from data.shards.stream import read_samples
from radial import Dense
from tests.helpers.attention import step_attention
from tests.helpers.families import TEXT, Perfect, build, conditions, latents, randomised
from tests.helpers.tiny_models import save_minimax_h3
from tests.helpers.videos import numbered, write_video
from train.__main__ import main
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.evaluate.settings import Job, Settings
from train.flow import noised
from train.lora.layers import inject_lora
from train.measures.euler import generate, sampled_with
from train.models.conditions import Conditions
from train.models.families.hunyuan import HunyuanAdapter
from train.models.families.minimax_h3 import MiniMaxH3Adapter
from train.models.loading import encoder_of, temporal_rope
from train.preflight import preflight
from train.run import RunFolder, train
from train.storage.checkpoints import load_weights
from train.storage.run_folder import write_config

TOKENS = (7, 4, 5)


def planned(adapter, latent):
    return step_attention(Dense(), adapter.grid(latent), block=16)


def texts(lengths, width=24):
    """So many valid tokens of each sample, then garbage."""
    torch.manual_seed(3)
    mask = torch.arange(TEXT) < torch.tensor(lengths)[:, None]
    return Conditions({"text": TextTokens(torch.randn(len(lengths), TEXT, width), mask)})


def original(**changes):
    """The model as diffusers makes it: no adapter has touched it."""
    torch.manual_seed(1)
    return randomised(MiniMaxH3Transformer3DModel(**{**MiniMaxH3Adapter.tiny_config, **changes}))


def as_the_pipeline_packs(model, x, sigma, words):
    """One sample, [text, video], at the pipeline's own positions."""
    layout = before_denoise.MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(len(words)), *x.shape[1:], 0, (1, 2, 2), audio_channels=2, audio_tag=2, video_tag=0
    )
    names = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
    rows = model(
        before_denoise.patchify_video_latents(x[None], (1, 2, 2))[None], torch.zeros(1, 0, 6), words[None],
        timestep=1 - sigma[None], timestep_indices=torch.zeros(len(layout[0]), dtype=torch.long), return_dict=False,
        **dict(zip(names, layout, strict=False)),
    )[0]  # fmt: skip
    frames, height, width = x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    return rows.view(frames, height, width, -1, 2, 2).permute(3, 0, 1, 4, 2, 5).reshape(x.shape)


@pytest.mark.parametrize("lengths", [(20, 20), (3, 11), (1, 19)])
@torch.no_grad()
def test_prompts_of_any_length_equal_the_stock_model(lengths):
    adapter, model = build("minimax_h3"), original()
    x, sigma, seen = latents(adapter, TOKENS), torch.tensor([0.2, 0.95]), texts(lengths)
    words = seen.text["text"].tokens
    expected = torch.stack([as_the_pipeline_packs(model, x[n], sigma[n], words[n, :m]) for n, m in enumerate(lengths)])
    adapter.set_attention(planned(adapter, x))
    got = adapter.velocity(x, sigma, seen)
    torch.testing.assert_close(got, -expected, rtol=0, atol=1e-5)
    turned = TextTokens(words[:, : min(lengths)].flip(1), torch.ones(2, min(lengths), dtype=torch.bool))
    other = adapter.velocity(x, sigma, dataclasses.replace(seen, text={"text": turned}))
    assert (other - got).abs().max() > 1e-5


@torch.no_grad()
def test_sampling_is_the_stock_pipelines(monkeypatch):
    """Noise levels, timesteps, direction, positions of five seconds; its blocks are told that there is no sound."""
    monkeypatch.setattr(before_denoise, "audio_latent_num_frames", lambda frames: 0)
    sizes = {"in_channels": 24, "audio_in_channels": 32}  # those of the blocks without VAEs
    adapter = MiniMaxH3Adapter(original(**sizes), TEXT)
    noise, seen = latents(adapter, (37, 1, 2), 1), texts((11,))
    blocks = {
        "layout": before_denoise.MiniMaxH3PrepareLayoutStep, "latents": before_denoise.MiniMaxH3PrepareLatentsStep,
        "timesteps": before_denoise.MiniMaxH3SetTimestepsStep, "denoise": MiniMaxH3DenoiseStep,
        "after": MiniMaxH3AfterDenoiseStep,
    }  # fmt: skip
    pipeline = SequentialPipelineBlocks.from_blocks_dict({name: cls() for name, cls in blocks.items()}).init_pipeline()
    pipeline.update_components(
        transformer=original(**sizes), scheduler=MiniMaxH3Scheduler(12.0), audio_scheduler=MiniMaxH3Scheduler(3.0)
    )
    expected = pipeline(
        prompt_embeds=seen.text["text"].tokens[:, :11], text_token_tags=torch.ones(11), num_frames=124, height=32,
        width=64, latents=noise, num_inference_steps=4, output="latents",
    )  # fmt: skip
    got = generate(adapter, noise, seen, None, lambda _: planned(adapter, noise), steps=3, shift=12.0, guidance=1.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_an_euler_step_of_the_stock_scheduler_returns_the_clean_latent():
    adapter = build("minimax_h3")
    clean = latents(adapter, TOKENS)
    noise = torch.randn(clean.shape)
    scheduler = MiniMaxH3Scheduler()
    scheduler.set_timesteps(sigmas=[0.7, 0.0])
    x, target = noised(clean, noise, scheduler.sigmas[:1].expand(2))
    perfect = Perfect(adapter, before_denoise.patchify_video_latents(clean - noise, (1, 2, 2))[None])
    adapter.set_attention(planned(adapter, x))
    velocity = adapter.velocity(x, scheduler.sigmas[:1].expand(2), conditions(adapter, clean))
    torch.testing.assert_close(velocity, target)
    torch.testing.assert_close(perfect.told["timestep"], scheduler.timesteps.expand(2))
    assert torch.equal(perfect.told["hidden_states"][0], before_denoise.patchify_video_latents(x, (1, 2, 2)))
    back = scheduler.step(-velocity, scheduler.timesteps[0], x, return_dict=False)[0]
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-5)


def test_interpolated_times_lie_where_training_had_them():
    adapter = build("minimax_h3")
    native, longer = latents(adapter, (102, 1, 1), 1), latents(adapter, (212, 1, 1), 1)
    model = finish(compose_run({"conf": "minimax_h3_2x", "rope": "interpolate"})).model
    told = {}
    for name, rope, x in (
        ("native", temporal_rope(model), native),
        ("longer", temporal_rope(model), longer),
        ("own", adapter.rope, longer),
    ):
        adapter.rope = rope
        perfect = Perfect(adapter, before_denoise.patchify_video_latents(x, (1, 2, 2))[None])
        adapter.velocity(x, torch.tensor([0.5]), conditions(adapter, x))
        told[name] = perfect.told["position_ids"][: x.shape[2], 0]
    assert told["native"][:7].tolist() == pytest.approx([t * 5 / 3 for t in (0, 1, 5, 9, 13, 17, 18)])
    assert told["own"][-1] == pytest.approx(715 * 5 / 3)  # the frame that the last latent frame begins with
    assert torch.equal(told["own"][:102], told["native"])
    assert told["longer"][-1] == told["native"][-1]
    assert (told["longer"].diff() > 0).all()


def test_the_texts_own_blocks_get_no_lora():
    adapter = build("minimax_h3")
    names = inject_lora(adapter.transformer, 4, 4, adapter.targets(text=False), seed=0)
    layers = ("to_q", "to_k", "to_v", "to_out.0")
    assert set(names) == {f"transformer_blocks.{n}.attn.{layer}" for n in range(3) for layer in layers}


def test_a_family_without_an_encoder_is_refused(monkeypatch):
    monkeypatch.setattr(MiniMaxH3Adapter, "encoder", "another")
    with pytest.raises(UserError, match="model.family is minimax_h3, for which data.prepare has no encoder: .* wan,"):
        encoder_of(finish(compose_run({"conf": "minimax_h3_2x"})).model)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Those of a run whose shards come from videos of two sizes and lengths; its validation shows a prompt's clip."""
    tmp_path = tmp_path_factory.mktemp("minimax_h3")
    folder = save_minimax_h3(tmp_path / "model")
    original().save_pretrained(folder / "transformer")
    for row, caption in enumerate(("a red ball", "a clip of the moving ball", "the video")):
        picture = functools.partial(numbered, height=96, width=128) if row else numbered
        write_video(tmp_path / "videos" / f"{row}.mp4", 39 + row, fps=24, height=96 if row else 64,
                    width=128 if row else 96, picture=picture, caption=caption)  # fmt: skip
    shards = tmp_path / "shards"
    command = ["model=minimax_h3", f"weights={folder}", "frames=39", "size=32x64", "workers=1", "cuts=keep"]
    assert prepare([f"source={tmp_path / 'videos'}", f"out={shards}", *command]) == 0
    samples = {sample.caption: sample for sample in read_samples(shards)}
    assert len(samples) == 3 and {sample.latent.shape for sample in samples.values()} == {(4, 12, 2, 4)}
    given = {
        "conf": "minimax_h3_2x", "model.dimensions": "null", "model.path": folder, "data.shards": shards,
        "data.workers": 0, "data.frames": 22, "runs": tmp_path / "runs", "clip.frames": 22, "clip.height": 32,
        "clip.width": 64, "attention.block": 16, "attention.dense_layers": 1, "lora.rank": 4, "trainer.steps": 2,
        "trainer.checkpoint_every": 2, "trainer.devices": 1, "trainer.compile": False, "parallel.sequence": 1,
        "parallel.activations": "full", "optim.global_batch": 2, "data.batch_size": 2, "report.clips": 0,
        "log.wandb": "disabled", "data.holdout": 1, "validation.every": 1, "validation.samples_every": 2,
        "validation.samples_steps": 2, "validation.prompts": "[a red ball]",
    }  # fmt: skip
    return {key: str(value) for key, value in given.items()}


def test_a_run_from_videos_to_an_exported_lora(settings):
    """The distilled guidance needs the empty prompt."""
    run = finish(compose_run(settings))
    preflight(run)
    place = RunFolder.create(run)
    train(run, place)
    trained = load_weights(place.path / "checkpoints" / "step-000002")
    assert len(trained) == 2 * 3 * 4 and all(tensor.abs().max() > 0 for tensor in trained.values())
    pair = {name: trained[f"transformer_blocks.1.attn.to_q.{name}.weight"] for name in ("lora_A", "lora_B")}
    model = original()
    before = model.transformer_blocks[1].attn.to_q.weight.clone()
    model.load_lora_adapter(place.path / "export" / "diffusers", weight_name="pytorch_lora_weights.safetensors")
    model.fuse_lora()
    change = model.transformer_blocks[1].attn.to_q.base_layer.weight - before
    expected = run.lora.alpha / run.lora.rank * pair["lora_B"] @ pair["lora_A"]
    torch.testing.assert_close(change, expected, rtol=1e-3, atol=2e-8)


@pytest.mark.parametrize(("key", "given"), [("validation.samples_guidance", "3"), ("model.guidance", "[3]")])
def test_no_clip_of_a_prompt_is_guided_twice(settings, tmp_path, capsys, key, given):
    """Training and evaluating refuse a weight in the same words, before anything is loaded."""
    words = {**settings, "runs": tmp_path, "objective.distilled_guidance": "null", key: given}
    with pytest.raises(SystemExit) as end:
        main.run([f"{name}={value}" for name, value in words.items()])
    refused = "is 3, but minimax_h3 is distilled for guidance: leave it out, or set it to 1"
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {key} {refused}\n"
    assert not list(tmp_path.iterdir())
    write_config(finish(compose_run(settings)), tmp_path)
    with pytest.raises(UserError, match=f"^guidance {refused}$"):
        Job.of(Settings(run=tmp_path, guidance=3))


def test_clips_of_prompts_take_one_pass_whatever_is_left_unset(settings):
    for guidance in ("[1.0]", "null"):
        config = finish(compose_run({**settings, "model.guidance": guidance}))
        preflight(config)
        assert sampled_with(config) == (2, 1.0, 1.0)
    preflight(finish(compose_run({**settings, "validation.samples_guidance": "1"})))


def test_a_model_that_takes_the_weight_as_an_input_is_given_any():
    assert not HunyuanAdapter.distilled
    HunyuanAdapter.check_guidance("validation.samples_guidance", 6.0)
