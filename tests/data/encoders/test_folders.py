"""Folders of weights: told apart by fingerprints, refused where they are damaged or another model's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.encoders import encoder_class, fingerprint, load_encoder
from data.encoders.base import Encoder, EncoderSettings
from data.errors import DataError
from tests.helpers.tiny_models import save_mochi, save_wan


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"wan": save_wan(tmp_path_factory.mktemp("wan")), "mochi": save_mochi(tmp_path_factory.mktemp("mochi"))}


def load(family: str, folder: Path) -> Encoder:
    return load_encoder(family, EncoderSettings(folder, torch.device("cpu"), torch.float32, torch.float32))


def test_fingerprints_tell_weights_apart(tmp_path: Path, folders: dict[str, Path]) -> None:
    known = fingerprint("wan", folders["wan"])
    copy = shutil.copytree(folders["wan"], tmp_path / "copy")
    assert fingerprint("wan", copy) == known and known.startswith("wan:vae-")
    tensors = load_file(copy / "vae" / "diffusion_pytorch_model.safetensors")
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, copy / "vae" / f"part-{i}.safetensors")
    assert fingerprint("wan", copy) == known, "how weights are split into files does not matter"
    tensors[names[0]].view(-1)[-1] += 1
    save_file({name: tensors[name] for name in names[::2]}, copy / "vae" / "part-0.safetensors")
    other = fingerprint("wan", copy)
    assert other.split("+")[1] == known.split("+")[1] and other.split("+")[0] != known.split("+")[0]
    other_text = fingerprint("wan", save_wan(tmp_path / "other", seed=1))
    assert other_text.split("+")[1] != known.split("+")[1]


def test_image_encoders_are_told_apart(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Where image conditions are written, and only there; a folder without an image encoder has none to tell."""
    folder = save_wan(tmp_path / "image", image=True)
    plain, known = fingerprint("wan", folder), fingerprint("wan", folder, image_to_video=True)
    assert known.startswith(f"{plain}+image-") and fingerprint("wan", folders["wan"], image_to_video=True) == plain
    settings = folder / "image_processor" / "preprocessor_config.json"
    settings.write_text(settings.read_text(encoding="utf-8").replace("0.48145466", "0.5"), encoding="utf-8")
    assert fingerprint("wan", folder) == plain != known != fingerprint("wan", folder, image_to_video=True)


@pytest.mark.parametrize(("part", "tensor"), [
    ("vae", "decoder.conv_in.weight"), ("text_encoder", "encoder.block.1.layer.1.layer_norm.weight"),
    ("text_encoder", "shared.weight"),
])  # fmt: skip
def test_weights_that_lack_a_tensor_or_have_it_in_another_shape_are_refused(
    tmp_path: Path, folders: dict[str, Path], part: str, tensor: str
) -> None:
    broken = shutil.copytree(folders["wan"], tmp_path / "broken")
    (file,) = (broken / part).glob("*.safetensors")
    tensors = load_file(file)
    kept = tensors.pop(tensor)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(DataError, match=rf"broken/{part}: missing in the weights, by its config.json: .*{tensor}"):
        load("wan", broken)
    save_file({**tensors, tensor: torch.cat([kept, kept])}, file, {"format": "pt"})
    with pytest.raises(DataError, match=rf"broken/{part}: of another shape in the weights, .*: {tensor};"):
        load("wan", broken)


def test_weights_that_are_cut_off_are_a_line(tmp_path: Path, folders: dict[str, Path]) -> None:
    broken = shutil.copytree(folders["wan"], tmp_path / "broken")
    file = broken / "text_encoder" / "model.safetensors"
    whole = file.read_bytes()
    for length in (len(whole) - 64, 100, 3):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"broken/text_encoder: cannot be loaded as UMT5EncoderModel: .*header"):
            load("wan", broken)
        with pytest.raises(DataError, match=r"model.safetensors: is damaged or cut off \(.*; download it again"):
            fingerprint("wan", broken)


def test_wrong_folders_are_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"vae: missing, expected this part of a diffusers model folder"):
        fingerprint("wan", tmp_path)
    with pytest.raises(DataError, match="holds a AutoencoderKLMochi, expected a AutoencoderKLWan; choose the model="):
        load("wan", folders["mochi"])
    broken = shutil.copytree(folders["wan"], tmp_path / "broken")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match=r"vae: cannot be loaded as AutoencoderKLWan"):
        load("wan", broken)
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"has no \*.safetensors"):
        fingerprint("wan", broken)
    with pytest.raises(DataError, match="model is 'flux'"):
        fingerprint("flux", tmp_path)


@pytest.mark.slow
def test_a_mistake_is_one_line_without_torchvision_too() -> None:
    """transformers' warning that another class serves in place of torchvision's would be a second one."""
    words = ["source=s", "out=o", "model=wan", "weights=nowhere"]
    ran = subprocess.run([sys.executable, "-m", "data.prepare", *words], capture_output=True, encoding="utf-8")
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1, ran.stderr


@pytest.mark.parametrize(("heads", "size"), [(12, (480, 832)), (40, (720, 1280)), (None, (720, 1280))])
def test_clips_of_the_1_3b_are_of_480p_unless_told_otherwise(tmp_path: Path, heads: int | None, size: Any) -> None:
    if heads is not None:
        (tmp_path / "transformer").mkdir()
        (tmp_path / "transformer" / "config.json").write_text(f'{{"num_attention_heads": {heads}}}', encoding="utf-8")
    assert encoder_class("wan").size_of(tmp_path) == size
    assert encoder_class("hunyuan").size_of(tmp_path) == encoder_class("hunyuan").facts.size
