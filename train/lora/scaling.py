"""The factor of a LoRA, alpha / rank, where it stands beside the tensors: in a config, or in the file's header."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from train.errors import UserError

# what lies beside a file of this very name; beside another name it may be another LoRA's
_CONFIGS = {"adapter_model.safetensors": "adapter_config.json", "pytorch_lora_weights.safetensors": "lora_config.json"}
# PEFT's ways to start that take the LoRA's first product out of the base weights: the file alone is no change of them
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_GENMO = "kwargs"  # Mochi's authors: JSON, in which queries, keys and values have a factor and outputs another


def config_beside(file: Path) -> dict[str, Any]:
    """PEFT's adapter_config.json or the released HunyuanVideo script's lora_config.json of a LoRA; empty without one.

    Raises:
        UserError: it is not readable.
    """
    beside = _beside(file)
    return _json(beside.read_text(encoding="utf-8"), beside) if beside.is_file() else {}


def _beside(file: Path) -> Path:
    return file.parent / _CONFIGS.get(file.name, "")


def factor(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """What a LoRA's product is scaled by: alpha / rank, or alpha / sqrt(rank) of rsLoRA (arXiv 2312.03732)."""
    return float(alpha) / (math.sqrt(rank) if rslora else rank)


class Scaling:
    """alpha / rank where it stands beside the tensors and not among them.

    Attributes:
        source: where, in words; None: nowhere, and the factor is 1.
    """

    def __init__(self, config: Mapping[str, Any], source: str | None) -> None:
        self.config = config
        self.source = source

    @classmethod
    def of(cls, header: Mapping[str, str], config: dict[str, Any], file: Path, *, kohya: bool) -> Scaling:
        """The scaling by diffusers' header, the `config_beside` the file, or what other trainers write into the header.

        Args:
            kohya: the tensors have the names of kohya's trainers, so that their ``ss_network_alpha`` counts. In
                files of other names it is left from a conversion, which has put alpha into the weights.

        Raises:
            UserError: a kind of adapter that is no LoRA, or a number that is none.
        """
        where = str(_beside(file))
        if "lora_params" in config:
            for key in ("lora_rank", "lora_alpha"):
                _check_number(config["lora_params"], key, f"{where}: lora_params")
            return cls(config, Path(where).name)
        source = Path(where).name if config else None
        if "lora_adapter_metadata" in header:
            where, source = f"{file}: lora_adapter_metadata", "its header"
            told = _json(header["lora_adapter_metadata"], where)
            config = {key.removeprefix("transformer."): value for key, value in told.items()}
        elif not config and (found := _of_header(header, file, kohya=kohya)):
            where, source, config = f"{file}: its header", "its header", found
        _check_kind(config, file, where)
        if "lora_alpha" in config:
            _check_number(config, "lora_alpha", where)
        patterns = config.get("alpha_pattern") or {}
        for key in patterns:
            _check_number(patterns, key, f"{where}: alpha_pattern")
        return cls(config, source)

    def of_layer(self, layer: str, rank: int) -> float:
        """The factor of a layer without an alpha of its own."""
        config = self.config
        if not config:
            return 1.0
        if "lora_params" in config:  # one factor for all layers, whatever their ranks
            return factor(config["lora_params"]["lora_alpha"], config["lora_params"]["lora_rank"])
        patterns = config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), layer), config.get("lora_alpha", rank))
        return factor(alpha, rank, rslora=bool(config.get("use_rslora")))


def _of_header(header: Mapping[str, str], file: Path, *, kohya: bool) -> dict[str, Any]:
    """PEFT's settings as far as a header has them; empty where it has none."""
    if _GENMO in header and "proj_lora_" in header[_GENMO]:
        told, where = _json(header[_GENMO], f"{file}: {_GENMO}"), f"{file}: {_GENMO}"
        layers = {"qkv_proj": ("qkv_x", "qkv_y"), "out_proj": ("proj_x", "proj_y")}
        used = {kind: names for kind, names in layers.items() if told.get(f"{kind}_lora_rank")}
        for kind in used:
            _check_number(told, f"{kind}_lora_alpha", where)
        return {"alpha_pattern": {n: told[f"{kind}_lora_alpha"] for kind, names in used.items() for n in names}}
    for key in ("lora_alpha", "ss_network_alpha") if kohya else ("lora_alpha",):
        if header.get(key, "None") != "None":
            try:
                return {"lora_alpha": float(header[key])}
            except ValueError:
                _check_number(header, key, f"{file}: its header")
    return {}


def _check_kind(config: Mapping[str, Any], file: Path, where: str) -> None:
    """Raise a UserError for what PEFT calls an adapter too, and what is no LoRA that a file holds whole."""
    kind = str(config.get("peft_type") or "LORA").upper()
    if kind != "LORA" or config.get("use_dora"):
        raise UserError(f"{file} is a {'DoRA' if kind == 'LORA' else kind}, expected a LoRA ({where} says so)")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise UserError(
            f"{file} was started with init_lora_weights={start!r} ({where}), which changes the base weights too: the "
            "file alone is another change than was trained. Save it again with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...), which makes a LoRA of it"
        )


def _check_number(found: Any, key: str, where: str) -> None:
    """Raise a UserError unless ``key`` is a positive number."""
    value = found.get(key) if isinstance(found, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(
            f"{where}: {key} is {value!r}, expected a positive number: get it again from where the LoRA is from"
        )


def _json(text: str, where: Path | str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}): get it again from where the LoRA is from") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} is a {type(found).__name__}, expected a JSON object: is it a LoRA's?")
    return found
