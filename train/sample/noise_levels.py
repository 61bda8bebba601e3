"""The noise levels of a clip that is generated: their shift, and the level from which attention is dense, by the
LoRA's header. Which steps that makes dense is `train.attention.recipe.AttentionRecipe.is_dense`.

The header names the shift of the clip that the LoRA was trained on, and the noise level from which on attention was
dense. That level holds whatever the number of steps: below it the LoRA has learned to work with the mask, above it has
not. Where the shift is the model's own for the trained size, a clip of another size has its own instead, and the dense
steps' level moves with it, as in training (`train.step.clip_recipe`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.config.schema import ModelConfig

DENSE_STEPS = 2
"""What the released scripts keep dense past the native length."""
TRAINED = ("height", "width", "shift", "dense_steps")
"""What `at_size` reads of a header."""


def dense_side(given: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """``dense_steps`` or ``dense_sigma``, the other None; both None where one of them is given.

    Args:
        given: the user's settings of them.
        trained: those of the LoRA's header; one from before ``dense_steps`` has ``dense_sigma`` alone.
    """
    if given["dense_steps"] is not None or given["dense_sigma"] is not None:
        return {"dense_steps": None, "dense_sigma": None}
    if trained.get("dense_sigma") is not None:
        return {"dense_steps": None, "dense_sigma": trained["dense_sigma"]}
    steps = trained.get("dense_steps")
    return {"dense_steps": DENSE_STEPS if steps is None else steps, "dense_sigma": None}


def at_size(trained: Mapping[str, Any], height: int, width: int, model: ModelConfig) -> dict[str, Any]:
    """The ``shift``, and where the header has one the ``dense_sigma``, of a clip of another size than the trained one.

    Args:
        trained: the header's values of `TRAINED`.

    Returns:
        Nothing where the header's own hold: the size has the same shift, or the run was given a shift of its own.
    """
    if any(trained.get(name) is None for name in ("height", "width", "shift")):
        return {}
    shift = model.shift_at(height, width)
    if shift is None or trained["shift"] != model.shift_at(trained["height"], trained["width"]):
        return {}
    if shift == trained["shift"]:
        return {}
    found: dict[str, Any] = {"shift": shift}
    if trained.get("dense_steps"):
        from train.step.clip_recipe import dense_level  # takes seconds to import

        found["dense_sigma"] = dense_level(model, trained["dense_steps"], shift)
    return found
