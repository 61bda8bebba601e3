"""Loading what generates: prompts are encoded first and the text encoders freed, then transformer, LoRAs and VAE come.

So text encoders (UMT5 and LLaMA take 10 to 16 GB) and transformer are never in memory together.
"""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from data.encoders.weights import load_part
from train.config.schema import ModelConfig
from train.errors import UserError
from train.export.formats import named_tensors
from train.export.verify import compare_pairs, lora_layers
from train.lora.reading import Lora, read_lora
from train.models.base import ModelAdapter
from train.models.families import ADAPTERS, adapter_of, family_of
from train.models.folders import fetched, read_json
from train.models.loading import check_pipeline
from train.models.pretrained import stand_in
from train.models.weights import check_weights
from train.sample.jobs import Job
from train.sample.settings import Settings

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_TEXT_PARTS = (*_TEXT_ENCODERS, "tokenizer", "tokenizer_2")
_ALWAYS = ("text_encoder", "vae")  # what no pipeline goes without
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_TRANSFORMERS = ("transformer", "transformer_2")
_OTHER_PARTS = (*_TRANSFORMERS, "vae", "image_encoder", "image_processor")


_KNOWN = ", ".join(name for name, adapter in ADAPTERS.items() if adapter.generates())


def pipeline_folder(model: ModelConfig) -> str:
    """The diffusers folder of the whole pipeline, downloaded where the model is of the hub.

    Raises:
        UserError: a family without a pipeline, no such folder, one of a transformer alone, or one of another model.
    """
    family = family_of(model)
    if not family.generates():
        raise UserError(
            f"model.family is {model.family}, which cannot be generated with here: expected one of {_KNOWN}"
        )
    if model.path is None:
        how = f"; get the weights with: {model.weights}" if model.weights else ""
        raise UserError(f"model.path is not set, expected a diffusers pipeline's folder or hub:org/name{how}")
    folder = Path(model.path).expanduser()
    if model.path.startswith("hub:"):
        folder = fetched(model, family.files)
    if not (folder / family.index).is_file():
        raise UserError(
            f"model.path {folder} has no {family.index}, expected the folder of a whole diffusers pipeline: "
            "transformer, vae, text_encoder, ..."
        )
    check_pipeline(model, folder)
    return str(folder)


def pipeline_class(folder: str, image: bool) -> Any:
    """The diffusers pipeline that serves a folder, with or without a first frame.

    Raises:
        UserError: an image for a model that takes none, or none for one that needs it.
    """
    config = read_json(Path(folder) / "transformer" / "config.json")
    transformer = str(config.get("_class_name"))
    family = adapter_of(transformer)
    if family is None or not family.generates():
        raise UserError(f"model.path {folder} has a {transformer}, expected one of the families {_KNOWN}")
    index = read_json(Path(folder) / family.index)
    needs_image = family.from_image(config)
    takes_image = needs_image or bool(index.get("expand_timesteps"))
    if image and not takes_image:
        raise UserError(f"image is set, but {folder} is text-to-video")
    if needs_image and not image:
        raise UserError(f"{folder} is image-to-video, give image=FILE")
    return family.pipeline_class(image=image)


def check_transformers(folder: str) -> None:
    """Holds the files of a pipeline's transformers against their config.json; nothing is loaded.

    Raises:
        UserError: a file or a tensor is missing, or of another shape.
    """
    for place in (Path(folder) / name for name in _TRANSFORMERS):
        if place.is_dir():
            check_weights(place, stand_in(place))


