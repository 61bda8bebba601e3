"""Exporting a training run.

    <run>/export/
        diffusers/pytorch_lora_weights.safetensors
        comfyui/<conf>.safetensors                              (*.masks.safetensors beside each: of attention=fitted)
        kohya/<conf>.safetensors
        peft/adapter_config.json, adapter_model.safetensors
        released/lora_config.json, flags.txt, ...               of HunyuanVideo; flags: the script's arguments
        merged/                                                 the base model with the LoRA in its weights (merge=true)

A run of two experts (Wan2.2-A14B) has each one's adapters in ``high_noise/`` and ``low_noise/``; diffusers takes those
of the second by ``load_lora_weights(folder, load_into_transformer_2=True)``. A run that trains all weights
(``lora: null``) exports ``model/`` alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.io.files import beside
from train import __version__
from train.config.compose import read_config
from train.config.schema import RunConfig
from train.errors import UserError
from train.export.card import write_card
from train.export.formats import FORMATS, Adapter, check_formats, formats_of
from train.export.merge import merge
from train.export.tools import differences, script_flags, warnings, ways
from train.export.verify import verify
from train.lora.file_checks import check_file
from train.lora.header import to_header
from train.lora.layers import MAGNITUDE
from train.lora.masks import masks_beside
from train.lora.reading import Lora, Pairs, lora_in, read_lora
from train.lora.scaling import factor
from train.models.loading import load_adapter
from train.models.pretrained import pipeline_around, public_name, stand_in, transformer_folder
from train.step.clip_recipe import clip_recipe
from train.storage.checkpoints import checkpoints_of, last_checkpoint, load_state, load_weights
from train.storage.inputs import check_masks
from train.storage.run_folder import CONFIG

_HIGH, _LOW = "high_noise", "low_noise"  # folders of two experts
_FP8 = (
    "trained beside float8 layers (radial.fp8 in the headers): in bfloat16 the base model gives other numbers than in "
    "training. Look at a clip; if it disappoints, train on with resume=RUN {key} override=true"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_run(
    run: Path,
    *,
    out: Path | None = None,
    checkpoint: Path | None = None,
    formats: Sequence[str] | None = None,
    merged: bool = False,
    dtype: str | None = None,
    strength: float = 1.0,
    add: Sequence[tuple[Path, float]] = (),
    add_2: Sequence[tuple[Path, float]] = (),
    card: bool = False,
    check: Callable[[], None] = lambda: None,
) -> list[str]:
    """Writes the export folder of a run, loads it again as its users will, and returns a line for each part.

    Args:
        run: the run folder.
        out: where to, ``<run>/export`` by default; replaced as a whole when it exists.
        checkpoint: a step-* folder, or the name alone of one of the run's; the newest by default.
        formats: adapter formats, by default all that the model has.
        merged: also write the merged model.
        dtype: of all weights, ``fp32`` or ``bf16``; by default fp32 for adapters, and for merged models what the base
            model has. The merge itself is done in fp32.
        strength: of the run's LoRA in the merged model.
        add: further LoRA files that are merged too, with their strengths; of two experts into the first.
        add_2: those of the expert for low noise levels.
        card: also write a model card for the hub; of a LoRA alone.
        check: called before each part; what it raises ends the export.

    Raises:
        UserError: no run, no checkpoint, settings or weights that do not fit the run or its base model.
        OSError, SafetensorError: the disk does not take it. What was there before is kept, whatever is raised.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not merged and (strength != 1.0 or add or add_2):
        name = "add" if add else "add_2" if add_2 else "strength"
        raise UserError(f"{name} is for the merged model, set merge=true")
    config = read_config(run)
    if add_2 and config.model.expert != "both":
        raise UserError("add_2 is for the second of two experts, the run trained one transformer: use add")
    if config.lora is None and (formats is not None or merged or card):
        name = "merge" if merged else "format" if formats is not None else "card, which push= writes too,"
        raise UserError(f"{name} is for a LoRA, the run trained all weights: leave it out")
    first = "high" if config.model.expert == "both" else config.model.expert
    for key, files, expert in (("add", add, first), ("add_2", add_2, "low")):
        for file, _ in files:
            check_file(file, config.model, key, expert)
    check_masks(config, run)
    checkpoint = last_checkpoint(run) if checkpoint is None else _checkpoint(run, checkpoint)
    out = out or run / "export"
    weights = load_weights(checkpoint)
    with _replaced(out) as temporary:
        if config.lora is None:
            check()
            said = _save_model(config, weights, DTYPES[dtype or "fp32"], temporary / "model")
        else:
            step, said = load_state(checkpoint)["global_step"], warnings(config)
            for kind, part, own in _parts(config, weights):
                pairs = folded(own, config.lora.alpha, rslora=config.lora.rslora)
                norms = {name: own[f"{name}.{MAGNITUDE}"] for name in pairs if config.lora.dora}
                base = transformer_folder(part.model, whole=merged)
                header, name = header_of(part, step), "_".join(filter(None, (config.conf, kind)))
                lines = save_adapters(
                    part, base, pairs, header, formats, DTYPES[dtype or "fp32"], temporary / kind, name, check, norms
                )
                said += [str(Path(kind) / line) for line in lines]
                if _beside_float8(config):
                    key = "trainer.fp8=false" if config.trainer.fp8 else "model.storage=null"
                    said.append(str(Path(kind) / _FP8.format(key=key)))
                if merged:
                    model = stand_in(base)
                    others = [(p, read_lora(p, model), factor) for p, factor in (add_2 if kind == _LOW else add)]
                    loras = [(Lora(pairs, magnitudes=norms), strength), *((lora, factor) for _, lora, factor in others)]
                    # a pipeline has room for both experts
                    place = temporary / ("" if pipeline_around(base) else kind) / "merged"
                    said.append(merge(base, place, loras, DTYPES[dtype] if dtype else None, header=header))
                    if config.attention.masks is not None:
                        shutil.copyfile(config.attention.masks, masks_beside(place))
                    said += [f"merged  with {path}: {note}" for path, lora, _ in others for note in lora.notes]
        if card:
            said.append(write_card(run, config, step, temporary, formats))
    return [line if line.startswith("warning: ") else f"{out}/{line}" for line in said]


