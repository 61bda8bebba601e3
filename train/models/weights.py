"""Frozen weights on their way from the files to where they are used, without a private copy in CPU memory.

safetensors maps its files into memory. As long as a tensor keeps the dtype of its file, all processes of a node share
the pages of the file's cache; converting a whole model on the CPU would cost each process a copy. So a model is loaded
as it is stored, and moved and converted tensor by tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from train.errors import UserError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Those of weights, by their names in safetensors files."""
FLOAT8 = "F8_E4M3"
"""The name of float8 weights, which are read where they have no scales: each number stands for itself."""
_SCALES = re.compile(r"(^|[._])(scale_weight|weight_scale|scaled_fp8|scale_input|input_scale|comfy_quant)$")


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the first floating-point tensor in a folder's safetensors files; float32 if there is none."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                found = DTYPES.get(tensors.get_slice(name).get_dtype())
                if found is not None:
                    return found
    return torch.float32


def check_weights(folder: Path, model: Any) -> None:
    """Compares the headers of a folder's safetensors files with a model; nothing is loaded.

    Args:
        folder: with diffusers' file names, in one file or in parts with an index.
        model: a diffusers model as the folder's config.json describes it, on any device.

    Raises:
        UserError: a part is missing or damaged, or names or shapes of tensors differ.
    """
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    names = {"diffusion_pytorch_model.safetensors"}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is no index of safetensors files: {_AGAIN}") from error
    found: dict[str, list[int]] = {}
    for file in sorted(folder / name for name in names):
        if not file.is_file():
            raise UserError(f"{file} is missing, is the download complete?")
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    _check_format(file, name, tensors.get_slice(name).get_dtype())
                    found[name] = tensors.get_slice(name).get_shape()
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}): {_AGAIN}") from error
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unknown = {n for n in found.keys() - expected.keys() if not any(re.search(pattern, n) for pattern in ignored)}
    for what, these in (("lack", expected.keys() - found.keys()), ("hold unknown", unknown)):
        if these:
            raise UserError(
                f"{folder}: the weights {what} tensors of its config.json's model ({len(these)}, first {min(these)}): "
                f"{_AGAIN}"
            )
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{folder}: {name} is {found[name]}, its config.json says {shape}: {_AGAIN}")


_AGAIN = "download the folder again"


def _check_format(file: Path, name: str, dtype: str) -> None:
    """Raise a UserError for numbers that mean nothing without something else."""
    if _SCALES.search(name) or dtype not in (*DTYPES, FLOAT8, "I64", "I32", "BOOL"):
        what = f"the scales of quantized weights ({name})" if _SCALES.search(name) else f"{name} as {dtype}"
        raise UserError(
            f"{file} holds {what}, expected F32, BF16, F16, or {FLOAT8} without scales: take the model's own diffusers "
            "folder, model.storage=fp8 rounds its weights when they are loaded"
        )


def settle(
    transformer: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    each: Callable[[nn.Module], None] = lambda part: None,
    on_cpu: Collection[nn.Module] = (),
    as_stored: bool = False,
) -> None:
    """Converts and moves the weights, one part of the model (a layer, an embedder) after the other.

    Args:
        transformer: a diffusers model. The layers that it keeps in fp32 come to fp32, and so does a LoRA.
        dtype: of all other weights.
        device: where to.
        each: called with each part when its weights are there, for instance to spread them over ranks.
        on_cpu: parts whose weights stay on the CPU: layers that `train.memory.weight_stream` brings.
        as_stored: matrices of those parts stay as they are in the files, mapped: `train.memory.fp8_storage` rounds them
            one by one, so that no process ever holds all of them in ``dtype``.
    """
    keep = set(transformer._keep_in_fp32_modules or ())
    for name, part in _parts(transformer):
        place = "cpu" if part in on_cpu else device
        for inner, parameter in part.named_parameters(prefix=name):
            if as_stored and part in on_cpu and parameter.dim() == 2:
                continue
            exact = ".lora_" in inner or not keep.isdisjoint(inner.split("."))
            parameter.data = parameter.data.to(place, torch.float32 if exact else dtype)
        each(part)
    for parameter in transformer.parameters(recurse=False):  # the model's own tables, such as Wan's scale_shift_table
        parameter.data = parameter.data.to(device, torch.float32)
    for module in transformer.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _parts(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", layer) for index, layer in enumerate(child))
        else:
            yield name, child
