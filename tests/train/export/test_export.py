"""Exports of a run, as their users load them: through diffusers and PEFT."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from radial import Dense, VideoGrid
from radial.errors import Mistake
from tests.helpers.attention import step_attention
from tests.helpers.tiny import run_config
from train import __version__
from train.errors import UserError
from train.export.__main__ import main
from train.export.formats import FORMATS
from train.export.run import export_run
from train.lora.layers import inject_lora, load_parameters, lora_parameters
from train.lora.reading import read_header
from train.models.loading import load_adapter
from train.run import train
from train.storage.checkpoints import last_checkpoint, load_weights
from train.storage.run_folder import RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("export"), optim__lr=2e-2, trainer__steps=3, optim__warmup=0)
    folder = RunFolder.create(config)
    train(config, folder)
    return config, folder.path


def outputs(transformer) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return transformer(
            torch.randn(1, 3, 4, 16, 32), torch.tensor([500.0]), torch.randn(1, 32, 64), return_dict=False
        )[0]


def test_every_export_runs_what_was_trained(trained):
    config, run = trained
    export_run(run, merged=True)
    adapter = load_adapter(config.model, torch.float32, 0)
    inject_lora(adapter.transformer, config.lora.rank, config.lora.alpha, adapter.lora_targets, 0)
    load_parameters(lora_parameters(adapter.transformer), load_weights(last_checkpoint(run)))
    adapter.set_attention(step_attention(Dense(), VideoGrid(4, 4, 8)))
    expected = outputs(adapter.transformer)

    def fresh():
        return WanTransformer3DModel.from_pretrained(config.model.path)

    def piped(path):
        pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=fresh())
        pipeline.load_lora_weights(run / "export" / path)
        return pipeline.transformer

    got = {
        "merged": outputs(WanTransformer3DModel.from_pretrained(run / "export" / "merged")),
        "diffusers": outputs(piped("diffusers")),
        "comfyui": outputs(piped("comfyui/shapes_4x.safetensors")),
        "peft": outputs(PeftModel.from_pretrained(fresh(), str(run / "export" / "peft")).base_model.model),
    }
    assert (outputs(fresh()) - expected).abs().max() > 1e-3
    for name, output in got.items():
        assert (output - expected).abs().max() < 1e-5, name


def test_rslora_trains_and_exports_with_its_own_factor(tmp_path):
    """alpha / sqrt(rank) = 8 / sqrt(4): in training PEFT's own layers say so, in the exports the merged weights."""
    changes = {"optim__lr": 2e-2, "trainer__steps": 2, "optim__warmup": 0, "lora__rslora": "true"}
    config = run_config(tmp_path, **changes)
    folder = RunFolder.create(config)
    train(config, folder)
    export_run(folder.path, merged=True)
    adapter = load_adapter(config.model, torch.float32, 0)
    model, weights = adapter.transformer, load_weights(last_checkpoint(folder.path))
    layers = dict(model.named_modules())
    names = {name.rsplit(".lora_", 1)[0] for name in weights}
    with torch.no_grad():
        for name in names:
            change = weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
            layers[name].weight += 8 / 2 * change
    merged = load_file(next((folder.path / "export" / "merged").glob("*.safetensors")))
    for name in names:
        torch.testing.assert_close(merged[f"{name}.weight"], layers[name].weight.data, rtol=1e-5, atol=1e-6)
    adapter.set_attention(step_attention(Dense(), VideoGrid(4, 4, 8)))
    expected = outputs(model)
    stock = WanTransformer3DModel.from_pretrained(config.model.path)
    loaded = PeftModel.from_pretrained(stock, str(folder.path / "export" / "peft")).base_model.model
    assert (outputs(loaded) - expected).abs().max() < 1e-5

    trained_model = load_adapter(config.model, torch.float32, 0)
    inject_lora(trained_model.transformer, 4, 8, trained_model.lora_targets, 0, rslora=True)
    load_parameters(lora_parameters(trained_model.transformer), weights)
    trained_model.set_attention(step_attention(Dense(), VideoGrid(4, 4, 8)))
    assert (outputs(trained_model.transformer) - expected).abs().max() < 1e-5


