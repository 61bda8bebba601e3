"""Reading a LoRA in any of the formats that this project writes or its users meet.

Names may be those of the diffusers model or of the original checkpoint, with any of the usual prefixes, with dots or
underscores; a layer of the original checkpoint that is several of diffusers' is split. Nothing is passed over: a tensor
that fits no layer of the model is an error, because a LoRA that is only half loaded looks like a bad LoRA. What names
are known is in `train.lora.keys`, where alpha is looked for in `train.lora.scaling`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from radial.serving import MASKS
from train.errors import UserError
from train.lora.keys import MARKERS, of_kohya, other_kind, possible_names, split_key
from train.lora.layers_by_name import Target, parameter_of, targets_of
from train.lora.scaling import Scaling, config_beside

Pairs = dict[str, tuple[Tensor, Tensor]]
"""Layer of the diffusers model -> (A, B), (rank, in) and (out, rank): the weight's change at strength 1 is B A."""

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


@dataclass
class Lora:
    """What a LoRA file changes, float32, at strength 1: alpha is in the tensors.

    Attributes:
        pairs: low-rank changes of linear layers.
        magnitudes: of a DoRA of this project, the norm of each row of a layer's tuned weight, (out,); files of DoRAs
            are not read.
        differences: whole changes of parameters (biases, norms, modulations, convolutions), by their names in the
            diffusers model.
        header: the file's metadata.
        notes: what whoever uses it should know: where its factor comes from, and layers that it leaves as they are.
    """

    pairs: Pairs
    differences: dict[str, Tensor] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)


def read_lora(path: str | Path, model: nn.Module) -> Lora:
    """The LoRA of a file, or of a folder with one file, for a diffusers transformer without LoRA layers.

    Raises:
        UserError: not a safetensors file, a kind of adapter that is no LoRA, tensors that do not fit the model, or
            numbers that are none.
    """
    file, config = find_file(Path(path).expanduser())
    tensors, header = _load(file)
    scaling = Scaling.of(header, config, file, kohya=any(of_kohya(key) for key in tensors))
    return _assemble(tensors, header, scaling, model, file)


def read_header(path: str | Path) -> dict[str, str]:
    """The metadata of a LoRA file, or of a folder with one file.

    Raises:
        UserError: there is no safetensors file.
    """
    return _load(find_file(Path(path).expanduser())[0], header_only=True)[1]


