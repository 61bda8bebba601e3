"""The families of models, an adapter each. A file that lies here is a family.

A new one is its adapter here, its facts in `conf/model/<family>.yaml`, and an encoder in `data/encoders/`; CONTRIBUTING
has the steps, and `tests/train/models/made_up` a pair to begin with.
"""

from __future__ import annotations

import importlib
import pkgutil

from train.config.schema import ModelConfig
from train.errors import UserError
from train.models.base import ADAPTERS, ModelAdapter

__all__ = ["ADAPTERS", "adapter_of", "family_of"]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")


def family_of(config: ModelConfig) -> type[ModelAdapter]:
    """The adapter class of ``model.family``.

    Raises:
        UserError: an unknown family.
    """
    if config.family not in ADAPTERS:
        raise UserError(f"model.family is {config.family!r}, expected one of {', '.join(ADAPTERS)}")
    return ADAPTERS[config.family]


def adapter_of(model_class: str) -> type[ModelAdapter] | None:
    """The adapter class of the first family whose diffusers class has this name; None where there is none."""
    return next((found for found in ADAPTERS.values() if found.model_class.__name__ == model_class), None)
