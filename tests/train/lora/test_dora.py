"""DoRA: its layers against the definition, its exports as their users load them, and what is refused."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import nn

from radial import Dense, VideoGrid
from tests.helpers.attention import step_attention
from tests.helpers.faults import Run, equal_checkpoints, losses, only_run, run
from tests.helpers.tiny import run_config, words
from train.__main__ import main
from train.config.check import validate
from train.errors import UserError
from train.export.run import export_run
from train.lora.layers import inject_lora, load_parameters, lora_parameters
from train.lora.reading import read_lora
from train.models.loading import load_adapter
from train.storage.checkpoints import last_checkpoint, load_weights

NORMS = ".lora_magnitude_vector"
CHANGES = {"optim__lr": 2e-2, "trainer__steps": 3, "optim__warmup": 0, "lora__dora": "true"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps, in which norms have moved too."""
    config = run_config(tmp_path_factory.mktemp("dora"), **CHANGES)
    return config, run(config)


def outputs(transformer):
    torch.manual_seed(0)
    with torch.no_grad():
        return transformer(
            torch.randn(1, 3, 4, 16, 32), torch.tensor([500.0]), torch.randn(1, 32, 64), return_dict=False
        )[0]


class Layers(nn.Module):
    """Two linear layers, with a bias and without."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 20), nn.Linear(20, 9, bias=False)

    def forward(self, x):
        return self.two(self.one(x).tanh())

    def add_adapter(self, config: LoraConfig, name: str):
        inject_adapter_in_model(config, self, name)


def test_values_and_gradients_are_the_definitions():
    """In float64, with the norm as a constant: that of the row of W + (alpha / rank) B A."""
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(5, 7, 12)
    inject_lora(model, 4, 8, "one|two", 0, dora=True)
    own = lora_parameters(model)
    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    exact = {name: p.detach().double().requires_grad_() for name, p in own.items()}
    hidden = x.double()
    for name in ("one", "two"):
        layer = model.get_submodule(name).base_layer
        whole = layer.weight.double() + 2 * exact[f"{name}.lora_B.weight"] @ exact[f"{name}.lora_A.weight"]
        norms = whole.detach().square().sum(1).sqrt()
        hidden = hidden @ (whole * (exact[f"{name}{NORMS}"] / norms)[:, None]).T
        hidden = hidden.add(layer.bias.double()).tanh() if name == "one" else hidden
    got = model(x)
    torch.testing.assert_close(got.double(), hidden, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    hidden.square().sum().backward()
    assert len(own) == 6
    for name, parameter in own.items():
        scale = exact[name].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-5 * scale)


def test_it_starts_as_the_model_itself():
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(3, 12)
    before = model(x)
    inject_lora(model, 4, 8, "one|two", 0, dora=True)
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)


def test_every_export_runs_what_was_trained(trained, monkeypatch):
    config, folder = trained
    said = export_run(folder, merged=True, card=True)
    written = {path.name for path in (folder / "export").iterdir()}
    assert written == {".export", "diffusers", "peft", "merged", "README.md"}
    assert sum("all equal" in line for line in said) == 2
    weights = load_weights(last_checkpoint(folder))
    adapter = load_adapter(config.model, torch.float32, 0)
    inject_lora(adapter.transformer, 4, 8, adapter.lora_targets, 0, dora=True)
    start = {name: p.detach().clone() for name, p in lora_parameters(adapter.transformer).items()}
    assert all((weights[name] - start[name]).abs().max() > 1e-3 for name in weights if name.endswith(NORMS))
    load_parameters(lora_parameters(adapter.transformer), weights)
    adapter.set_attention(step_attention(Dense(), VideoGrid(4, 4, 8)))
    expected = outputs(adapter.transformer)

    def fresh():
        return WanTransformer3DModel.from_pretrained(config.model.path)

    def wan():
        return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=fresh())

    pipeline, by_card = wan(), wan()
    pipeline.load_lora_weights(folder / "export" / "diffusers")
    monkeypatch.chdir(folder / "export")
    card = Path("README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.+?)\n```", card)[1], {"pipeline": by_card})
    got = {
        "merged": outputs(WanTransformer3DModel.from_pretrained(folder / "export" / "merged")),
        "diffusers": outputs(pipeline.transformer),
        "the card's command": outputs(by_card.transformer),
        "peft": outputs(PeftModel.from_pretrained(fresh(), str(folder / "export" / "peft")).base_model.model),
    }
    assert (outputs(fresh()) - expected).abs().max() > 1e-3
    for name, output in got.items():
        assert (output - expected).abs().max() < 1e-5, name


def test_what_cannot_be_exact_is_refused(trained, tmp_path):
    config, folder = trained
    with pytest.raises(UserError, match="format comfyui is not there for a DoRA .* or merge=true for all tools"):
        export_run(folder, out=tmp_path / "out", formats=["comfyui"])
    transformer = load_adapter(config.model, torch.float32, 0).transformer
    with pytest.raises(UserError, match="is a DoRA"):
        read_lora(folder / "export" / "peft", transformer)
    for section, changes in (
        ("trainer", {"fp8": True}), ("model", {"storage": "fp8"}), ("parallel", {"strategy": "zero3"})
    ):  # fmt: skip
        other = replace(config, **{section: replace(getattr(config, section), **changes)})
        with pytest.raises(UserError, match=r"lora.dora is true with .*: DoRA needs whole frozen weights"):
            validate(other)
    with pytest.raises(
        UserError, match=r"lora.dora is true with optim.weight_decay=0.01, which would shrink the norms"
    ):
        validate(replace(config, optim=replace(config.optim, weight_decay=0.01)))


def test_a_row_of_zeros_names_its_layer():
    model = Layers()
    with torch.no_grad():
        model.two.weight[3:5] = 0
    with pytest.raises(UserError, match=r"lora.dora is true, but 2 rows of two's weight are zero.*lora.targets"):
        inject_lora(model, 4, 8, "one|two", 0, dora=True)


def test_weights_that_stream_change_nothing(trained, tmp_path):
    config, folder = trained
    parallel = replace(config.parallel, offload_weights=True, activations="full")
    assert losses(run(replace(config, runs=str(tmp_path), parallel=parallel))) == losses(folder)


def test_a_resume_goes_on_exactly(trained, tmp_path):
    _, whole = trained
    folder = shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(folder / "checkpoints" / "step-000003")
    main([f"resume={folder}"])
    assert equal_checkpoints(*(path / "checkpoints" / "step-000003" for path in (folder, whole)))


def test_two_ranks_that_share_a_clip_train_the_same(trained, tmp_path):
    config, folder = trained
    given = {**CHANGES, "model__path": config.model.path, "trainer__devices": 2, "parallel__sequence": 2}
    process = Run(*words(tmp_path, **given))
    text = process.end()
    assert process.process.returncode == 0, text
    got, expected = (load_weights(last_checkpoint(path)) for path in (only_run(tmp_path / "runs"), folder))
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-2, atol=1e-3)
