"""Training that starts from a LoRA file, in any format."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.stock_models import TARGETS, load_transformer, output, random_lora, save_transformer
from tests.helpers.tiny import run_config
from train.assemble import build_module
from train.errors import UserError
from train.export.formats import FORMATS, Adapter, formats_of
from train.export.run import folded
from train.lora.initial import check_initial, initial_files
from train.lora.layers import inject_lora, load_parameters, lora_parameters, start_from
from train.lora.reading import read_lora
from train.models.loading import load_adapter
from train.models.pretrained import stand_in
from train.preflight import preflight
from train.run import RunFolder, train
from train.shards import training_shards
from train.storage.checkpoints import last_checkpoint, load_weights


@pytest.mark.parametrize("family", TARGETS)
def test_every_format_of_every_family_starts_a_lora(family, tmp_path):
    """With the same rank and alpha the weights are the trained ones; with more of both the output is."""
    base = save_transformer(family, tmp_path / "base")
    weights = random_lora(load_transformer(base), TARGETS[family], 3)
    model = load_transformer(base)
    inject_lora(model, 3, 5, TARGETS[family], seed=0)
    load_parameters(lora_parameters(model), weights)
    expected = output(model, family)
    adapter = Adapter(folded(weights, 5), stand_in(base), {}, "base", "clip")
    for name in formats_of(adapter.model_class):
        FORMATS[name](adapter, tmp_path / name)
        for rank, alpha in ((3, 5), (8, 4)):
            model = load_transformer(base)
            lora = read_lora(tmp_path / name, model)
            inject_lora(model, rank, alpha, TARGETS[family], seed=0)
            start_from(model, lora, alpha / rank)
            torch.testing.assert_close(output(model, family), expected, rtol=1e-4, atol=1e-5)
            if rank == 3:
                for key, parameter in lora_parameters(model).items():
                    torch.testing.assert_close(parameter.data, weights[key])


def test_a_dora_starts_as_the_lora_that_it_is_started_from(tmp_path):
    """Its norms are those of the tuned weight, so that at first it changes what the LoRA does."""
    base = save_transformer("wan", tmp_path / "base")
    weights = random_lora(load_transformer(base), TARGETS["wan"], 3)
    model = load_transformer(base)
    inject_lora(model, 3, 5, TARGETS["wan"], seed=0)
    load_parameters(lora_parameters(model), weights)
    expected, untuned = output(model, "wan"), output(load_transformer(base), "wan")
    assert (expected - untuned).abs().max() > 1e-3
    adapter = Adapter(folded(weights, 5), stand_in(base), {}, "base", "clip")
    FORMATS["diffusers"](adapter, tmp_path / "diffusers")
    model = load_transformer(base)
    lora = read_lora(tmp_path / "diffusers", model)
    inject_lora(model, 8, 4, TARGETS["wan"], seed=0, dora=True)
    start_from(model, lora, 4 / 8)
    torch.testing.assert_close(output(model, "wan"), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("init"), trainer__steps=2, optim__lr=1e-2, optim__warmup=0)
    folder = RunFolder.create(config)
    train(config, folder)
    return config, folder.path


def test_a_run_goes_on_from_another_runs_export(first, tmp_path, capsys):
    config, run = first
    init = str(run / "export" / "comfyui")
    config = replace(config, runs=str(tmp_path), lora=replace(config.lora, init=init))
    preflight(config)
    module = build_module(config, load_adapter(config.model, torch.float32, 0), training_shards(config))
    trained = load_weights(last_checkpoint(run))
    for name, weight in module.trained_weights().items():
        torch.testing.assert_close(weight, trained[name])
    train(config, RunFolder.create(config))
    assert f"starts from {init}" in capsys.readouterr().out


def test_a_file_with_commas_starts_a_run_and_its_factor_is_said(first, tmp_path, capsys):
    config, run = first
    file = tmp_path / "a,b, c.safetensors"
    shutil.copy(run / "export" / "comfyui" / "shapes_4x.safetensors", file)
    config = replace(config, lora=replace(config.lora, init=str(file)))
    preflight(config)
    build_module(config, load_adapter(config.model, torch.float32, 0), training_shards(config))
    said = capsys.readouterr().out
    assert f"lora.init: {file}: it has no alpha, alpha / rank is 1\n" in said


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"radial.family": "hunyuan"}, "of the family hunyuan; the model is of wan"),
        ({"radial.expert": "low"}, "its expert for low noise levels; the model has one transformer"),
    ],
)
def test_what_a_file_was_trained_for_is_looked_at(first, tmp_path, header, message):
    config, run = first
    file = tmp_path / "other.safetensors"
    save_file(load_file(run / "export" / "comfyui" / "shapes_4x.safetensors"), file, header)
    with pytest.raises(UserError, match=message):
        preflight(replace(config, lora=replace(config.lora, init=str(file))))


def test_random_weights_take_no_lora(tmp_path):
    """Whose export would have no base model, after a whole run."""
    config = run_config(tmp_path, model="shapes_random", model__path="null")
    with pytest.raises(
        UserError, match=r"model.architecture asks for random weights, a LoRA needs trained ones: choose"
    ):
        preflight(config)


def test_the_files_of_two_experts_are_told_apart(first, tmp_path):
    """Each with a comma in its name."""
    config, run = first
    tensors = load_file(run / "export" / "comfyui" / "shapes_4x.safetensors")
    files = [str(tmp_path / f"{name},1.safetensors") for name in ("high", "low")]
    for name, file in zip(("high", "low"), files, strict=True):
        save_file(tensors, file, {"radial.expert": name, "radial.family": "wan"})
    model = replace(config.model, expert="both", boundary=0.9)
    assert initial_files(",".join(files), model) == [(Path(files[0]), "high"), (Path(files[1]), "low")]
    check_initial(",".join(files), model)
    with pytest.raises(UserError, match=r"low,1.safetensors was .*for low noise levels; lora.init is the high one's"):
        check_initial(",".join(reversed(files)), model)
    with pytest.raises(UserError, match=r"expected a file for each expert: high.safetensors,low.safetensors"):
        check_initial(files[0], model)
    with pytest.raises(UserError, match=r"lora.init is .*, expected one file, or a folder with one"):
        check_initial(",".join(files), config.model)
    with pytest.raises(UserError, match=r"lora.init is .*, expected a file on each side of a comma; is a variable"):
        check_initial(f"{files[0]},", model)


def test_what_cannot_be_trained_is_refused(first, tmp_path):
    config, _ = first

    def build(tensors, **lora):
        file = tmp_path / "style.safetensors"
        save_file(tensors, file)
        changed = replace(config, lora=replace(config.lora, init=str(file), **lora))
        build_module(changed, load_adapter(config.model, torch.float32, 0), training_shards(config))

    name = "diffusion_model.blocks.0.self_attn.q"
    pair = {f"{name}.lora_A.weight": torch.ones(5, 64), f"{name}.lora_B.weight": torch.ones(64, 5)}
    with pytest.raises(UserError, match="lora.init has rank 5 at blocks.0.attn1.to_q, lora.rank is 4"):
        build(pair)
    build(pair, rank=5)
    with pytest.raises(UserError, match=r"lora.init covers blocks.0.attn1.to_q, which is not among .*set lora.targets"):
        build(pair, rank=5, targets=r"blocks\.\d+\.attn1\.to_k")
    with pytest.raises(UserError, match="lora.init changes blocks.0.attn1.to_q.bias as a whole"):
        build({**pair, f"{name}.diff_b": torch.ones(64)}, rank=5)
    with pytest.raises(UserError, match="nowhere is missing, expected a LoRA"):
        preflight(replace(config, lora=replace(config.lora, init="/nowhere")))
