"""Loading an export the way its users will, and comparing every tensor that arrived.

Attached modules prove nothing: loaders add empty LoRA layers for keys that they then fail to fill, and report it only
in a log line. So each file goes through the tool's own loader where that is a library (diffusers, PEFT), and by the
rules of its key names where it is not (ComfyUI, kohya); then values are compared. The base model is a stand-in of its
shapes that takes no memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from train.errors import UserError
from train.export.formats import WEIGHTS, Adapter
from train.lora.keys import of_kohya
from train.lora.layers import MAGNITUDE
from train.lora.layers_by_name import weighted_layers
from train.lora.name_tables import MUSUBI_BLOCKS
from train.lora.names import comfyui_names
from train.lora.reading import Pairs, lora_in, read_lora, trim
from train.models.families import adapter_of
from train.models.pretrained import stand_in

_HUNYUAN_WIDTH = 3072  # diffusers splits HunyuanVideo's fused layers at this very width


def verify(format_name: str, adapter: Adapter, base: Path, folder: Path) -> list[str]:
    """Loads one format's files and compares them with what was exported.

    Args:
        format_name: a key of `train.export.formats.FORMATS`.
        adapter: what was exported.
        base: folder of the base model's transformer; only its config is read.
        folder: with the format's files.

    Returns:
        A line for each loader: what was loaded, by what.

    Raises:
        UserError: something is missing, extra or different for the format's own loader. What a second one cannot read
            stands in its line.
    """
    file = lora_in(folder)
    if not adapter.magnitudes:  # files of DoRAs are not read
        compare_pairs(read_lora(file, adapter.model).pairs, adapter.pairs, "this project", file)
    own, *others = _LOADERS[format_name]
    said = [own(adapter, base, file), *(_tried(load, adapter, base, file) for load in others)]
    return [line for line in said if line]


def _tried(load: Callable[[Adapter, Path, Path], str], adapter: Adapter, base: Path, file: Path) -> str:
    try:
        return load(adapter, base, file)
    except Exception as error:  # of another library, whose file this is not
        reason = " ".join(str(error).split())[:200]
        return f"diffusers does not read this file, format=diffusers is for it ({type(error).__name__}: {reason})"


def _by_pipeline(adapter: Adapter, base: Path, file: Path) -> str:
    model: Any = stand_in(base)
    with _quiet():
        family = adapter_of(adapter.model_class)
        cls: Any = None if family is None or family.pipeline_name is None else family.pipeline_class()
        if hasattr(cls, "load_lora_weights"):
            name = f"{cls.__name__}.load_lora_weights"
            empty_pipeline(cls, model).load_lora_weights(file.parent if file.name == WEIGHTS else file)
        else:  # a pipeline that is not known here, or has none: what all that have one call
            name = f"{adapter.model_class}.load_lora_adapter"
            model.load_lora_adapter(file.parent, weight_name=file.name, prefix="transformer")
    count = compare_pairs(lora_layers(model), adapter.pairs, name, file) + _compare_norms(model, adapter, file)
    return f"{name}: {count} tensors, all equal"


_OWN_NAMES = ("MochiTransformer3DModel", "HunyuanVideo15Transformer3DModel", "MiniMaxH3Transformer3DModel")
"""Whose LoRAs diffusers reads by its own names only; MiniMax-H3's by others in a modular pipeline alone."""


def _by_pipeline_if_wide(adapter: Adapter, base: Path, file: Path) -> str:
    if adapter.model_class in _OWN_NAMES:
        return ""
    if adapter.model_class == "HunyuanVideoTransformer3DModel":
        width = len(weighted_layers(adapter.model)["transformer_blocks.0.attn.to_q"].weight)
        if width != _HUNYUAN_WIDTH:
            return ""
    return _by_pipeline(adapter, base, file)


def _by_peft(adapter: Adapter, base: Path, file: Path) -> str:
    with _quiet():
        model: Any = PeftModel.from_pretrained(stand_in(base), str(file.parent))
    inner = model.base_model.model
    count = compare_pairs(lora_layers(inner), adapter.pairs, "PEFT", file) + _compare_norms(inner, adapter, file)
    return f"PeftModel.from_pretrained: {count} tensors, all equal"


def _compare_norms(model: Any, adapter: Adapter, file: Path) -> int:
    """The number of a DoRA's row norms that arrived as they were exported; 0 of a LoRA.

    Raises:
        UserError: some did not.
    """
    for name, expected in adapter.magnitudes.items():
        (found,) = getattr(model.get_submodule(name), MAGNITUDE).values()
        if found.weight.is_meta or not torch.equal(found.weight, expected.to(found.weight.dtype)):
            raise UserError(f"{file}: the row norms of {name} are not what was exported, expected them as trained")
    return len(adapter.magnitudes)


