"""Merged checkpoints: values, shards, folders and memory."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.stock_models import TARGETS, load_transformer, output, random_lora, save_transformer
from train.errors import UserError
from train.export.merge import merge
from train.export.run import folded
from train.lora.reading import Lora, read_lora
from train.models.pretrained import stand_in

TARGET = TARGETS["wan"]


@pytest.fixture
def base(tmp_path):
    return save_transformer("wan", tmp_path / "base")


def lora_of(base, seed=1):
    return Lora(folded(random_lora(load_transformer(base), TARGET, seed=seed), 6))


def expected(base, *loras):
    tensors = load_file(base / "diffusion_pytorch_model.safetensors")
    for lora, strength in loras:
        for name, (down, up) in lora.pairs.items():
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + strength * (up @ down)
    return tensors


def test_strengths_and_several_loras_add_up(base, tmp_path):
    loras = [(lora_of(base), 0.7), (lora_of(base, seed=2), -0.4)]
    merge(base, tmp_path / "merged", loras, None)
    got = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    for name, tensor in expected(base, *loras).items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stored", [None, 6000])
def test_shards_with_an_index_load_in_diffusers(tmp_path, stored):
    """From one file or from shards, to shards of another size."""
    base = save_transformer("wan", tmp_path / "base", max_shard_size=stored or "10GB")
    assert (len(list(base.glob("*.safetensors"))) > 1) == (stored is not None)
    loras = [(lora_of(base), 1.0)]
    before = output(load_transformer(base), "wan")
    merge(base, tmp_path / "merged", loras, None, shard_bytes=9000)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads(
        (tmp_path / "merged" / "diffusion_pytorch_model.safetensors.index.json").read_text(encoding="utf-8")
    )
    for file in files:
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
            assert names == {name for name, place in index["weight_map"].items() if place == file.name}
            size = sum(tensors.get_tensor(name).nbytes for name in names)
        assert size <= 9000 or len(names) == 1
    model = load_transformer(base)
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name, (down, up) in loras[0][0].pairs.items():
            layers[name].weight += up @ down
    got = output(load_transformer(tmp_path / "merged"), "wan")
    torch.testing.assert_close(got, output(model, "wan"), rtol=0, atol=1e-5)
    assert (got - before).abs().max() > 1e-2


def test_bf16_is_the_rounded_fp32_merge(base, tmp_path):
    """And what diffusers keeps in fp32 stays in fp32."""
    lora = lora_of(base)
    merge(base, tmp_path / "merged", [(lora, 1.0)], torch.bfloat16)
    got = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    exact = [name for name in got if "norm2" in name or "scale_shift_table" in name or "time_embedder" in name]
    assert len(exact) == 2 * 3 + 4 + 4
    for name, tensor in expected(base, (lora, 1.0)).items():
        assert got[name].dtype == (torch.float32 if name in exact else torch.bfloat16), name
        torch.testing.assert_close(got[name].float(), tensor.to(got[name].dtype).float(), rtol=1e-2, atol=1e-6)


def test_whole_differences_are_merged(base, tmp_path):
    """Biases and norms, as distilled LoRAs change them."""
    file = tmp_path / "style.safetensors"
    changes = {
        "diffusion_model.blocks.0.cross_attn.k.diff_b": torch.randn(32),
        "diffusion_model.blocks.1.norm3.diff": torch.randn(32),
        "diffusion_model.patch_embedding.diff": torch.randn(32, 4, 1, 2, 2),
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.randn(2, 32),
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.randn(48, 2),
        "diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(1.0),
    }
    save_file(changes, file)
    merge(base, tmp_path / "merged", [(read_lora(file, stand_in(base)), 0.5)], None)
    before = load_file(base / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    values = list(changes.values())
    names = [
        "blocks.0.attn2.to_k.bias",
        "blocks.1.norm2.weight",
        "patch_embedding.weight",
        "blocks.0.ffn.net.0.proj.weight",
    ]
    for name, change in zip(names, [*values[:3], 0.5 * values[4] @ values[3]], strict=True):
        torch.testing.assert_close(after[name] - before[name], 0.5 * change, rtol=1e-4, atol=1e-5)
    assert [name for name in before if not torch.equal(before[name], after[name])] == sorted(names)


def test_a_pipelines_folder_comes_whole(tmp_path):
    base = save_transformer("wan", tmp_path / "wan" / "transformer")
    (tmp_path / "wan" / "model_index.json").write_text("{}", encoding="utf-8")
    (tmp_path / "wan" / ".cache").mkdir()
    (tmp_path / "wan" / "vae").mkdir()
    weights = tmp_path / "wan" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"weights")
    merge(base, tmp_path / "merged", [(lora_of(base), 1.0)], None)
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == ["model_index.json", "transformer", "vae"]
    assert (tmp_path / "merged" / "vae" / weights.name).samefile(weights)
    merged = tmp_path / "merged" / "transformer"
    assert sorted(path.name for path in merged.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    load_transformer(merged)


def test_mistakes_are_found_before_anything_is_written(base, tmp_path):
    other = Lora({"blocks.0.attn1.to_q": (torch.ones(2, 64), torch.ones(64, 2))})
    with pytest.raises(UserError, match="a LoRA changes blocks.0.attn1.to_q.weight"):
        merge(base, tmp_path / "merged", [(other, 1.0)], None)
    assert not (tmp_path / "merged").exists()
    huge = lora_of(base)
    huge.pairs["blocks.0.attn1.to_q"][0].fill_(3e38)
    with pytest.raises(UserError, match="blocks.0.attn1.to_q.weight is not finite after the merge"):
        merge(base, tmp_path / "merged", [(huge, 100.0)], None)


MEASURE = """
import os, sys, threading, time, torch
from pathlib import Path
from train.export.merge import merge
from train.lora.reading import Lora
base, out, shard = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
pairs = {f"blocks.{i}.attn1.{n}": (torch.randn(16, 1024), torch.randn(1024, 16))
         for i in range(24) for n in ("to_q", "to_k", "to_v", "to_out.0")}
torch.ones(512, 512) @ torch.ones(512, 512)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, most = resident(), [0]
def watch():
    while True:
        most[0] = max(most[0], resident())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
merge(base, out, [(Lora(pairs), 1.0)], torch.bfloat16, shard_bytes=shard)
print(most[0] - before)
"""


@pytest.mark.slow
def test_memory_is_at_most_two_shards(tmp_path):
    """A model of 1.6 GB in fp32, 0.8 GB merged to bf16 in shards of 150 MB: measured in a process of its own."""
    from diffusers import WanTransformer3DModel

    shard = 150 * 10**6
    model = WanTransformer3DModel(num_attention_heads=8, num_layers=24, ffn_dim=4096, text_dim=256)
    assert sum(p.nbytes for p in model.parameters()) > 10 * shard
    model.save_pretrained(tmp_path / "base", max_shard_size="400MB")
    del model
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "base"), str(tmp_path / "merged"), str(shard)],
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 4
    assert 0.8 * shard < int(done.stdout) <= 2 * shard
