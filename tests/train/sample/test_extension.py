"""`train.sample.extend`: a stock pipeline's own call gives what the command gives, and everything can be taken back."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    WanPipeline,
)
from diffusers.pipelines import pipeline_utils
from safetensors.torch import save_file

from tests.helpers.generating import close, latent
from tests.helpers.tiny_pipelines import CLIP, HEADER, TOKENS, save_lora, save_pipeline
from train.config.compose import compose_run
from train.config.schema import ModelConfig
from train.errors import UserError
from train.sample import extend, unextend
from train.sample.extension import model_of


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_pipeline("wan", tmp_path_factory.mktemp("extension") / "wan")


@pytest.fixture(scope="module")
def lora(wan, tmp_path_factory):
    return save_lora(wan, tmp_path_factory.mktemp("lora") / "mine.safetensors", header=HEADER)


@pytest.fixture(scope="module")
def model():
    return replace(ModelConfig(**compose_run({"conf": "wan_4x"}).model), text_tokens=TOKENS)


def called(pipeline, **changes):
    return pipeline(
        "a red ball, moving & it's a clip",
        "the bar",
        **{"height": CLIP["height"], "width": CLIP["width"], "num_frames": CLIP["frames"], **changes},
        num_inference_steps=CLIP["steps"],
        guidance_scale=CLIP["guidance"],
        generator=torch.Generator().manual_seed(CLIP["seed"]),
        max_sequence_length=TOKENS,
        output_type="latent",
    ).frames


def test_the_pipelines_own_call_is_the_command(wan, lora, model):
    pipeline = WanPipeline.from_pretrained(wan)
    plain = called(pipeline)
    extend(pipeline, lora, strength=0.9, model=model, dense_steps=1)
    got = called(pipeline)
    close(got, latent(wan, lora=f"{lora}:0.9", dense_steps=1, block=None).latent)
    assert (got - plain).abs().max() > 1e-2
    assert torch.equal(called(pipeline), got)  # a second call starts anew
    assert called(pipeline, num_frames=17).shape[2] == 5  # and so does one of another length
    unextend(pipeline)
    assert torch.equal(called(pipeline), plain)
    extend(pipeline, lora, strength=0.9, model=model, dense_steps=1)
    assert torch.equal(called(pipeline), got)


def test_a_second_lora_beside_it(wan, lora, model, tmp_path):
    style = save_lora(wan, tmp_path / "style.safetensors", header={}, seed=2, format_name="comfyui")
    pipeline = extend(WanPipeline.from_pretrained(wan), lora, model=model, dense_steps=1)
    alone = called(pipeline)
    pipeline.load_lora_weights(style, adapter_name="style")
    pipeline.set_adapters(["lora_0", "style"], [0.9, 0.5])
    expected = latent(wan, lora=f"{lora}:0.9", add=f"{style}:0.5", dense_steps=1, block=None).latent
    close(called(pipeline), expected)
    pipeline.delete_adapters("style")
    pipeline.set_adapters(["lora_0"], [1.0])
    close(called(pipeline), alone)


def test_tokens_find_their_places_when_loras_come_and_go(wan, model, tmp_path):
    """Under a mask with an order of its own, tokens leave it behind the last projection, which a LoRA may wrap."""
    pipeline = WanPipeline.from_pretrained(wan)
    plain, last = called(pipeline), pipeline.transformer.proj_out
    factors = {"A": torch.randn(4, last.in_features), "B": torch.randn(last.out_features, 4)}
    style = tmp_path / "style.safetensors"
    save_file({f"transformer.proj_out.lora_{name}.weight": 0.3 * factor for name, factor in factors.items()}, style)
    own = {"model": model, "pattern": "temporal", "block": 16, "dense_layers": 1, "dense_steps": 1}
    extend(pipeline, **own)
    without = called(pipeline)
    pipeline.load_lora_weights(style, adapter_name="style")
    styled = called(pipeline)
    close(styled, called(extend(WanPipeline.from_pretrained(wan), add=str(style), **own)))
    assert (styled - without).abs().max() > 0.1
    pipeline.unload_lora_weights()
    close(called(pipeline), without)
    unextend(pipeline)
    assert torch.equal(called(pipeline), plain)


def test_pipelines_that_share_a_transformer(wan, model):
    own = {"model": model, "decay": 0.4, "block": 16, "dense_layers": 1, "dense_steps": 1}
    first = extend(WanPipeline.from_pretrained(wan), **own)
    expected = called(first)
    second = WanPipeline.from_pipe(first)
    with pytest.raises(UserError, match="another pipeline that shares this one's transformer is extended"):
        extend(second, **own)
    unextend(first)
    assert torch.equal(called(extend(second, **own)), expected)


def test_one_experts_lora(model, tmp_path):
    folder = save_pipeline("wan_a14b", tmp_path / "a14b")
    file = save_lora(folder, tmp_path / "mine.safetensors", header=HEADER)
    both = replace(ModelConfig(**compose_run({"conf": "wan22_2x"}).model), text_tokens=TOKENS)
    for loras in ((file, "none"), ("none", file)):
        pipeline = extend(WanPipeline.from_pretrained(folder), loras[0], lora_2=loras[1], model=both, dense_steps=1)
        for transformer, lora in zip((pipeline.transformer, pipeline.transformer_2), loras, strict=True):
            assert bool(getattr(transformer, "peft_config", None)) == (lora == file)


def test_offloaded_models_run_the_same(wan, lora, model, monkeypatch):
    pipeline = WanPipeline.from_pretrained(wan)
    plain = called(pipeline)
    monkeypatch.setattr(pipeline_utils, "get_device", lambda: "cpu")  # without a GPU, the hooks alone
    pipeline.enable_model_cpu_offload(device="cpu")
    with pytest.raises(UserError, match="offloaded already: call pipeline.remove_all_hooks"):
        extend(pipeline, lora, model=model, dense_steps=1)
    pipeline.remove_all_hooks()
    extend(pipeline, lora, model=model, dense_steps=1)
    pipeline.enable_model_cpu_offload(device="cpu")
    expected = latent(wan, lora=lora, dense_steps=1, block=None).latent
    close(called(pipeline), expected)
    close(called(pipeline), expected)  # the hooks were put on anew
    with pytest.raises(UserError, match="remove_all_hooks"):
        unextend(pipeline)
    pipeline.remove_all_hooks()
    unextend(pipeline)
    close(called(pipeline), plain)


@pytest.mark.slow
def test_compiled_layers_run_the_same(wan, lora, model):
    pipeline = extend(WanPipeline.from_pretrained(wan), lora, model=model, dense_steps=1)
    expected = called(pipeline)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipeline.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    close(called(pipeline), expected)
    assert graphs


def test_attention_alone_and_another_scheduler(wan, model):
    pipeline = WanPipeline.from_pretrained(wan)
    extend(pipeline, model=model, decay=0.4, block=16, dense_layers=1, dense_steps=2)
    close(called(pipeline), latent(wan, decay=0.4, dense_layers=1, dense_steps=2).latent)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert called(pipeline).isfinite().all()


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_schedulers_take_the_same_steps(wan, model, scheduler):
    """Dense attention through ours is the stock pipeline's; noise levels decide which steps are dense."""
    pipeline = WanPipeline.from_pretrained(wan)
    pipeline.scheduler = scheduler
    plain = called(pipeline)
    extend(pipeline, model=model, pattern="dense", shift=3.0)
    close(called(pipeline), plain)
    unextend(pipeline)
    extend(pipeline, model=model, decay=0.4, block=16, dense_layers=0, dense_sigma=0.8, shift=3.0)
    assert (called(pipeline) - plain).abs().max() > 1e-3
    levels = pipeline.scheduler.sigmas[: len(pipeline.radial_extension.denoiser.dense)]
    assert pipeline.radial_extension.denoiser.dense == (levels >= 0.8).tolist()
    assert {True, False} == set(pipeline.radial_extension.denoiser.dense)
    unextend(pipeline)
    assert torch.equal(called(pipeline), plain)


