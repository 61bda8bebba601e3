"""A model, its LoRA and a clip in numbers, counted on a model without weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from train.attention.recipe import AttentionRecipe
from train.config.schema import ModelConfig, RunConfig
from train.errors import UserError
from train.memory.fp8 import fits
from train.models.base import ModelAdapter
from train.models.families import family_of
from train.models.loading import architecture_of
from train.models.weights import settle


@dataclass(frozen=True)
class Sizes:
    """What memory and time follow from.

    Attributes:
        layers, heads, head_dim: of self-attention.
        width: features of a hidden state.
        wide: features in the middle of a feed-forward layer.
        tokens, video_tokens: of a clip, with and without text tokens.
        cells: values of a clip's latent.
        weights, layer_weights: bytes of the frozen weights of the model and of one layer, the largest.
        layers_weights: bytes of those of all layers.
        passed_weights: bytes of those of the layers that one forward passes: of two experts, one's.
        trained: parameters.
        dora: output features of a layer's DoRA projections over the width, on average; 0 of a LoRA. Their outputs are
            kept for the gradients of the norms.
        linear, lora: FLOPs of one clip's forward in linear layers and in the LoRA.
        density: share of token pairs that a layer with the pattern computes.
        element: bytes of an activation's element.
        all_chunked: whether ``parallel.ffn_chunk`` reaches the feed-forward part of every layer.
        takes_first_frame: see `ModelAdapter.takes_first_frame`.
    """

    layers: int
    heads: int
    head_dim: int
    width: int
    wide: int
    tokens: int
    video_tokens: int
    cells: int
    weights: float
    layer_weights: float
    layers_weights: float
    passed_weights: float
    trained: int
    dora: float
    linear: float
    lora: float
    density: float
    element: int
    all_chunked: bool
    takes_first_frame: bool

    @property
    def attended(self) -> int:
        """Features of attention's output, those of all heads."""
        return self.heads * self.head_dim

    @property
    def dense_attention(self) -> float:
        """FLOPs of one forward of one layer's attention without a mask."""
        return 4.0 * self.attended * self.tokens**2

    @classmethod
    def of(cls, config: RunConfig, precision: str, layers: int | None = None) -> Sizes | None:
        """Counts the model of a run on its clip; None for a model on the hub whose dimensions no YAML has.

        Args:
            precision: ``bf16`` or ``fp32``.
            layers: another number of layers than the model's.

        Raises:
            UserError: ``lora.targets`` matches nothing.
        """
        model = config.model
        known = model.architecture is not None or model.path is not None
        architecture = (architecture_of(model) if known else None) or model.dimensions
        if architecture is None:
            return None
        if layers is not None:
            architecture = family_of(config.model).cut(architecture, layers)
        lora = config.lora is not None
        frozen = torch.bfloat16 if precision == "bf16" and lora else torch.float32
        adapter = _skeleton(config.model.family, config.model.text_tokens, json.dumps(architecture), frozen)
        grid = adapter.grid(torch.empty(1, 1, *config.latent_size(), device="meta"))
        layers, heads, head_dim = adapter.attention_shape
        each = [_bytes(layer) - _saved_by_fp8(layer, config.model.storage) for layer in adapter.layers()]
        outside = _bytes(adapter.transformer) - sum(_bytes(layer) for layer in adapter.layers())
        experts = 2 if config.model.expert == "both" else 1  # all there, one runs
        trained, dora = experts * sum(p.numel() for p in adapter.transformer.parameters()), 0.0
        if config.lora is not None:
            targets, prefixes = config.lora.targets, ("",) * experts
            if targets is None:
                targets = adapter.targets(text=config.lora.text)
            elif experts == 2:  # names that are given are those of `train.models.experts.Experts`
                prefixes = ("transformer.", "transformer_2.")
            rows = _ends(adapter.transformer, targets, prefixes, "out_features")
            if not rows:
                begin = f"; names begin with {' or '.join(prefixes)}" if prefixes[0] else ""
                raise UserError(f"lora.targets {targets!r} matches no linear layer of the model{begin}")
            trained = config.lora.rank * (_ends(adapter.transformer, targets, prefixes, "in_features") + rows)
            if config.lora.dora:
                trained, dora = trained + rows, rows / experts / (layers * heads * head_dim)
        middle = adapter.feed_forwards()
        return cls(
            layers=layers,
            heads=heads,
            head_dim=head_dim,
            width=next(m.in_features for m in middle[0].modules() if isinstance(m, nn.Linear)),
            wide=max(max(m.in_features, m.out_features) for m in middle[0].modules() if isinstance(m, nn.Linear)),
            tokens=grid.tokens,
            video_tokens=grid.video_tokens,
            cells=adapter.latent_channels * math.prod(config.latent_size()),
            weights=experts * (outside + sum(each)) if lora else 0,
            layer_weights=max(each),
            layers_weights=experts * sum(each) if lora else 0,
            passed_weights=sum(each),
            trained=trained,
            dora=dora,
            linear=adapter.linear_flops(grid),
            lora=2.0 * trained / experts * grid.tokens if lora else 0.0,
            density=AttentionRecipe.of(config).density(grid),
            element=2 if precision == "bf16" else 4,
            all_chunked=len(middle) == len(adapter.layers()),
            takes_first_frame=adapter.takes_first_frame,
        )


@lru_cache(maxsize=8)
def _skeleton(family: str, text_tokens: int, architecture: str, frozen: torch.dtype) -> ModelAdapter:
    config = ModelConfig(family=family)
    with torch.device("meta"):
        adapter = family_of(config).from_config(json.loads(architecture), text_tokens=text_tokens)
    settle(adapter.transformer, frozen, "meta")
    return adapter


def _saved_by_fp8(layer: nn.Module, storage: str | None) -> int:
    """Bytes less that a layer takes with `train.memory.fp8_storage`: numbers of one byte, and four for each row."""
    if storage is None:
        return 0
    linear = [m for m in layer.modules() if isinstance(m, nn.Linear) and fits(m)]
    return sum(m.weight.nbytes - m.weight.numel() - 4 * m.out_features for m in linear)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _ends(transformer: nn.Module, targets: str, prefixes: Sequence[str], end: str) -> int:
    """``in_features`` or ``out_features`` of all layers that carry a LoRA: a factor has its rank times as many.

    Args:
        prefixes: what each expert's names begin with.
    """
    layers = [(name, module) for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return sum(getattr(m, end) for prefix in prefixes for n, m in layers if re.fullmatch(targets, prefix + n))
