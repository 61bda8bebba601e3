"""Exports as their users load them: through diffusers and PEFT, in a process of their own."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import run_config

from train.checkpoint import last_checkpoint
from train.errors import UserError
from train.export import export_run
from train.run import RunFolder, train

FRESH = """
import json, sys, torch
from diffusers import WanTransformer3DModel
from peft import PeftModel
base_path, export = sys.argv[1:]
torch.manual_seed(0)
x, text = torch.randn(1, 3, 4, 16, 32), torch.randn(1, 32, 64)
def out(model):
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text, return_dict=False)[0]
base = out(WanTransformer3DModel.from_pretrained(base_path))
merged = out(WanTransformer3DModel.from_pretrained(export + "/merged"))
adapted = WanTransformer3DModel.from_pretrained(base_path)
adapted.load_lora_adapter(export + "/diffusers", weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
loaded = {k: v for k, v in adapted.state_dict().items() if "lora_" in k}
peft = PeftModel.from_pretrained(WanTransformer3DModel.from_pretrained(base_path), export + "/peft")
print(json.dumps({
    "merged_adapter": (merged - out(adapted)).abs().max().item(),
    "merged_peft": (merged - out(peft.base_model.model)).abs().max().item(),
    "base": (merged - base).abs().max().item(),
    "tensors": len(loaded),
    "norm": sum(v.double().square().sum().item() for v in loaded.values()),
}))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("export"), optim__lr=2e-2, trainer__steps=3, optim__warmup=0)
    folder = RunFolder.create(config)
    train(config, folder)
    return config, folder.path


def test_a_fresh_process_loads_what_was_trained(trained):
    config, run = trained
    done = subprocess.run(
        [sys.executable, "-c", FRESH, config.model.path, str(run / "export")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    file = load_file(run / "export" / "diffusers" / "pytorch_lora_weights.safetensors")
    assert seen["tensors"] == len(file) == 2 * 4 * 3
    assert seen["norm"] == pytest.approx(sum(t.double().square().sum().item() for t in file.values()), rel=1e-6)
    assert seen["merged_adapter"] < 1e-5
    assert seen["merged_peft"] < 1e-5
    assert seen["base"] > 1e-3


def test_the_diffusers_pipeline_loads_every_tensor(trained):
    """WanPipeline.load_lora_weights, as users call it; values are compared, since attached modules prove nothing."""
    from diffusers import WanPipeline, WanTransformer3DModel

    config, run = trained
    transformer = WanTransformer3DModel.from_pretrained(config.model.path)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)
    pipeline.load_lora_weights(run / "export" / "diffusers")
    loaded = {k: v for k, v in transformer.state_dict().items() if "lora_" in k}
    for name, tensor in load_file(run / "export" / "diffusers" / "pytorch_lora_weights.safetensors").items():
        module, part = name.removeprefix("transformer.").rsplit(".lora_", 1)
        found = [v for k, v in loaded.items() if k.startswith(f"{module}.lora_{part.split('.')[0]}.")]
        assert len(found) == 1
        assert torch.equal(found[0], tensor)


def test_the_header_says_how_to_run_it(trained):
    _, run = trained
    with safe_open(run / "export" / "diffusers" / "pytorch_lora_weights.safetensors", "pt") as file:
        header = file.metadata()
    assert header["radial.pattern"] == "released"
    assert header["radial.frames"] == "8"
    assert header["radial.rank"] == "4"
    assert header["radial.step"] == "3"


def test_the_command(trained, tmp_path):
    _, run = trained
    words = [f"run={run}", f"out={tmp_path / 'out'}", "dtype=bf16"]
    done = subprocess.run([sys.executable, "-m", "train.export", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(".safetensors") == 3
    merged = load_file(tmp_path / "out" / "merged" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run is not set"),
        (["run=/nowhere"], "/nowhere has no config.yaml"),
        (["run=x", "format=y"], "format is not a known key"),
    ],
)
def test_command_mistakes(words, message):
    done = subprocess.run([sys.executable, "-m", "train.export", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_loading_nothing_is_an_error(trained, tmp_path):
    _, run = trained
    down, up = "lora_A.weight", "lora_B.weight"
    foreign = {f"blocks.0.attn9.to_q.{down}": torch.ones(4, 64), f"blocks.0.attn9.to_q.{up}": torch.ones(64, 4)}
    for weights, message in (
        ({}, "no LoRA tensor"),
        (foreign, "no linear layer of the base model"),
        ({f"blocks.0.attn1.to_q.{down}": torch.ones(4, 64)}, r"lacks .*lora_B.weight"),
    ):
        checkpoint = tmp_path / "step-000001"
        checkpoint.mkdir(exist_ok=True)
        for file in last_checkpoint(run).iterdir():
            (checkpoint / file.name).write_bytes(file.read_bytes())
        save_file(weights, checkpoint / "weights.safetensors")
        with pytest.raises(UserError, match=message):
            export_run(run, out=tmp_path / "out", checkpoint=checkpoint)
        assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if ".tmp" in p.name]


def test_a_folder_with_other_files_is_not_replaced(trained, tmp_path):
    _, run = trained
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        export_run(run, out=tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"
