"""How a run gets its model: from stored weights, with random ones, or without any."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.encoders import FAMILIES
from train.config.schema import ModelConfig
from train.errors import UserError
from train.models.base import ModelAdapter
from train.models.experts import TwoExperts
from train.models.families import family_of
from train.models.folders import HUB, check_boundary, fetched, model_folder, read_json
from train.models.rope import TemporalRope
from train.models.weights import settle, stored_dtype


def describe_model(config: ModelConfig) -> ModelAdapter | None:
    """The adapter without any weights, on torch's meta device; None for a model that is still on the hub.

    Raises:
        UserError: the folder's config.json does not fit ``model.dimensions`` or the family.
    """
    architecture = architecture_of(config)
    if architecture is None:
        return None
    with torch.device("meta"):
        return random_adapter(config, architecture)


def architecture_of(config: ModelConfig) -> dict[str, Any] | None:
    """What the diffusers class of a run's model is made from; None for a model that is still on the hub.

    Raises:
        UserError: no ``model.path``, or a folder whose config.json does not fit the family or ``model.dimensions``.
    """
    if config.architecture is not None:
        return config.architecture
    path, subfolder = model_folder(config)
    file = Path(path) / (subfolder or "") / "config.json"
    return _read_architecture(config, file) if file.is_file() else None


def _read_architecture(config: ModelConfig, file: Path) -> dict[str, Any]:
    """The arguments of a transformer's class in its config.json, which has to be the chosen model's."""
    model_class = family_of(config).model_class
    found = read_json(file)
    if found.get("_class_name") != model_class.__name__:
        raise UserError(
            f"model.path {config.path} holds a {found.get('_class_name')}, expected a {model_class.__name__}: "
            "choose the model=... that fits the weights"
        )
    for name, expected in (config.dimensions or {}).items():
        if found.get(name, expected) != expected:
            raise UserError(
                f"model.path {config.path} has {name}={found[name]}, the chosen model has {expected}: "
                "choose the model=... that fits the weights, or set model.dimensions=null"
            )
    known = inspect.signature(model_class.__init__).parameters
    return {name: value for name, value in found.items() if name in known}


def check_pipeline(config: ModelConfig, folder: Path) -> None:
    """Holds the folder of a whole diffusers pipeline against the chosen model.

    Raises:
        UserError: it holds another one.
    """
    file = folder / "transformer" / "config.json"
    if not file.is_file():
        raise UserError(f"model.path {folder} has no transformer/config.json, is the download complete?")
    _read_architecture(config, file)
    check_boundary(config, folder)
    index = read_json(folder / family_of(config).index)
    experts = 1 if (index.get("transformer_2") or [None, None])[1] is None else 2
    if experts != (1 if config.expert is None else 2):
        raise UserError(
            f"model.path {folder} has {experts} transformers, the chosen model has {3 - experts}: "
            "choose the model=... that fits the weights"
        )
    if bool(index.get("expand_timesteps")) != family_of(config).takes_first_frame:
        kind = "gives each token its own timestep" if index.get("expand_timesteps") else "has one timestep a clip"
        raise UserError(
            f"model.path {folder} {kind}, the family {config.family} does not: choose the model=... that fits"
        )


def random_adapter(config: ModelConfig, architecture: Mapping[str, Any]) -> ModelAdapter:
    """The adapter of a run's model with random weights, made from a config of the diffusers class."""
    count = 2 if config.expert == "both" else 1
    parts = [family_of(config).from_config(architecture, text_tokens=config.text_tokens) for _ in range(count)]
    return _configured(parts, config)


def benchmark_adapter(
    config: ModelConfig,
    layers: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    layers_on_cpu: bool = False,
) -> ModelAdapter:
    """A model of the run's dimensions, of so many ``layers`` or all, with random weights drawn on the device itself.

    Args:
        layers_on_cpu: the layers' weights are in CPU memory, those of one layer of each kind for all of them: drawing
            all takes minutes there.

    Raises:
        UserError: the dimensions are not known.
    """
    shape = config.architecture or config.dimensions
    if not shape:
        raise UserError("the model has no dimensions in its file, which a benchmark needs")
    family = family_of(config)
    shape = shape if layers is None else family.cut(shape, layers)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            few = family.cut(shape, 3) if layers_on_cpu else shape  # no family has more kinds of layers
            drawn = family.from_config(few, text_tokens=config.text_tokens)
        if not layers_on_cpu:
            return drawn
        with torch.device("meta"):
            whole = family.from_config(shape, text_tokens=config.text_tokens)
        _repeat(drawn, whole)
        return whole
    finally:
        torch.set_default_dtype(torch.float32)


