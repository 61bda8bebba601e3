"""Reading a LoRA in any of the formats that this project writes or its users meet.

Names may be those of the diffusers model or of the original checkpoint, with any of the usual prefixes, with dots or
underscores; a layer of the original checkpoint that is several of diffusers' is split. Nothing is passed over: a tensor
that fits no layer of the model is an error, because a LoRA that is only half loaded looks like a bad LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from train.errors import UserError
from train.export.names import comfyui_names, original_layers, original_parameters
from train.export.scaling import Scaling, config_beside

Pairs = dict[str, tuple[Tensor, Tensor]]
"""Layer of the diffusers model -> (A, B), (rank, in) and (out, rank): the weight's change at strength 1 is B A."""

_PREFIXES = re.compile(r"(base_model\.model\.)?(model\.)?(transformer\.|diffusion_model\.|unet\.|lora_unet__?)?")
_ENDINGS = re.compile(
    r"\.(?:(?P<down>lora_A(?:\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight)"
    r"|(?P<up>lora_B(?:\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight)"
    r"|(?P<up_bias>lora_B(?:\.\w+)?\.bias)"
    r"|(?P<alpha>alpha)|(?P<diff>diff)|(?P<modulation>diff_m)|(?P<bias>diff_b))$"
)
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


@dataclass
class Lora:
    """What a LoRA file changes, float32, at strength 1: alpha is in the tensors.

    Attributes:
        pairs: low-rank changes of linear layers.
        differences: whole changes of parameters (biases, norms, modulations, convolutions), by their names in the
            diffusers model.
        header: the file's metadata.
    """

    pairs: Pairs
    differences: dict[str, Tensor] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)


def read_lora(path: str | Path, model: nn.Module) -> Lora:
    """The LoRA of a file, or of a folder with one file, for a diffusers transformer without LoRA layers.

    Raises:
        UserError: not a safetensors file, a kind of adapter that is no LoRA, or tensors that do not fit the model.
    """
    file, config = find_file(Path(path).expanduser())
    tensors, header = _load(file)
    scaling = Scaling.of(header, config, file)
    return _assemble(tensors, header, scaling, model, file)


def read_header(path: str | Path) -> dict[str, str]:
    """The metadata of a LoRA file, or of a folder with one file.

    Raises:
        UserError: there is no safetensors file.
    """
    return _load(find_file(Path(path).expanduser())[0], header_only=True)[1]


