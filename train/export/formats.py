"""A LoRA as the files that other tools load.

    diffusers   <pipeline>.load_lora_weights(folder), <transformer>.load_lora_adapter for a pipeline without that
    comfyui     ComfyUI's LoRA loaders, WanVideoWrapper, LightX2V, DiffSynth, FastVideo, SGLang; names of the original
                checkpoint after `diffusion_model.`, or ComfyUI's where it takes no others
    kohya       kohya's trainers and what reads their files; names of the original checkpoint with underscores (ComfyUI
                reads them too, but HunyuanVideo's feed-forward, modulation and embedding layers, and of
                HunyuanVideo-1.5 also q, k and v; musubi-tuner reads only those inside the transformer's layers)
    peft        PeftModel.from_pretrained(transformer, folder)
    released    the folder that the released HunyuanVideo inference script takes

Alpha is in the weights, so that strength 1 is the trained strength in every tool. Where the original checkpoint stacks
layers in one matrix, their LoRAs become one of their ranks' sum whose B is block-diagonal, which is the same change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from train.errors import UserError
from train.lora.layers import MAGNITUDE
from train.lora.layers_by_name import weighted_layers
from train.lora.name_tables import TABLES
from train.lora.names import OriginalLayer, comfyui_layers, comfyui_names, original_layers
from train.lora.reading import Pairs

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""


@dataclass(frozen=True)
class Adapter:
    """What is exported.

    Attributes:
        pairs: the LoRA, alpha folded in, in the dtype of the files.
        model: the transformer that it is for; only names and shapes are read, so it may lie on the meta device.
        header: goes into every file's metadata: how the LoRA was trained.
        base_model: public name of the model.
        name: stem of the files that have no name given by their format.
        magnitudes: of a DoRA, by layer, (out,).
    """

    pairs: Pairs
    model: nn.Module
    header: dict[str, str]
    base_model: str
    name: str
    magnitudes: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """By PEFT's names after a prefix."""
        found = {f"{prefix}{name}.{MAGNITUDE}": norms for name, norms in self.magnitudes.items()}
        return named_tensors(self.pairs, prefix) | found

    @property
    def model_class(self) -> str:
        """The diffusers class."""
        return type(self.model).__name__

    def fused(self, *, comfyui: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """The LoRA of each layer of the original checkpoint: A (sum of ranks, in), B (all rows, sum of ranks).

        Args:
            comfyui: of the checkpoint that ComfyUI loads.

        Raises:
            UserError: a layer that `train.lora.name_tables` lacks.
        """
        layers = weighted_layers(self.model)
        found = {}
        left = set(self.pairs)
        for layer in (comfyui_layers if comfyui else original_layers)(self.model_class, layers):
            if not left.isdisjoint(layer.parts):
                found[layer.name] = _fuse(layer, self.pairs, [len(layers[part].weight) for part in layer.parts])
                left -= set(layer.parts)
        if left:
            raise UserError(f"layer {min(left)} has no name in the original checkpoint: give format=diffusers,peft")
        return found


def _fuse(layer: OriginalLayer, pairs: Pairs, rows: list[int]) -> tuple[Tensor, Tensor]:
    present = [pairs.get(part) for part in layer.parts]
    down = torch.cat([pair[0] for pair in present if pair is not None])
    up = down.new_zeros(sum(rows), len(down))
    row = column = 0
    for pair, height in zip(present, rows, strict=True):
        if pair is not None:
            width = len(pair[0])
            up[row : row + height, column : column + width] = pair[1]
            column += width
        row += height
    return down, torch.cat(up.chunk(2)[::-1]) if layer.swapped else up


def _save(tensors: dict[str, Tensor], file: Path, adapter: Adapter) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # clones, since two names for one storage are refused
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt", **adapter.header})


def named_tensors(pairs: Pairs, prefix: str = "") -> dict[str, Tensor]:
    """The pairs as ``<prefix><layer>.lora_A.weight`` and ``lora_B``."""
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = down
        tensors[f"{prefix}{name}.lora_B.weight"] = up
    return tensors


def _diffusers(adapter: Adapter, folder: Path) -> None:
    _save(adapter.tensors("transformer."), folder / WEIGHTS, adapter)


def _comfyui(adapter: Adapter, folder: Path) -> None:
    fused = adapter.fused(comfyui=True)
    rank = max(len(down) for down, _ in fused.values())
    named = {comfyui_names(adapter.model_class, name)[-1]: _filled_up(pair, rank) for name, pair in fused.items()}
    _save(named_tensors(named, "diffusion_model."), folder / f"{adapter.name}.safetensors", adapter)


def _filled_up(pair: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """The same product with ``rank`` ranks: diffusers before 0.40 scales a layer by its rank over the others'."""
    more = rank - len(pair[0])
    return nn.functional.pad(pair[0], (0, 0, 0, more)), nn.functional.pad(pair[1], (0, more))


def _kohya(adapter: Adapter, folder: Path) -> None:
    tensors = {}
    for name, (down, up) in adapter.fused().items():
        layer = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{layer}.lora_down.weight"] = down
        tensors[f"{layer}.lora_up.weight"] = up
        tensors[f"{layer}.alpha"] = torch.tensor(float(len(down)))  # not every rank is a number in bf16
    _save(tensors, folder / f"{adapter.name}.safetensors", adapter)


def _peft(adapter: Adapter, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {name: len(down) for name, (down, _) in adapter.pairs.items()}
    rank = max(ranks.values())
    others = {name: found for name, found in ranks.items() if found != rank}
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        use_dora=bool(adapter.magnitudes),
        target_modules=sorted(ranks),
        base_model_name_or_path=adapter.base_model,
    ).save_pretrained(str(folder))
    _save(adapter.tensors("base_model.model."), folder / "adapter_model.safetensors", adapter)


def _released(adapter: Adapter, folder: Path) -> None:
    _diffusers(adapter, folder)
    rank = max(len(down) for down, _ in adapter.pairs.values())
    # the script multiplies by their quotient
    (folder / "lora_config.json").write_text(
        json.dumps({"lora_params": {"lora_rank": rank, "lora_alpha": rank}}, indent=1), encoding="utf-8"
    )


FORMATS: dict[str, Callable[[Adapter, Path], None]] = {
    "diffusers": _diffusers,
    "comfyui": _comfyui,
    "kohya": _kohya,
    "peft": _peft,
    "released": _released,
}


def formats_of(model_class: str, *, dora: bool = False) -> list[str]:
    """The formats that there are for a model; a DoRA has those whose libraries are known to load it exactly."""
    if dora or model_class not in TABLES:
        return ["diffusers", "peft"]
    return [name for name in FORMATS if name != "released" or model_class == "HunyuanVideoTransformer3DModel"]


def check_formats(names: list[str], model_class: str, *, dora: bool = False) -> None:
    """Refuses a format that does not exist, or not for this model.

    Raises:
        UserError: naming it.
    """
    for name in names:
        if name not in FORMATS:
            raise UserError(f"format is {name!r}, expected some of {','.join(FORMATS)}")
        if name not in formats_of(model_class, dora=dora):
            instead = ", ".join(formats_of(model_class, dora=dora))
            kind, way = ("DoRA (lora.dora)", ", or merge=true for all tools") if dora else (model_class, "")
            raise UserError(f"format {name} is not there for a {kind}, expected some of {instead}{way}")