def test_positions_are_as_trained_and_taken_back(wan, model, tmp_path):
    short = replace(model, native_frames=17)  # the clip is longer, so that its positions change
    pipeline = WanPipeline.from_pretrained(wan)
    plain, found = called(pipeline), []
    for rope in ("default", "interpolate"):
        lora = save_lora(wan, tmp_path / f"{rope}.safetensors", header={**HEADER, "radial.rope": rope})
        extend(pipeline, lora, model=short, dense_steps=1)
        found.append(called(pipeline))
        close(found[-1], latent(wan, lora=lora, dense_steps=1, block=None, **{"model.native_frames": 17}).latent)
        unextend(pipeline)
        assert torch.equal(called(pipeline), plain)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_what_does_not_fit_leaves_the_pipeline_as_it_was(wan, lora, model, tmp_path):
    pipeline = WanPipeline.from_pretrained(wan)
    plain = called(pipeline)
    save_file({"nothing.lora_A.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="nothing"):
        extend(pipeline, tmp_path / "other.safetensors", model=model)
    with pytest.raises(UserError, match="decay"):
        extend(pipeline, model=model, decay=-1.0)
    assert torch.equal(called(pipeline), plain)
    with pytest.raises(UserError, match="not extended"):
        unextend(pipeline)
    extend(pipeline, lora, model=model)
    with pytest.raises(UserError, match="extended already"):
        extend(pipeline, lora, model=model)


@pytest.mark.parametrize("name", ["frames", "guidance", "steps", "compile", "offload", "dtype", "negative", "decoy"])
def test_a_setting_that_would_not_count_is_refused(wan, model, name):
    """They are the command's, or nobody's: the pipeline's call would go on without them."""
    pipeline = WanPipeline.from_pretrained(wan)
    with pytest.raises(UserError, match=f"extend takes no {name}, expected some of pattern, .* own call"):
        extend(pipeline, model=model, **{name: 1})
    extend(pipeline, model=model)  # it is as it was


def test_a_transformer_that_is_not_called_as_pipelines_do_says_so(wan, model):
    """Also under python -O: a program that calls it by itself gets no tuple where it expects an output."""
    pipeline = extend(WanPipeline.from_pretrained(wan), model=model, decay=0.4, block=16)
    latent = torch.zeros(1, pipeline.transformer.config.in_channels, 2, 4, 4)
    with pytest.raises(UserError, match=r"return_dict=True, expected keywords and return_dict=False.*unextend"):
        pipeline.transformer(hidden_states=latent)
    with pytest.raises(UserError, match="positional arguments, expected keywords"):
        pipeline.transformer(latent, return_dict=False)


def test_what_was_wrapped_since_is_not_torn_apart(wan, model):
    pipeline = extend(WanPipeline.from_pretrained(wan), model=model, decay=0.4, block=16)
    ours = pipeline.transformer.forward
    pipeline.transformer.forward = lambda *args, **kwargs: ours(*args, **kwargs)  # as accelerate's hooks do
    with pytest.raises(UserError, match="remove_all_hooks"):
        unextend(pipeline)
    pipeline.transformer.forward = ours
    unextend(pipeline)


def test_an_extended_pipeline_is_freed_with_its_last_reference(wan, lora, model):
    pipeline = extend(WanPipeline.from_pretrained(wan), lora, model=model)
    gone = weakref.ref(pipeline.transformer)
    del pipeline
    gc.collect()
    assert gone() is None


def test_the_model_is_found_by_its_dimensions(wan):
    pipeline = WanPipeline.from_pretrained(wan)
    with pytest.raises(UserError, match="has dimensions of none of the known models: give model=, one of .*wan_14b"):
        extend(pipeline)
    with pytest.raises(UserError, match="model is 'wan_15b', expected one of"):
        model_of(pipeline, "wan_15b")
    pipeline.transformer.register_to_config(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    assert model_of(pipeline).steps == model_of(pipeline, "wan_1.3b").steps