def _by_names(adapter: Adapter, base: Path, file: Path) -> str:
    """ComfyUI's rule: a known prefix, the layer's name, and factors of the original weight's shape."""
    tensors = load_file(file)
    layers = adapter.fused(comfyui=not any(map(of_kohya, tensors)))
    passed_over = []
    for name, (down, up) in layers.items():
        known = _comfyui_keys(adapter.model_class, name)
        keys = [*known, f"lora_unet_{name.replace('.', '_')}"]
        key = next((k for k in keys if any(f"{k}.{end}.weight" in tensors for end in ("lora_A", "lora_down"))), keys[0])
        if key not in known:
            passed_over.append(name)
        ends = ("lora_down", "lora_up") if key.startswith("lora_unet_") else ("lora_A", "lora_B")
        a, b = (tensors.pop(f"{key}.{end}.weight", None) for end in ends)
        if a is None or b is None or not _same(trim((a, b)), trim((down, up))):
            raise UserError(
                f"{file}: {key}.{ends[0]} and {ends[1]} are not what was exported, it will not work elsewhere"
            )
        alpha = tensors.pop(f"{key}.alpha", None)
        if alpha is not None and alpha.item() != len(a):
            raise UserError(f"{file}: {key}.alpha is {alpha.item()}, expected {len(a)}")
    if tensors:
        raise UserError(f"{file}: {min(tensors)} has no layer in the original checkpoint")
    said = [f"names and shapes of the original checkpoint: {2 * len(layers)} tensors"]
    if passed_over:
        said.append(f"ComfyUI passes over {_such(passed_over, layers)}: give it format=comfyui")
    if key.startswith("lora_unet_") and adapter.model_class in MUSUBI_BLOCKS:
        outside = [name for name in layers if not name.startswith(MUSUBI_BLOCKS[adapter.model_class])]
        if outside:
            only = "it reads only those inside the transformer's layers"
            said.append(f"musubi-tuner passes over {_such(outside, layers)}: {only}")
    return "; ".join(said)


def _such(names: list[str], layers: Collection[str]) -> str:
    return f"{len(names)} of {len(layers)} modules such as {names[0]}"


def _same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, expected, strict=True))


def _comfyui_keys(model_class: str, name: str) -> list[str]:
    """What ComfyUI looks for before ``.lora_A`` and the like."""
    names = comfyui_names(model_class, name)
    return [*(f"diffusion_model.{known}" for known in names), *(f"lora_unet_{n.replace('.', '_')}" for n in names[:1])]


# The format's own loader first; a second one may also read the file.
_LOADERS: dict[str, list[Callable[[Adapter, Path, Path], str]]] = {
    "diffusers": [_by_pipeline],
    "released": [_by_pipeline],
    "comfyui": [_by_names, _by_pipeline_if_wide],
    "kohya": [_by_names],
    "peft": [_by_peft],
}


def empty_pipeline(pipeline_class: Any, transformer: nn.Module) -> Any:
    """A diffusers pipeline with nothing but a transformer."""
    needed = inspect.signature(pipeline_class.__init__).parameters.values()
    parts = {p.name: None for p in needed if p.default is p.empty and p.name != "self"}
    return pipeline_class(**{**parts, "transformer": transformer})


def lora_layers(model: nn.Module, adapter_name: str | None = None) -> Pairs:
    """The LoRA that a library has put into a model: of that name, or the only one.

    Raises:
        UserError: with another strength than 1.
    """
    pairs: Pairs = {}
    for name, module in model.named_modules():
        lora: Any = module
        for adapter in getattr(module, "lora_A", {}):
            if adapter_name not in (None, adapter):
                continue
            if lora.scaling[adapter] != 1.0:
                raise UserError(
                    f"diffusers {diffusers.__version__} scales layer {name} by {lora.scaling[adapter]:g}, expected 1: "
                    "install the version that pyproject.toml asks for"
                )
            pair = lora.lora_A[adapter].weight.detach(), lora.lora_B[adapter].weight.detach()
            if not any(half.is_meta for half in pair):  # else it was attached and never filled
                pairs[name] = pair
    return pairs


def compare_pairs(found: Pairs, expected: Pairs, loader: str, file: Path) -> int:
    """The number of equal tensors.

    Ranks whose column of B is zero change nothing and are left out, and so are layers that have no others: fused layers
    arrive with the ranks of their neighbours, and a layer that never had a gradient is still as it started.

    Raises:
        UserError: a layer is missing, extra or different.
    """
    loaded, wanted = _used(found), _used(expected)
    for name in sorted(loaded.keys() | wanted.keys()):
        if name not in loaded or name not in wanted:
            where = "missing" if name in wanted else "extra"
            raise UserError(f"{file}: layer {name} is {where} after {loader} has loaded it")
        if not _same(loaded[name], wanted[name]):
            raise UserError(f"{file}: layer {name} has other values after {loader} has loaded it")
    return 2 * len(wanted)


def _used(pairs: Pairs) -> Pairs:
    trimmed = {name: trim(pair) for name, pair in pairs.items()}
    return {name: pair for name, pair in trimmed.items() if len(pair[0])}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the libraries' remarks on what they load; what matters is compared."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(level)
