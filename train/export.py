"""Taking a trained LoRA away: adapter files and a merged model.

    <run>/export/
        peft/                                    PEFT layout: PeftModel.from_pretrained(base, folder)
        diffusers/pytorch_lora_weights.safetensors   pipeline.load_lora_weights(folder)
        merged/                                  diffusers model folder with the LoRA in its weights

The diffusers file has no alpha: alpha / rank is folded into B, so that strength 1.0 is the trained strength.
A run that trains all weights (``lora: null``) exports ``model/`` alone.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from train import __version__
from train.checkpoint import last_checkpoint, load_state, load_weights
from train.config import LoraSettings, RunConfig
from train.errors import UserError
from train.models import load_adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_config(run: Path) -> RunConfig:
    """The config that a run was started with.

    Raises:
        UserError: not a run folder, or a config of another version of this project.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run} has no config.yaml, expected a run folder such as runs/shapes_4x/<time>")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(file))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{file} does not fit this version: {str(error).splitlines()[0]}") from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RunConfig)
    return config


def export_run(run: Path, *, out: Path | None = None, checkpoint: Path | None = None, dtype: str = "fp32") -> Path:
    """Writes the export folder of a run and returns it.

    Args:
        run: the run folder.
        out: where to, ``<run>/export`` by default; replaced as a whole when it exists.
        checkpoint: a step-* folder, the newest by default.
        dtype: of the merged model's weights, ``fp32`` or ``bf16``; the merge itself is done in fp32.

    Raises:
        UserError: no run, no checkpoint, or weights that do not fit the base model; nothing is written then.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    config = read_config(run)
    checkpoint = checkpoint or last_checkpoint(run)
    out = out or run / "export"
    weights = load_weights(checkpoint)
    if out.exists() and not out.is_dir():
        raise UserError(f"out {out} is a file, expected a folder")
    if out.exists() and any(out.iterdir()) and not (out / ".export").exists():
        raise UserError(f"out {out} holds other files, expected a new folder or an earlier export")
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        (temporary / ".export").touch()
        transformer = load_adapter(config.model, torch.float32, config.seed).transformer
        if config.lora is None:
            transformer.load_state_dict(weights)
            _save_model(transformer, DTYPES[dtype], temporary / "model")
        else:
            _save_adapters(config, config.lora, load_state(checkpoint)["global_step"], weights, temporary)
            merge_lora(transformer, weights, config.lora.alpha / config.lora.rank)
            _save_model(transformer, DTYPES[dtype], temporary / "merged")
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def merge_lora(transformer: Any, weights: dict[str, Tensor], scale: float) -> int:
    """Adds scale B A to the weights that carry a LoRA, in place, and returns how many there are.

    Args:
        transformer: the base model, fp32, without LoRA layers.
        weights: ``<module>.lora_A.weight`` and ``<module>.lora_B.weight``.
        scale: alpha / rank.

    Raises:
        UserError: no LoRA tensors, a lone one, or one that does not fit the model. The model is unchanged then.
    """
    modules = _lora_modules(weights)
    layers = dict(transformer.named_modules())
    deltas: dict[str, Tensor] = {}
    for name in modules:
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear):
            raise UserError(f"the LoRA covers {name}, which is no linear layer of the base model: check model.path")
        delta = weights[f"{name}.lora_B.weight"].float() @ weights[f"{name}.lora_A.weight"].float()
        if delta.shape != layer.weight.shape:
            raise UserError(
                f"the LoRA of {name} is for a {tuple(delta.shape)} weight, the base model has "
                f"{tuple(layer.weight.shape)}: check model.path"
            )
        deltas[name] = delta
    with torch.no_grad():
        for name, delta in deltas.items():
            layers[name].weight += (scale * delta).to(layers[name].weight)
    return len(deltas)


def _save_model(transformer: Any, dtype: torch.dtype, folder: Path) -> None:
    if dtype != torch.float32:  # on a model that is in fp32 already, diffusers warns for nothing
        transformer.to(dtype)
    transformer.save_pretrained(folder)


def _lora_modules(weights: dict[str, Tensor]) -> list[str]:
    names = sorted({key.rsplit(".lora_", 1)[0] for key in weights if ".lora_" in key})
    if not names:
        raise UserError("the checkpoint holds no LoRA tensor, nothing to export")
    for name in names:
        for part in ("A", "B"):
            if f"{name}.lora_{part}.weight" not in weights:
                raise UserError(f"the checkpoint lacks {name}.lora_{part}.weight, its other half is there")
    return names


def _save_adapters(config: RunConfig, lora: LoraSettings, step: int, weights: dict[str, Tensor], out: Path) -> None:
    modules = _lora_modules(weights)
    peft = out / "peft"
    peft.mkdir()
    LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=modules, base_model_name_or_path=_public_name(config)
    ).save_pretrained(str(peft))
    metadata = {"format": "pt", **_metadata(config, lora, step)}
    plain = {key: tensor.contiguous() for key, tensor in weights.items()}
    save_file({f"base_model.model.{k}": t for k, t in plain.items()}, peft / "adapter_model.safetensors", metadata)

    scale = lora.alpha / lora.rank
    folded = {f"transformer.{k}": t * scale if ".lora_B." in k else t.clone() for k, t in plain.items()}
    (out / "diffusers").mkdir()
    save_file(folded, out / "diffusers" / "pytorch_lora_weights.safetensors", metadata)


def _public_name(config: RunConfig) -> str:
    """The base model's name without the path of this machine: adapters are made to be passed on."""
    assert config.model.path is not None, "a LoRA has a base model"
    return config.model.path.removeprefix("hub:") if ":" in config.model.path else Path(config.model.path).name


def _metadata(config: RunConfig, lora: LoraSettings, step: int) -> dict[str, str]:
    """How the LoRA was trained: enough to set up inference from the file alone. Safetensors headers hold strings."""
    attention: dict[str, Any] = {
        name: getattr(config.attention, name)
        for name in ("pattern", "rule", "decay", "block", "dense_layers", "dense_sigma")
    }
    clip = {"frames": config.clip.frames, "height": config.clip.height, "width": config.clip.width}
    about = {
        "base_model": _public_name(config),
        "rank": lora.rank,
        "alpha": lora.alpha,
        "shift": config.objective.shift,
        "step": step,
        "version": __version__,
    }
    return {f"radial.{k}": str(v) for k, v in {**about, **attention, **clip}.items()}


def main(arguments: list[str]) -> None:
    """``python -m train.export run=<folder> [out=<folder>] [checkpoint=<step folder>] [dtype=fp32|bf16]``."""
    from train.compose import split_arguments

    settings = split_arguments(arguments)
    unknown = settings.keys() - {"run", "out", "checkpoint", "dtype"}
    if unknown:
        raise UserError(f"{min(unknown)} is not a known key, expected run, out, checkpoint or dtype")
    if "run" not in settings:
        raise UserError("run is not set, give run=<run folder> such as run=runs/shapes_4x/<time>")
    out, checkpoint = settings.get("out"), settings.get("checkpoint")
    written = export_run(
        Path(settings["run"]),
        out=Path(out) if out else None,
        checkpoint=Path(checkpoint) if checkpoint else None,
        dtype=settings.get("dtype", "fp32"),
    )
    for file in sorted(path for path in written.rglob("*.safetensors")):
        print(f"{file}  {file.stat().st_size / 2**20:,.1f} MiB")


if __name__ == "__main__":
    import sys

    from train.cli import guarded

    guarded(main, sys.argv[1:], main.__doc__ or "")