def test_training_ends_with_every_adapter_format(trained):
    _, run = trained
    found = {str(file.relative_to(run / "export")) for file in (run / "export").rglob("*.safetensors")}
    assert {
        "diffusers/pytorch_lora_weights.safetensors",
        "comfyui/shapes_4x.safetensors",
        "kohya/shapes_4x.safetensors",
        "peft/adapter_model.safetensors",
    } <= found


def test_the_header_says_how_to_run_it(trained):
    config, run = trained
    with safe_open(run / "export" / "diffusers" / "pytorch_lora_weights.safetensors", "pt") as file:
        header = file.metadata()
    assert {key.removeprefix("radial."): value for key, value in header.items() if key != "format"} == {
        "base_model": Path(config.model.path).name, "family": "wan", "rope": config.model.rope, "expert": "None",
        "rank": "4", "shift": str(config.shift()), "fp8": "False", "step": "3", "version": __version__,
        "pattern": "released", "rule": "wan", "decay": str(config.attention.decay),
        "block": str(config.attention.block), "dense_layers": str(config.attention.dense_layers),
        "dense_sigma": "None", "dense_steps": "0", "sampling_steps": "None",
        "frames": "8", "height": str(config.clip.height), "width": str(config.clip.width),
    }  # fmt: skip


@pytest.mark.parametrize(("key", "back"), [("fp8", "trainer.fp8=false"), ("storage", "model.storage=null")])
def test_an_export_of_fp8_training_says_so(trained, tmp_path, monkeypatch, key, back):
    config, run = trained
    of_fp8 = replace(config, trainer=replace(config.trainer, fp8=True))
    if key == "storage":
        of_fp8 = replace(config, model=replace(config.model, storage="fp8"))
    monkeypatch.setattr("train.export.run.read_config", lambda run: of_fp8)
    said = export_run(run, out=tmp_path / "out", formats=["peft"])
    assert "trained beside float8 layers" in said[-1] and f"resume=RUN {back} override=true" in said[-1]
    assert read_header(tmp_path / "out" / "peft")["radial.fp8"] == "True"


def test_what_is_merged_too_says_its_factor(trained, tmp_path):
    _, run = trained
    tensors = load_file(run / "export" / "kohya" / "shapes_4x.safetensors")
    file = tmp_path / "a, b.safetensors"
    save_file({name: t for name, t in tensors.items() if not name.endswith(".alpha")}, file, {"ss_network_alpha": "2"})
    said = export_run(run, out=tmp_path / "out", formats=["peft"], merged=True, add=[(file, 0.5)])
    assert f"merged  with {file}: alpha / rank is 0.5, from its header" in said[-1]
    main([f"run={run}", f"out={tmp_path / 'out'}", "format=peft", "merge=true", f"add={file}:0.5,{file}"])


def test_a_model_of_the_hub_is_merged_into_a_whole_pipeline(trained, tmp_path, monkeypatch):
    """Training has fetched the transformer alone."""
    config, run = trained
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    shutil.copytree(config.model.path, hub / "transformer")
    for name in ("model_index.json", "vae/config.json", "text_encoder/model.safetensors"):
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).write_text("{}", encoding="utf-8")

    def download(name, allow_patterns=None):
        assert name == "org/name"
        names = [str(file.relative_to(hub)) for file in hub.rglob("*.*")]
        for file in filter_repo_objects(names, allow_patterns=allow_patterns):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / file, cache / file)
        return str(cache)

    monkeypatch.setattr("train.models.folders.snapshot_download", download)
    of_hub = replace(config, model=replace(config.model, path="hub:org/name", subfolder="transformer"))
    monkeypatch.setattr("train.export.run.read_config", lambda run: of_hub)
    export_run(run, out=tmp_path / "out", formats=["peft"])
    assert [path.name for path in cache.iterdir()] == ["transformer"]
    export_run(run, out=tmp_path / "out", formats=["peft"], merged=True)
    merged = tmp_path / "out" / "merged"
    assert {path.name for path in merged.iterdir()} == {"model_index.json", "transformer", "vae", "text_encoder"}
    assert (merged / "text_encoder" / "model.safetensors").is_file()


