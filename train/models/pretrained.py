"""The base model that a LoRA belongs to: where it lies, and a stand-in of its shapes that takes no memory."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from torch import nn

from train.config.schema import ModelConfig
from train.errors import UserError
from train.models.families import adapter_of, family_of
from train.models.folders import fetched, model_folder, read_json
from train.models.pipelines import PipelineTraits


def transformer_folder(config: ModelConfig, *, whole: bool = False) -> Path:
    """The folder with the transformer's config.json and weights; from the hub's cache where the model is of the hub.

    Args:
        whole: the folder that it lies in has to be whole: fetch the pipeline's other parts too.

    Raises:
        UserError: it is not there, or cannot be fetched.
    """
    path, subfolder = model_folder(config)
    folder = Path(path)
    if not folder.is_dir():
        part = [f"{subfolder}/*"] if subfolder else None
        folder = fetched(config, family_of(config).files if whole and subfolder else part)
    return folder / (subfolder or "")


def pipeline_around(transformer: Path) -> Path | None:
    """The folder of the pipeline that a transformer's folder is a part of; None where it lies by itself.

    Raises:
        UserError: its config.json is not JSON.
    """
    family = adapter_of(str(read_json(transformer / "config.json").get("_class_name")))
    index = PipelineTraits.index if family is None else family.index
    return transformer.parent if (transformer.parent / index).is_file() else None


def public_name(config: ModelConfig) -> str:
    """The base model's name without the path of this machine: adapters are made to be passed on.

    Raises:
        UserError: there is none.
    """
    if config.path is None:
        raise UserError("model.path is not set, a LoRA belongs to a base model: set it")
    return config.path.removeprefix("hub:") if ":" in config.path else Path(config.path).name


def stand_in(folder: Path) -> nn.Module:
    """The model of a diffusers folder, each of its weights a single zero that is seen in the full shape.

    Raises:
        UserError: the config is not JSON, or names a class that diffusers does not have.
    """
    name = read_json(folder / "config.json").get("_class_name")
    model_class = getattr(diffusers, str(name), None)
    if model_class is None:
        raise UserError(f"{folder}/config.json names the class {name}, which this version of diffusers does not have")
    with torch.device("meta"):
        model: nn.Module = model_class.from_config(model_class.load_config(folder))
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return model