def _repeat(few: ModelAdapter, whole: ModelAdapter) -> None:
    """Gives a model without weights those of one with fewer layers, the layers' in CPU memory and shared."""
    kinds = {_kind(layer): layer.cpu() for layer in few.layers()}
    whole.transformer.load_state_dict(few.transformer.state_dict(), strict=False, assign=True)
    for layer in whole.layers():
        layer.load_state_dict(kinds[_kind(layer)].state_dict(), assign=True)
    for name, module in whole.transformer.named_modules():
        for own, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:  # in no state dict: the rotary angles' tables
                module._buffers[own] = few.transformer.get_submodule(name)._buffers[own]


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    return type(layer), *(parameter.shape for parameter in layer.parameters())


def load_adapter(
    config: ModelConfig,
    dtype: torch.dtype | None,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    layers_on_cpu: bool = False,
    as_stored: bool = False,
) -> ModelAdapter:
    """The adapter of a run's model.

    Args:
        config: where the model is; with ``architecture`` its weights are random, drawn from ``seed``.
        dtype: of the weights; layers that the family keeps in fp32 stay there. None leaves them as they are stored,
            mapped from their files, for `train.models.weights.settle`.
        device: where the weights go.
        layers_on_cpu: those of the layers stay on the CPU, mapped from their files as far as they are stored in
            ``dtype``: for `train.memory.weight_stream`.
        as_stored: the matrices among those stay mapped in any case: for `train.memory.fp8_storage`.
    """
    adapter = _load_as_stored(config, seed)
    if dtype is not None:
        for transformer in adapter.transformers:
            settle(transformer, dtype, device, on_cpu=adapter.layers() if layers_on_cpu else (), as_stored=as_stored)
    return adapter


def _configured(parts: Sequence[ModelAdapter], config: ModelConfig) -> ModelAdapter:
    """The adapter of one or two transformers, with the config's settings of positions and noise levels."""
    adapter = parts[0]
    if len(parts) == 2:
        assert config.boundary is not None
        adapter = TwoExperts(parts[0], parts[1], config.boundary)
    else:
        adapter.sigma_range = sigma_range(config)
    adapter.rope = temporal_rope(config)
    return adapter


def sigma_range(config: ModelConfig) -> tuple[float, float]:
    """The noise levels of ``model.expert``: from the first up to below the second."""
    if config.expert in (None, "both"):
        return 0.0, 1.0
    assert config.boundary is not None
    return (config.boundary, 1.0) if config.expert == "high" else (0.0, config.boundary)


def temporal_rope(config: ModelConfig) -> TemporalRope:
    """The temporal positions of ``model.rope``.

    Raises:
        UserError: the model has no such positions, or its native length is not known.
    """
    if config.rope == "default":
        return TemporalRope()
    if config.native_frames is None:
        raise UserError(f"rope={config.rope} needs model.native_frames, it is not set")
    intrinsic = family_of(config).riflex
    if config.rope == "riflex" and isinstance(intrinsic, str):
        raise UserError(f"rope=riflex cannot serve model.family {config.family}: {intrinsic}; use rope=interpolate")
    native = config.time.latents(config.native_frames)
    return TemporalRope(config.rope, native, intrinsic if isinstance(intrinsic, int) else 1)


def _load_as_stored(config: ModelConfig, seed: int) -> ModelAdapter:
    if config.architecture is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return random_adapter(config, config.architecture)
    if config.expert == "both":
        return _configured([_load_one(dataclasses.replace(config, expert=name)) for name in ("high", "low")], config)
    return _configured([_load_one(config)], config)


def _load_one(config: ModelConfig) -> ModelAdapter:
    path, subfolder = model_folder(config)
    if config.path is not None and config.path.startswith(HUB):
        path = str(fetched(config, [f"{subfolder}/*" if subfolder else "*", "model_index.json"]))
        check_boundary(config, Path(path))
    try:
        stored = stored_dtype(Path(path) / (subfolder or ""))
        adapter = family_of(config).load(path, subfolder, text_tokens=config.text_tokens, dtype=stored)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.path {config.path} cannot be loaded: {reason}") from error
    if adapter.patch != tuple(config.patch):
        raise UserError(f"model.patch is {config.patch}, the model in {config.path} has {list(adapter.patch)}")
    return adapter


def encoder_of(config: ModelConfig) -> tuple[str, Path | None]:
    """The family of encoders that the model's latents and text come from, and the local folder that may hold them.

    Raises:
        UserError: there are none for the model.
    """
    if tuple(config.vae) == (1, 1, 1):
        return "pixels", None
    encoder = family_of(config).encoder
    if encoder not in FAMILIES:
        raise UserError(
            f"model.family is {config.family}, for which data.prepare has no encoder: no shards of videos can be made "
            f"for it yet, as for {', '.join(FAMILIES)}"
        )
    return encoder, Path(config.path or "").expanduser()