def test_the_command_says_what_was_loaded(trained, tmp_path, capsys):
    _, run = trained
    main([f"run={run}", f"out={tmp_path / 'out'}", "dtype=bf16", "format=comfyui,peft", "merge=true"])
    lines = [line.removeprefix(f"{tmp_path}/out/") for line in capsys.readouterr().out.splitlines()]
    other = [line for line in lines if "runs other attention than the LoRA was trained with" in line]
    assert other  # blocks of 64, which no tool runs under this rule (`test_train_export_tools`)
    assert [line for line in lines if line not in other] == [
        "comfyui  names and shapes of the original checkpoint: 24 tensors",
        "comfyui  WanPipeline.load_lora_weights: 24 tensors, all equal",
        "peft  PeftModel.from_pretrained: 24 tensors, all equal",
        "merged  96 tensors in 1 files, 12 of them changed",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".export", "comfyui", "merged", "peft"]
    dtypes = {t.dtype for t in load_file(tmp_path / "out" / "comfyui" / "shapes_4x.safetensors").values()}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run is not set"),
        (["run=/nowhere"], "/nowhere has no config.yaml"),
        (["run=x", "formats=y"], "formats is not a known key"),
        (["run=x", "merge=yes"], "merge is 'yes', expected true or false"),
        (["run=x", "merge=true", "strength=a"], "strength is 'a', expected a number"),
        (["run=x", "merge=true", "add=a.safetensors:b"], "add is 'b', expected a number"),
        (["run=x", "add_2=a.safetensors"], "add_2 is for the merged model, set merge=true"),
        (
            ["run={run}", "merge=true", "add_2=a.safetensors"],
            "add_2 is for the second of two experts, the run trained one",
        ),
        (["run=x", "strength=0.5"], "strength is for the merged model, set merge=true"),
        (["run={run}", "out={out}", "format=diffusers,onnx"], "format is 'onnx', expected some of diffusers,comfyui"),
        (["run={run}", "out={out}", "format=released"], "format released is not there for a WanTransformer3DModel"),
        (["run={run}", "out={out}", "merge=true", "add=/nowhere.safetensors"], "/nowhere.safetensors is missing"),
        (["run={run}", "merge=true", "add=a.safetensors,"], "add is 'a.safetensors,', expected FILE or FILE:STRENGTH"),
        (["run={run}", "merge=true", "add="], "add is empty, expected a path; is a variable"),
        (["run={run}", "checkpoint=step-000009"], "checkpoint step-000009 is no folder, {run} has step-"),
        (["run={run}", "out=/dev/null/x"], "the export to /dev/null/x failed ("),
        (["run={run}", "out=/proc/x"], "the export to /proc/x failed ("),
    ],
)
def test_command_mistakes(trained, tmp_path, words, message):
    with pytest.raises(Mistake, match=re.escape(message.format(run=trained[1]))):
        main([word.format(run=trained[1], out=tmp_path / "out") for word in words])
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_found_by_its_name(trained, tmp_path, capsys):
    _, run = trained
    main([f"run={run}", f"out={tmp_path / 'out'}", "checkpoint=step-000003", "format=peft"])
    assert "24 tensors, all equal" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_refused(trained, tmp_path):
    """Its names and shapes may fit, and the header and card would be of the wrong run; a copy elsewhere is taken."""
    _, run = trained
    checkpoint = last_checkpoint(run)
    for name in ("other", "copy"):
        shutil.copytree(checkpoint, tmp_path / name / "checkpoints" / checkpoint.name)
    shutil.copyfile(run / "config.yaml", tmp_path / "other" / "config.yaml")
    with pytest.raises(UserError, match=f"is of the run {tmp_path}/other, not of {run}: give run={tmp_path}/other"):
        export_run(run, out=tmp_path / "out", checkpoint=tmp_path / "other" / "checkpoints" / checkpoint.name)
    assert not (tmp_path / "out").exists()
    export_run(run, out=tmp_path / "out", checkpoint=tmp_path / "copy" / "checkpoints" / checkpoint.name)
    assert (tmp_path / "out").is_dir()


