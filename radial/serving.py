"""The attention that a LoRA was trained with, for inference servers: from the header of its file to a function.

A server's sparse-attention plug-in has q, k and v of a layer, the size of the clip and the step. A whole one, of 30
lines, is in README.md beside this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from radial.attention import attention_over
from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.head_layouts import build_head_layouts
from radial.layout import build_layout
from radial.patterns import Dense, Fitted, HeadMasks, Pattern, make_pattern

PREFIX = "radial."
"""Of the keys that an export writes into a LoRA's safetensors header."""
MASKS = ".masks.safetensors"
"""Instead of ``.safetensors`` in the name of the masks that lie beside a LoRA, where they differ by head."""


def attention_for(
    header: Mapping[str, str],
    grid: VideoGrid,
    *,
    layer: int,
    step: int | None = None,
    sigma: float | None = None,
    layers: int | None = None,
    backend: str | None = None,
    masks: str | Path | HeadMasks | None = None,
) -> Callable[..., Tensor]:
    """Self-attention of one layer in one denoising step, as the LoRA was trained.

    Args:
        header: of the LoRA's file, whose keys begin with ``radial.``.
        grid: tokens of the clip.
        layer: of the transformer, from 0.
        step: from 0; counts where the header has a number of dense steps and no noise level.
        sigma: the step's noise level, from 0 to 1 (pure noise); counts where the header has one for dense steps.
        layers: how many the transformer has; needed where the header's masks differ by layer and head.
        backend: an attention backend by name; None: the fastest.
        masks: of pattern ``fitted``: the file beside the LoRA, ``<name>.masks.safetensors``. A plug-in reads it once
            (`radial.HeadMasks.read`).

    Returns:
        A function of q, k and v, each (batch, tokens, heads, head_dim), and of `attention_over`'s ``text_lengths`` and
        ``scale``; its result has the same shape.

    Raises:
        RadialError: no such header, a value in it that is none, masks that are missing or others than the header's, or
            neither ``sigma`` nor ``step`` where one counts; when it is called, a layer that has no masks.
    """
    dense = is_dense(header, layer=layer, step=step, sigma=sigma)
    pattern: Pattern = Dense() if dense else pattern_of(header, masks)
    block = int(_number(header, "block", 128))
    if not pattern.by_head:
        layout = build_layout(pattern, grid, block)
        return functools.partial(attention_over, layout=layout, backend=None if dense else backend)
    if layers is None and isinstance(pattern, Fitted):
        layers = max(layer, pattern.masks.about.layers[-1]) + 1
    if layers is None:
        raise RadialError(f"the header's pattern {pattern.name} differs by layer and head: give layers")
    count = layers

    def by_head(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        found = build_head_layouts(pattern, grid, block, layers=count, heads=q.shape[2])
        return attention_over(q, k, v, found.layer(layer), backend=backend, **given)

    return by_head


def is_dense(header: Mapping[str, str], *, layer: int, step: int | None = None, sigma: float | None = None) -> bool:
    """Whether a layer's attention is dense in a denoising step; arguments and errors as of `attention_for`."""
    return layer < int(_number(header, "dense_layers", 0)) or _in_dense_step(header, step, sigma)


def is_dense_step(dense_sigma: float | None, dense_steps: int | None, *, sigma: float | None, step: int | None) -> bool:
    """Whether all layers are dense in a denoising step, the one place where noise levels are compared with a threshold.

    Args:
        dense_sigma: the noise level from which on they are; None: the steps decide.
        dense_steps: the first steps, in which they are; None: none.
        sigma: the step's noise level; needed with ``dense_sigma``.
        step: its number from 0; None where steps are not counted, as in training.
    """
    if dense_sigma is not None:
        assert sigma is not None
        return sigma >= dense_sigma
    return dense_steps is not None and step is not None and step < dense_steps


def pattern_of(header: Mapping[str, str], masks: str | Path | HeadMasks | None = None) -> Pattern:
    """The pattern of a LoRA's header.

    Args:
        masks: of pattern ``fitted``: the file beside the LoRA, or what was read from it.

    Raises:
        RadialError: no such header, a value in it that is none, or masks that are missing or others than the header's.
    """
    name = _value(header, "pattern")
    if name is None:
        raise RadialError(f"the header has no {PREFIX}pattern: expected that of a LoRA that this project exported")
    if name == Fitted.name and masks is not None:
        found = masks if isinstance(masks, HeadMasks) else HeadMasks.read(masks)
        wanted = _value(header, "masks_sha256")
        if found.digest != wanted:
            raise RadialError(f"the masks' SHA-256 is {found.digest}, the LoRA's {wanted}: give the file beside it")
        return Fitted(found)
    return make_pattern(
        name,
        decay=_number(header, "decay", 1.0),
        rule=_value(header, "rule") or "wan",
        reach=_number(header, "reach", 0.0) or None,
        per_head=_value(header, "per_head") == "True",
    )


def _in_dense_step(header: Mapping[str, str], step: int | None, sigma: float | None) -> bool:
    level = None if _value(header, "dense_sigma") is None else _number(header, "dense_sigma", 1.0)
    count = int(_number(header, "dense_steps", 0))
    if level is not None and sigma is None:
        raise RadialError(f"the LoRA's steps are dense from noise level {level:g} on: give sigma")
    if level is None and count and step is None:
        raise RadialError(f"the LoRA's first {count} steps are dense: give step")
    return is_dense_step(level, count, sigma=sigma, step=step)


def _value(header: Mapping[str, str], name: str) -> str | None:
    text = header.get(PREFIX + name)
    return None if text == "None" else text


def _number(header: Mapping[str, str], name: str, default: float) -> float:
    text = _value(header, name)
    try:
        return default if text is None else float(text)
    except ValueError as error:
        raise RadialError(f"the header's {PREFIX}{name} is {text!r}, expected a number") from error
