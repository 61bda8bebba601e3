"""What of a model a LoRA file may change, by each name that a tool may give it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.lora.names import comfyui_layers, comfyui_names, original_layers, original_parameters


@dataclass(frozen=True)
class Target:
    """A layer that tensors of a file name: one of diffusers', or one of the original checkpoint that holds several.

    Attributes:
        name: in the checkpoint, or in the diffusers model.
        parts: the diffusers layers that it holds, from the first output row on.
        modules: those layers.
        swapped: the two halves of its rows lie the other way round in diffusers.
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
        return [
            piece.contiguous() for piece in rows.split([len(parameter_of(m, self.parameter)) for m in self.modules])
        ]


def weighted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that have a ``weight``, by name."""
    return {name: module for name, module in model.named_modules() if getattr(module, "weight", None) is not None}


def targets_of(model: nn.Module) -> dict[str, Target]:
    """Each name that a tool may give a layer or parameter, without prefixes -> what it changes."""
    model_class, layers = type(model).__name__, weighted_layers(model)
    targets = {name: Target(name, (name,), (module,)) for name, module in layers.items()}
    for layer in (*original_layers(model_class, layers), *comfyui_layers(model_class, layers)):
        modules = tuple(layers[part] for part in layer.parts)
        target = Target(layer.name, layer.parts, modules, layer.swapped)
        targets |= dict.fromkeys((layer.name, *comfyui_names(model_class, layer.name)), target)
    for name, ours in original_parameters(model_class, dict(model.named_parameters())).items():
        part, _, parameter = ours.rpartition(".")
        targets[name] = Target(name, (part,), (model.get_submodule(part),), parameter=parameter)
    for name in [name for name in targets if name.endswith(".to_out.0")]:  # diffusers' first LoRAs leave the 0 out
        targets.setdefault(name.removesuffix(".0"), targets[name])
    return targets | {name.replace(".", "_"): target for name, target in targets.items()}


def parameter_of(module: nn.Module, parameter: str) -> Tensor:
    """A module's parameter, which has to be there."""
    found = getattr(module, parameter)
    assert isinstance(found, Tensor)
    return found