def trim(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same product without the ranks whose column of B is zero, such as stacking and filling up have added."""
    used = pair[1].any(dim=0)
    return pair[0][used], pair[1][:, used]


def find_file(path: Path) -> tuple[Path, dict[str, Any]]:
    """The safetensors file and its config, PEFT's or the released script's; of an export's folder those for diffusers.

    Raises:
        UserError: there is none, or several; or the config is not readable.
    """
    if (path / "diffusers").is_dir():
        path = path / "diffusers"
    if path.is_dir():
        path = lora_in(path)
    if not path.is_file():
        raise UserError(f"{path} is missing, expected a LoRA: a .safetensors file, or a folder with one")
    return path, config_beside(path)


def lora_in(folder: Path) -> Path:
    """The one LoRA of a folder; masks that lie beside it are none.

    Raises:
        UserError: there is none, or several.
    """
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.endswith(MASKS))
    if len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} safetensors files, expected one: name the file")
    return files[0]


def _load(file: Path, *, header_only: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as stream:
            names = [] if header_only else list(stream.keys())
            return {name: stream.get_tensor(name) for name in names}, dict(stream.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not readable as safetensors: {error}") from error


def _assemble(
    tensors: Mapping[str, Tensor], header: dict[str, str], scaling: Scaling, model: nn.Module, file: Path
) -> Lora:
    lora = Lora({}, {}, header)
    scales, sources, silent = [], set(), []
    for target, found in _group(tensors, model, file):
        scale = 1.0
        if "down" in found and "up" in found:
            rank = _rank(target, found, file)
            scale = found["alpha"].item() / rank if "alpha" in found else scaling.of_layer(target.name, rank)
            scales.append(scale)
            sources.add("its alpha tensors" if "alpha" in found else scaling.source)
            down, up = found["down"], found["up"] * scale
            if not up.any():
                silent.append(target.name)
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
            for name, change in _whole(target, parameter, found[kind], file) if kind in found else ():
                if name in lora.differences:
                    raise UserError(f"{file}: the change of {name} is there twice, under two names")
                lora.differences[name] = change
    if not scales and not lora.differences:
        raise UserError(f"{file} holds no LoRA tensor")
    lora.notes = _notes(scales, sources, silent, scaling, header)
    return lora


def _notes(
    scales: list[float], sources: set[str | None], silent: list[str], scaling: Scaling, header: Mapping[str, str]
) -> list[str]:
    said = []
    if scales:
        low, high = min(scales), max(scales)
        factor = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        where = " and ".join(sorted(source for source in sources if source))
        said.append(f"alpha / rank is {factor}, from {where}" if where else "it has no alpha, alpha / rank is 1")
        alpha = header.get("ss_network_alpha", "None")
        if sources == {None} and alpha != "None":
            said[-1] += f" (ss_network_alpha={alpha} in its header is kohya's; in these names alpha is in the weights)"
    if silent:
        said.append(f"{len(silent)} of {len(scales)} layers change nothing, such as {silent[0]}: their B is zero")
    return said


def _group(tensors: Mapping[str, Tensor], model: nn.Module, file: Path) -> Iterable[tuple[Target, dict[str, Tensor]]]:
    """The tensors of each layer by their kind, in float32: down, up, up_bias, alpha, diff, bias."""
    targets = targets_of(model)
    found: dict[str, tuple[Target, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        if key in MARKERS:
            continue
        if (adapter := other_kind(key)) is not None:
            raise UserError(
                f"{file} is a {adapter} ({key}), expected a LoRA: merge it into the base model with the tool that "
                "made it"
            )
        name, kind = split_key(key) or ("", "")
        target = next((targets[name] for name in possible_names(name) if name in targets), None)
        if target is None or (target.parameter != "weight" and kind != "diff"):
            raise UserError(
                f"{file}: tensor {key} fits no layer of {type(model).__name__}, expected a LoRA for this very model"
            )
        of_layer = found.setdefault(target.name, (target, {}))[1]
        if kind in of_layer:
            raise UserError(f"{file}: {kind} of layer {target.name} is there twice, once as {key}: expected one LoRA")
        of_layer[kind] = tensor.float()
        if not of_layer[kind].isfinite().all():
            raise UserError(
                f"{file}: {key} holds NaN or infinite numbers: get it again, or from before its training broke down"
            )
    for target, of_layer in found.values():
        _unscale(target, of_layer, file)
    return found.values()


def _unscale(target: Target, found: dict[str, Tensor], file: Path) -> None:
    """Multiplies 8-bit factors by the scale that stands beside them: of the whole tensor, or of each row."""
    for kind in ("down", "up"):
        scale, factor = found.pop(f"{kind}_scale", None), found.get(kind)
        if scale is None:
            continue
        if factor is None or scale.numel() not in (1, len(factor)):
            held = "no factor beside it" if factor is None else f"a factor {tuple(factor.shape)}"
            raise UserError(
                f"{file}: scale_weight of layer {target.name} has {scale.numel()} values and {held}, expected one "
                "value, or one a row"
            )
        found[kind] = factor * scale.reshape(-1, *[1] * (factor.ndim - 1))


def _rank(target: Target, found: Mapping[str, Tensor], file: Path) -> int:
    """The rank of a layer's pair, whose tensors must have enough dimensions for one."""
    down, up = found["down"], found["up"]
    if min(down.ndim, up.ndim) < 2 or not len(down):
        raise UserError(
            f"{file}: layer {target.name} has factors {tuple(up.shape)} and {tuple(down.shape)}, expected (rows, rank) "
            "and (rank, columns): is the file damaged?"
        )
    if "alpha" in found and found["alpha"].numel() != 1:
        raise UserError(f"{file}: alpha of layer {target.name} has {found['alpha'].numel()} values, expected one")
    if "alpha" in found and not found["alpha"].item():
        raise UserError(f"{file}: alpha of layer {target.name} is 0, which would switch it off: is the file damaged?")
    return len(down)


def _pairs(target: Target, down: Tensor, up: Tensor, file: Path) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each part's A and B, without ranks that add nothing; none for a part whose rows of B are all zero."""
    rows = sum(len(parameter_of(module, "weight")) for module in target.modules)
    columns = parameter_of(target.modules[0], "weight").shape[1]
    linear = all(isinstance(module, nn.Linear) for module in target.modules)
    if not linear or (*up.shape, *down.shape) != (rows, len(down), len(down), columns):
        raise UserError(
            f"{file}: layer {target.name} has factors {tuple(up.shape)} and {tuple(down.shape)}, expected "
            f"({rows}, rank) and (rank, {columns}): is the LoRA for another model?"
        )
    for part, piece in zip(target.parts, target.split(up), strict=True):
        pair = trim((down, piece))
        if len(pair[0]):
            yield part, pair


def _whole(target: Target, parameter: str, change: Tensor, file: Path) -> Iterator[tuple[str, Tensor]]:
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


def _product(target: Target, down: Tensor, up: Tensor, file: Path) -> Tensor:
    """The whole change of a convolution by a pair: A convolves to the rank, B mixes it."""
    shape = parameter_of(target.modules[0], "weight").shape
    if len(down) * shape[1:].numel() != down.numel() or (len(up), up.numel()) != (shape[0], shape[0] * len(down)):
        raise UserError(
            f"{file}: layer {target.name} has factors {tuple(up.shape)} and {tuple(down.shape)}, expected them for a "
            f"{tuple(shape)} convolution: is the LoRA for another model?"
        )
    return (up.flatten(1) @ down.flatten(1)).reshape(shape)
