"""What each rank of the tests of streamed weights runs (tests/train/memory/test_weight_stream.py)."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.family_ranks import Step
from tests.helpers.sequence_ranks import average, group_of
from train.config.schema import ParallelConfig
from train.lora.layers import lora_parameters
from train.memory import weight_stream
from train.memory.weight_stream import WeightStream


def shared(opens: bool) -> dict[str, Any]:
    """Whether a rank's layers have their weights, and whether what rank 0 writes into its copy is seen here.

    ``opens``: whether the other rank may open its memory.
    """
    if not opens:
        weight_stream.Path.readlink = _refuses
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16).requires_grad_(False) for _ in range(3)]
    weights = [layer.weight.clone() for layer in layers]
    stream = WeightStream([layers], torch.device("cpu"))
    said, same = io.StringIO(), True
    with redirect_stdout(said):
        stream.place()
    for layer, weight in zip(layers, weights, strict=True):
        stream.arrive(layer)
        same = same and torch.equal(layer.weight, weight)
    dist.barrier()
    if dist.get_rank() == 0:
        stream.hosts[0].fill_(1)
    dist.barrier()
    stream.arrive(layers[0])
    shares = bool(layers[0].weight.view(torch.uint8).eq(1).all()) if dist.get_rank() else opens
    return {"same": same, "shares": shares, "said": said.getvalue()}


def _refuses(place: Path) -> Path:
    raise PermissionError(place)


def step(size: int, streamed: bool) -> dict[str, Any]:
    """LoRA gradients, averaged over the world, of a step whose clips ``size`` ranks share."""
    parallel = ParallelConfig(activations="full", offload_weights=streamed)
    own = Step("wan", (3, 4, 5), "released", 1, parallel, compiled=False, sequence=group_of(size))
    own().backward()
    return {name: average(parameter.grad) for name, parameter in lora_parameters(own.transformer).items()}