def trim(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same product without the ranks whose column of B is zero: undoes the stacking of a fused layer."""
    used = pair[1].any(dim=0)
    return pair[0][used], pair[1][:, used]


def weighted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that have a ``weight``, by name."""
    return {name: module for name, module in model.named_modules() if getattr(module, "weight", None) is not None}


def find_file(path: Path) -> tuple[Path, dict[str, Any]]:
    """The safetensors file and its config, PEFT's or the released script's; of an export's folder those for diffusers.

    Raises:
        UserError: there is none, or several; or the config is not readable.
    """
    if (path / "diffusers").is_dir():
        path = path / "diffusers"
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(f"{path} holds {len(files)} safetensors files, expected one: name the file")
        path = files[0]
    if not path.is_file():
        raise UserError(f"{path} is missing, expected a LoRA: a .safetensors file, or a folder with one")
    return path, config_beside(path)


def _load(file: Path, *, header_only: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as stream:
            names = [] if header_only else list(stream.keys())
            return {name: stream.get_tensor(name) for name in names}, dict(stream.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not readable as safetensors: {error}") from error


@dataclass(frozen=True)
class _Target:
    """A layer that tensors of a file name: one of diffusers', or one of the original checkpoint that holds several.

    Attributes:
        parameter: of the modules, that a whole difference changes.
    """

    name: str
    parts: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    swapped: bool = False
    parameter: str = "weight"

    def split(self, rows: Tensor) -> list[Tensor]:
        """The rows of each part."""
        if self.swapped:
            rows = torch.cat(rows.chunk(2)[::-1])
        return [piece.contiguous() for piece in rows.split([len(_tensor(m, self.parameter)) for m in self.modules])]


def _assemble(
    tensors: Mapping[str, Tensor], header: dict[str, str], scaling: Scaling, model: nn.Module, file: Path
) -> Lora:
    lora = Lora({}, {}, header)
    for target, found in _group(tensors, model, file):
        scale = 1.0
        if "down" in found and "up" in found:
            rank = _rank(target, found, file)
            scale = found["alpha"].item() / rank if "alpha" in found else scaling.of_layer(target.name, rank)
            down, up = found["down"].float(), found["up"].float() * scale
            if isinstance(target.modules[0], _CONVOLUTIONS):
                found["diff"] = found.get("diff", 0) + _product(target, down, up, file)
            else:
                for part, pair in _pairs(target, down, up, file):
                    if part in lora.pairs:
                        raise UserError(f"{file}: layer {part} is there twice, under two names")
                    lora.pairs[part] = pair
        elif not found.keys() <= {"diff", "bias"}:
            raise UserError(f"{file}: layer {target.name} has {' and '.join(found)} of a LoRA, the rest is missing")
        if "up_bias" in found:
            found["bias"] = found["up_bias"] * scale
        for kind, parameter in (("diff", target.parameter), ("bias", "bias")):
            for name, change in _whole(target, parameter, found[kind].float(), file) if kind in found else ():
                if name in lora.differences:
                    raise UserError(f"{file}: the change of {name} is there twice, under two names")
                lora.differences[name] = change
    if not lora.pairs and not lora.differences:
        raise UserError(f"{file} holds no LoRA tensor")
    return lora


def _group(tensors: Mapping[str, Tensor], model: nn.Module, file: Path) -> Iterable[tuple[_Target, dict[str, Tensor]]]:
    """The tensors of each layer by their kind: down, up, up_bias, alpha, diff, bias."""
    targets = _targets(model)
    found: dict[str, tuple[_Target, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        prefix, ending = _PREFIXES.match(key), _ENDINGS.search(key)
        assert prefix is not None  # it may be empty
        kinds = [kind for kind, matched in ending.groupdict().items() if matched] if ending else []
        name = key[prefix.end() : ending.start()] if ending else ""
        if kinds == ["modulation"]:  # a short way to write that of a block
            name, kinds = f"{name}.modulation", ["diff"]
        target = targets.get(name)
        if target is None or (target.parameter != "weight" and kinds != ["diff"]):
            raise UserError(
                f"{file}: tensor {key} fits no layer of {type(model).__name__}, expected a LoRA for this very model"
            )
        of_layer = found.setdefault(target.name, (target, {}))[1]
        if kinds[0] in of_layer:
            raise UserError(
                f"{file}: {kinds[0]} of layer {target.name} is there twice, once as {key}: expected one LoRA"
            )
        of_layer[kinds[0]] = tensor
    return found.values()


def _rank(target: _Target, found: Mapping[str, Tensor], file: Path) -> int:
    """Of a layer's pair, whose tensors have the dimensions that are needed to tell."""
    down, up = found["down"], found["up"]
    if min(down.ndim, up.ndim) < 2 or not len(down):
        raise UserError(
            f"{file}: layer {target.name} has factors {tuple(up.shape)} and {tuple(down.shape)}, expected (rows, rank) "
            "and (rank, columns): is the file damaged?"
        )
    if "alpha" in found and found["alpha"].numel() != 1:
        raise UserError(f"{file}: alpha of layer {target.name} has {found['alpha'].numel()} values, expected one")
    return len(down)


def _targets(model: nn.Module) -> dict[str, _Target]:
    """What a file may change, by each name that a tool may give it."""
    model_class, layers = type(model).__name__, weighted_layers(model)
    targets = {name: _Target(name, (name,), (module,)) for name, module in layers.items()}
    for layer in original_layers(model_class, layers):
        modules = tuple(layers[part] for part in layer.parts)
        target = _Target(layer.name, layer.parts, modules, layer.swapped)
        targets |= dict.fromkeys((layer.name, *comfyui_names(model_class, layer.name)), target)
    for name, ours in original_parameters(model_class, dict(model.named_parameters())).items():
        part, _, parameter = ours.rpartition(".")
        targets[name] = _Target(name, (part,), (model.get_submodule(part),), parameter=parameter)
    return targets | {name.replace(".", "_"): target for name, target in targets.items()}


def _pairs(target: _Target, down: Tensor, up: Tensor, file: Path) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each part's A and B; none for a part whose rows of B are all zero, as fused layers have them."""
    rows = sum(len(_tensor(module, "weight")) for module in target.modules)
    columns = _tensor(target.modules[0], "weight").shape[1]
    linear = all(isinstance(module, nn.Linear) for module in target.modules)
    if not linear or (*up.shape, *down.shape) != (rows, len(down), len(down), columns):
        raise UserError(
            f"{file}: layer {target.name} has factors {tuple(up.shape)} and {tuple(down.shape)}, expected "
            f"({rows}, rank) and (rank, {columns}): is the LoRA for another model?"
        )
    for part, piece in zip(target.parts, target.split(up), strict=True):
        pair = (down, piece) if len(target.parts) == 1 else trim((down, piece))
        if len(pair[0]):
            yield part, pair


def _whole(target: _Target, parameter: str, change: Tensor, file: Path) -> Iterator[tuple[str, Tensor]]:
    """Each part's change of a whole parameter."""
    own: list[Tensor | None] = [getattr(module, parameter, None) for module in target.modules]
    fits = change.ndim > 0 and all(tensor is not None and tensor.shape[1:] == change.shape[1:] for tensor in own)
    if not fits or sum(len(tensor) for tensor in own if tensor is not None) != len(change):
        shapes = ", ".join("none" if tensor is None else str(tuple(tensor.shape)) for tensor in own)
        raise UserError(
            f"{file}: {parameter} of {target.name} changes by a {tuple(change.shape)} tensor, the model has {shapes}"
        )
    for part, piece in zip(target.parts, target.split(change), strict=True):
        yield f"{part}.{parameter}".removeprefix("."), piece


def _product(target: _Target, down: Tensor, up: Tensor, file: Path) -> Tensor:
    """The whole change of a convolution by a pair: A convolves to the rank, B mixes it."""
    shape = _tensor(target.modules[0], "weight").shape
    if len(down) * shape[1:].numel() != down.numel() or (len(up), up.numel()) != (shape[0], shape[0] * len(down)):
        raise UserError(
            f"{file}: layer {target.name} has factors {tuple(up.shape)} and {tuple(down.shape)}, expected them for a "
            f"{tuple(shape)} convolution: is the LoRA for another model?"
        )
    return (up.flatten(1) @ down.flatten(1)).reshape(shape)


def _tensor(module: nn.Module, parameter: str) -> Tensor:
    found = getattr(module, parameter)
    assert isinstance(found, Tensor)
    return found