def _beside_float8(config: RunConfig) -> bool:
    """Whether the frozen layers computed in float8, or were stored so."""
    return config.trainer.fp8 or config.model.storage == "fp8"


def _checkpoint(run: Path, given: Path) -> Path:
    """A checkpoint's folder: as it is given, or the one of this name among the run's.

    Raises:
        UserError: there is none, or it lies in another run's folder.
    """
    if given.is_dir():
        home = given.resolve().parent.parent
        if (home / CONFIG).exists() and home != run.resolve():
            raise UserError(f"checkpoint {given} is of the run {home}, not of {run}: give run={home}")
        return given
    own = {path.name: path for path in checkpoints_of(run / "checkpoints")}
    if str(given) not in own:
        raise UserError(f"checkpoint {given} is no folder, {run} has {', '.join(own) or 'none'}: give one of these")
    return own[str(given)]


@contextmanager
def _replaced(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``out``, or of the folder that this links to, when all is in it.

    Raises:
        UserError: ``out`` holds other files.
    """
    place = out.resolve()
    if place.exists() and not place.is_dir():
        raise UserError(f"out {out} is a file, expected a folder")
    if place.exists() and any(place.iterdir()) and not (place / ".export").exists():
        raise UserError(f"out {out} holds other files, expected a new folder or an earlier export")
    place.parent.mkdir(parents=True, exist_ok=True)
    with beside(place) as fresh:
        fresh.mkdir()
        (fresh / ".export").touch()
        yield fresh


def _parts(config: RunConfig, weights: dict[str, Tensor]) -> Iterator[tuple[str, RunConfig, dict[str, Tensor]]]:
    """("", the run, its weights); or for each of two experts its folder, a run of it alone, and its own weights."""
    if config.model.expert != "both":
        yield "", config, weights
        return
    for folder, expert, prefix in ((_HIGH, "high", "transformer."), (_LOW, "low", "transformer_2.")):
        own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        yield folder, replace(config, model=replace(config.model, expert=expert)), own


def folded(weights: dict[str, Tensor], alpha: float, *, rslora: bool = False) -> Pairs:
    """A checkpoint's tensors as pairs, with the LoRA's factor in B (`train.lora.scaling.factor`)."""
    names = sorted({key.rsplit(".lora_", 1)[0] for key in weights if ".lora_" in key})
    if not names:
        raise UserError("the checkpoint holds no LoRA tensor, nothing to export")
    pairs = {}
    for name in names:
        for part in ("A", "B"):
            if f"{name}.lora_{part}.weight" not in weights:
                raise UserError(f"the checkpoint lacks {name}.lora_{part}.weight, its other half is there")
        down, up = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
        if not (down.isfinite().all() and up.isfinite().all()):
            raise UserError(f"the checkpoint's {name} is not finite: export an earlier one with checkpoint=<step-*>")
        pairs[name] = (down, up * factor(alpha, len(down), rslora=rslora))
    return pairs


def save_adapters(
    config: RunConfig,
    base: Path,
    pairs: Pairs,
    header: dict[str, str],
    formats: Sequence[str] | None,
    dtype: torch.dtype,
    out: Path,
    file: str,
    check: Callable[[], None],
    magnitudes: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Writes and verifies a LoRA's files, and returns a line for each.

    Args:
        config: the run; of two experts, the part of one.
        base: folder of the transformer that the LoRA belongs to.
        pairs: the LoRA, with its strength in B.
        header: of the files.
        formats: by default all that the model has.
        dtype: of the weights.
        out: folder for the formats' folders.
        file: name of the files that no tool names.
        check: called before each format.
        magnitudes: of a DoRA, by layer; None or empty for a LoRA.

    Raises:
        UserError: weights that do not fit the model, or a format that it does not have.
    """
    model, dora = stand_in(base), bool(magnitudes)
    _check_fit(pairs, model)
    chosen = list(dict.fromkeys(formats_of(type(model).__name__, dora=dora) if formats is None else formats))
    check_formats(chosen, type(model).__name__, dora=dora)
    pairs = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in pairs.items()}
    adapter = Adapter(pairs, model, header, public_name(config.model), file, dict(magnitudes or {}))
    said = []
    for name in chosen:
        check()
        FORMATS[name](adapter, out / name)
        if config.attention.masks is not None:
            shutil.copyfile(config.attention.masks, masks_beside(lora_in(out / name)))
        if name == "released":
            (out / name / "flags.txt").write_text(script_flags(config), encoding="utf-8")
        lines = [*verify(name, adapter, base, out / name), *differences(config, name), *ways(config, name)]
        said += [f"{name}  {line}" for line in lines]
    return said