def _load(cls: Any, folder: str, **settings: Any) -> Any:
    try:
        return cls.from_pretrained(folder, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.path {folder} cannot be loaded: {' '.join(str(error).split())}") from error


def _load_part(family: type[ModelAdapter], folder: str, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A text encoder, image encoder or VAE, whole: pipelines go on with random numbers for what its file lacks."""
    index = Path(folder) / family.index
    library, kind = family.part_class(read_json(index), name)
    if kind is None:
        if name in _ALWAYS:
            raise UserError(f"{index}: names no {name}, expected one: download it again")
        return None
    loader = getattr(_LIBRARIES.get(library), kind, None)
    if loader is None:
        raise UserError(f"{index}: {name} is {library}'s {kind}, expected a class of diffusers or transformers")
    return load_part(loader, Path(folder) / name, device, dtype)


@torch.no_grad()
def encode_prompts(
    cls: Any,
    family: type[ModelAdapter],
    folder: str,
    jobs: Sequence[Job],
    tokens: int,
    guided: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Tensor]]:
    """What a call of the pipeline takes instead of each job's prompt, on the CPU; the text encoders are gone after it.

    Args:
        tokens: that a prompt is padded to.
        guided: encode the negative prompts too.
    """
    parts: dict[str, Any] = dict.fromkeys(_taken(cls, _OTHER_PARTS))
    parts["vae"] = stand_in(Path(folder) / "vae")  # some pipelines are not made without
    parts |= {name: _load_part(family, folder, name, device, dtype) for name in _taken(cls, _TEXT_ENCODERS)}
    pipeline = _load(cls, folder, **parts, torch_dtype=dtype)
    found = []
    for job in jobs:
        settings = {"max_sequence_length": tokens, "device": device}
        given = family.encode_prompt(pipeline, job.prompt, job.negative, guided, **settings)
        found.append({name: tensor.cpu() for name, tensor in given.items() if tensor is not None})
    del pipeline, parts
    release(device)
    return found


def first_frame(file: Path, width: int, height: int) -> Image.Image:
    """The picture of a file, upright, its middle cut out and scaled to a clip's size.

    Raises:
        UserError: it is none.
    """
    try:
        picture = ImageOps.exif_transpose(Image.open(file))
        deep = picture.mode.startswith("I")  # 16 bits, which Pillow would cut off at 255
        if picture.mode == "F" or (deep and not 0 <= np.asarray(picture).min() <= np.asarray(picture).max() < 2**16):
            raise UserError(f"image {file} has pixels of 32 bits, expected 8 or 16; save it as PNG or JPEG")
        if deep:
            picture = Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
        picture = picture.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"image {file} is not readable: {error}") from error
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)  # what diffusers scales by


def load_pipeline(
    cls: Any, family: type[ModelAdapter], folder: str, settings: Settings, device: torch.device, dtype: torch.dtype
) -> Any:
    """The pipeline without its text encoders, its transformers on the CPU."""
    parts: dict[str, Any] = dict.fromkeys(_taken(cls, _TEXT_PARTS))
    parts["vae"] = _load_part(family, folder, "vae", device, family.vae_dtype(dtype))
    for name in _taken(cls, ("image_encoder",)):
        # with offloading it looks at its one picture on the CPU, where it is for the rest of the clip
        place = device if settings.offload == "none" else torch.device("cpu")
        parts[name] = _load_part(family, folder, name, place, torch.float32)
    return _load(cls, folder, **parts, torch_dtype=dtype)


def _taken(cls: Any, names: Sequence[str]) -> list[str]:
    """The names among ``names`` of parts that a pipeline's class takes."""
    known = inspect.signature(cls.__init__).parameters
    return [name for name in names if name in known]


def transformers_of(pipeline: Any) -> list[Any]:
    """The transformer, or the two of them."""
    both = (getattr(pipeline, "transformer", None), getattr(pipeline, "transformer_2", None))
    return [transformer for transformer in both if transformer is not None]


def load_loras(
    transformer: Any, files: Sequence[tuple[Path, float]], undo: list[Callable[[], None]] | None = None
) -> list[str]:
    """Adds LoRAs with their strengths to a transformer, and returns what was loaded, and by which factor, in words.

    Args:
        undo: gets what takes each change back.

    Raises:
        UserError: a file that does not fit the model whole, or that did not arrive whole.
    """
    said, strengths, undo = [], {}, [] if undo is None else undo
    loras = [(file, strength, read_lora(file, transformer)) for file, strength in files]
    for _, strength, lora in loras:
        if lora.differences:
            undo.append(_change(transformer, lora, strength))
    for number, (file, strength, lora) in enumerate(loras):
        if lora.pairs:
            name = f"lora_{number}"
            tensors = named_tensors(lora.pairs)
            undo.append(functools.partial(_unload, transformer, name))
            transformer.load_lora_adapter(tensors, adapter_name=name, prefix=None)
            count = compare_pairs(lora_layers(transformer, name), lora.pairs, "diffusers", file)
            strengths[name] = strength
            said.append(f"{file}: {count} tensors at strength {strength:g}")
        if lora.differences:
            said.append(f"{file}: {len(lora.differences)} whole changes at strength {strength:g}")
        said += [f"{file}: {note}" for note in lora.notes]
    if strengths:
        transformer.set_adapters(list(strengths), list(strengths.values()))
    return said


def _unload(transformer: Any, name: str) -> None:
    transformer.delete_adapters(name)
    if not getattr(transformer, "peft_config", None):  # PEFT's layers stay around the model's own ones
        transformer.unload_lora()


@torch.no_grad()
def _change(transformer: nn.Module, lora: Lora, strength: float) -> Callable[[], None]:
    """Adds a file's whole changes to the weights; what puts the weights back."""
    parameters = dict(transformer.named_parameters())
    before = {name: parameters[name].detach().cpu().clone() for name in lora.differences}
    for name, change in lora.differences.items():
        parameter = parameters[name]
        parameter.copy_(parameter.float() + strength * change.to(parameter.device))

    def back() -> None:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)

    return back


def release(device: torch.device) -> None:
    """Gives memory that nothing uses back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