def test_a_mistake_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "-m", "train.export"], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_loading_nothing_is_an_error(trained, tmp_path):
    _, run = trained
    down, up = "lora_A.weight", "lora_B.weight"
    foreign = {f"blocks.0.attn9.to_q.{down}": torch.ones(4, 64), f"blocks.0.attn9.to_q.{up}": torch.ones(64, 4)}
    for weights, message in (
        ({}, "no LoRA tensor"),
        (foreign, "no linear layer of the base model"),
        ({f"blocks.0.attn1.to_q.{down}": torch.ones(4, 64)}, r"lacks .*lora_B.weight"),
        (
            {f"blocks.0.attn1.to_q.{part}": torch.full((4, 64), torch.nan) for part in (down, up)},
            "the checkpoint's blocks.0.attn1.to_q is not finite: export an earlier one with checkpoint=",
        ),
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


def test_what_is_merged_too_is_of_the_runs_family(trained, tmp_path):
    _, run = trained
    tensors = load_file(run / "export" / "diffusers" / "pytorch_lora_weights.safetensors")
    for header, message in (
        ({"radial.family": "hunyuan"}, "of the family hunyuan; the model is of wan"),
        ({"radial.expert": "low"}, "its expert for low noise levels; the model has one transformer"),
    ):
        save_file(tensors, tmp_path / "other.safetensors", header)
        with pytest.raises(UserError, match=message):
            main([f"run={run}", f"out={tmp_path / 'out'}", "merge=true", f"add={tmp_path / 'other.safetensors'}"])
        assert not (tmp_path / "out").exists()


def test_a_run_of_all_weights_has_no_formats(trained, tmp_path, monkeypatch):
    config, run = trained
    monkeypatch.setattr("train.export.run.read_config", lambda run: replace(config, lora=None))
    for given, name in (
        ({"formats": ["peft"]}, "format"),
        ({"merged": True, "strength": 0.5}, "merge"),
        ({"card": True}, "card, which push= writes too,"),
    ):
        with pytest.raises(UserError, match=f"^{name} is for a LoRA, the run trained all weights: leave it out"):
            export_run(run, out=tmp_path / "out", **given)


def test_a_link_to_a_folder_stays_one(trained, tmp_path):
    _, run = trained
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for _ in range(2):
        (line,) = export_run(run, out=tmp_path / "out", formats=["peft", "peft"])
        assert line.startswith(f"{tmp_path}/out/peft  PeftModel")
    assert (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == [".export", "peft"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_a_full_disk_is_told_and_the_export_before_is_kept(trained, tmp_path, monkeypatch, error):
    _, run = trained
    export_run(run, out=tmp_path / "out", formats=["peft"])

    def full(*_):
        raise error

    monkeypatch.setitem(FORMATS, "comfyui", full)
    with pytest.raises(UserError, match=r"the export to .*out failed \(.*space.*\): make room, or give another out"):
        main([f"run={run}", f"out={tmp_path / 'out'}", "format=comfyui"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "peft").is_dir()


def test_a_damaged_config_of_the_base_model_is_told(trained, tmp_path, monkeypatch):
    config, run = trained
    shutil.copytree(config.model.path, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"_class_name"', encoding="utf-8")
    damaged = replace(config, model=replace(config.model, path=str(tmp_path / "base")))
    monkeypatch.setattr("train.export.run.read_config", lambda run: damaged)
    with pytest.raises(UserError, match=r"base/config.json is not JSON \(.*\): download it again"):
        export_run(run, out=tmp_path / "out")


def test_a_folder_with_other_files_is_not_replaced(trained, tmp_path):
    _, run = trained
    (tmp_path / "precious.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="holds other files"):
        export_run(run, out=tmp_path)
    assert (tmp_path / "precious.txt").read_text(encoding="utf-8") == "mine"


def test_a_card_is_written_without_the_hub(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.export.hub.HfApi", None)
    out = tmp_path / "out"
    main([f"run={trained[1]}", f"out={out}", "format=comfyui", "card=true"])
    assert "README.md  the model card" in capsys.readouterr().out
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## Trained with" in card and "- `comfyui/`: " in card
    main([f"run={trained[1]}", f"out={out}", "format=comfyui"])
    assert not (out / "README.md").exists()


def test_a_card_lies_in_the_folder_though_the_hub_is_not_reached(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run, out = trained[1], tmp_path / "out"
    with pytest.raises(Mistake, match="push is 'mine', expected hub:"):
        main([f"run={run}", f"out={out}", "push=mine"])
    assert not out.exists()
    with pytest.raises(Mistake, match="push to org/mine failed .* give the same command again"):
        main([f"run={run}", f"out={out}", "format=comfyui", "push=hub:org/mine"])
    assert "the model card" in capsys.readouterr().out
    assert (out / "README.md").read_text(encoding="utf-8").startswith("---\nlibrary_name: diffusers")
    assert next((out / "comfyui").glob("*.safetensors"))