def _check_fit(pairs: Pairs, model: torch.nn.Module) -> None:
    layers = dict(model.named_modules())
    for name, (down, up) in pairs.items():
        layer = layers.get(name)
        if not isinstance(layer, torch.nn.Linear):
            raise UserError(f"the LoRA covers {name}, which is no linear layer of the base model: check model.path")
        if (len(up), down.shape[1]) != tuple(layer.weight.shape):
            raise UserError(
                f"the LoRA of {name} is for a {(len(up), down.shape[1])} weight, the base model has "
                f"{tuple(layer.weight.shape)}: check model.path"
            )


def _save_model(config: RunConfig, weights: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> list[str]:
    transformer = load_adapter(config.model, torch.float32, config.seed).transformer
    transformer.load_state_dict(weights)
    if dtype != torch.float32:  # on a model that is in fp32 already, diffusers warns for nothing
        transformer.to(dtype)
    transformer.save_pretrained(folder)
    return [f"model  {len(weights)} tensors"]


def header_of(config: RunConfig, step: int) -> dict[str, str]:
    """How the LoRA was trained (`train.lora.header`)."""
    assert config.lora is not None
    attention = {
        "decay": config.attention.decay,  # it and the rule stand there for every pattern
        "rule": config.rule(),
        **clip_recipe(config).attention.facts(),
        "dense_steps": config.attention.dense_steps if config.attention.dense_sigma is None else None,
        "sampling_steps": config.model.steps,
    }
    clip = {"frames": config.clip.frames, "height": config.clip.height, "width": config.clip.width}
    model = {
        "base_model": public_name(config.model),
        "family": config.model.family,
        "rope": config.model.rope,
        "expert": config.model.expert,
        "rank": config.lora.rank,
        "shift": config.shift(),
        "fp8": _beside_float8(config),
        "step": step,
        "version": __version__,
    }
    return to_header({**model, **attention, **clip})
