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


def config_beside(file: Path) -> dict[str, Any]:
    """PEFT's adapter_config.json or the released HunyuanVideo script's lora_config.json of a LoRA; empty without one.

    Raises:
        UserError: it is not readable.
    """
    beside = _beside(file)
    return _json(beside.read_text(encoding="utf-8"), beside) if beside.is_file() else {}


def _beside(file: Path) -> Path:
    return file.parent / _CONFIGS.get(file.name, "")


class Scaling:
    """alpha / rank where it stands beside the tensors and not among them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    @classmethod
    def of(cls, header: Mapping[str, str], config: dict[str, Any], file: Path) -> Scaling:
        """By diffusers' header, or by the `config_beside` the file.

        Raises:
            UserError: a kind of adapter that is no LoRA, or a number that is none.
        """
        where = str(_beside(file))
        if "lora_params" in config:
            for key in ("lora_rank", "lora_alpha"):
                _check_number(config["lora_params"], key, f"{where}: lora_params")
            return cls(config)
        if "lora_adapter_metadata" in header:
            where = f"{file}: lora_adapter_metadata"
            told = _json(header["lora_adapter_metadata"], where)
            config = {key.removeprefix("transformer."): value for key, value in told.items()}
        if config.get("use_dora"):
            raise UserError(f"{file} is a DoRA, expected a LoRA")
        if "lora_alpha" in config:
            _check_number(config, "lora_alpha", where)
        patterns = config.get("alpha_pattern") or {}
        for key in patterns:
            _check_number(patterns, key, f"{where}: alpha_pattern")
        return cls(config)

    def of_layer(self, layer: str, rank: int) -> float:
        """The factor of a layer without an alpha of its own."""
        config = self.config
        if not config:
            return 1.0
        if "lora_params" in config:  # one factor for all layers, whatever their ranks
            return float(config["lora_params"]["lora_alpha"]) / config["lora_params"]["lora_rank"]
        patterns = config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), layer), config.get("lora_alpha", rank))
        return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


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
