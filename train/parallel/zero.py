"""DeepSpeed ZeRO: its config, and the way between the shares of the ranks and whole tensors.

What is trained is fp32 on every rank, the frozen weights keep their own dtype, and the arithmetic runs under autocast:
the numbers of a run without ZeRO. DeepSpeed's own bf16 mode would round the LoRA's forward and the layers that a family
keeps in fp32. Checkpoints hold whole tensors in torch's format, so that any number of ranks, with or without ZeRO, goes
on from them.

    stage 1    optimizer state is spread over all ranks
    stage 2    and gradients
    stage 3    and weights, frozen ones included
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from train.models.weights import settle

# deepspeed is imported where it is used: only a run with ZeRO waits for it

REDUCE_BUCKET = 50_000_000
"""Gradients that are reduced together, in elements: DeepSpeed holds two such buffers, by default of 2 GB each."""


def zero_config(
    stage: int, *, bf16: bool, offload_optimizer: bool, offload_parameters: bool, compiled: bool = False
) -> dict[str, Any]:
    """DeepSpeed's config of a run; clipping and accumulation come from the trainer.

    Args:
        compiled: whether layers are, which `gather_whole` has prepared for stage 3.
    """
    stage_config: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "overlap_comm": stage > 1}
    stage_config["reduce_bucket_size"] = REDUCE_BUCKET
    if compiled and stage == 3:
        # DeepSpeed's linear layer, which keeps no gathered weights for the backward, torch 2.11 compiles to wrong
        # gradients; compiled layers keep none anyway, and the modules outside of them are small
        stage_config["memory_efficient_linear"] = False
        # the last layers would stay gathered: their weights count as used again soon, however far the next use is
        stage_config["stage3_max_reuse_distance"] = 0
    if offload_optimizer:
        stage_config["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload_parameters:
        stage_config["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its throughput figures only
        "zero_optimization": stage_config,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on the CPU as well, and needs no compiler
        "bf16": {"enabled": False},
        # no module is listed as safe to communicate in bf16: gradients are reduced in fp32
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


def spread_weights(transformer: Any, frozen: torch.dtype, device: torch.device | str, config: dict[str, Any]) -> None:
    """Spreads a model over the ranks for stage 3, part by part as it comes from its files: no rank holds all of it.

    Args:
        transformer: a diffusers model with its weights as they are stored, and its LoRA.
        frozen: dtype of the frozen weights.
        config: of `zero_config`.
    """
    import deepspeed

    settle(transformer, frozen, device, lambda part: deepspeed.zero.Init(module=part, config_dict_or_path=config))
    deepspeed.zero.Init(module=transformer, config_dict_or_path=config)  # the model's own tables


def gather_whole(runners: Mapping[nn.Module, Callable[..., Any]]) -> None:
    """Makes stage 3 gather all weights of a layer around its forward, not those of each module around the module's.

    A compiler then meets no hook of DeepSpeed's in a layer: it would break there, which it cannot do in a checkpoint.

    Args:
        runners: what runs each layer once its weights are there, ``run(layer, *inputs)``, by way of
            `train.models.layer_calls.forward_alone`.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer, runner in runners.items():
        set_z3_leaf_module(layer, True)
        layer.runner = runner  # type: ignore[assignment]
        layer.__class__ = _gathered(type(layer))  # type: ignore[arg-type]


@functools.cache
def _gathered(kind: Any) -> Any:
    """A class for all layers of a kind, so that they share compiled graphs."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():  # there is nothing to keep, nor does diffusers call a checkpoint
            return self.forward_alone(*inputs, **named)
        assert not named, "called by other means than `call_gathered`"
        return self.runner(self, *inputs)

    return type(f"Gathered{kind.__name__}", (kind,), {"forward": forward, "forward_alone": kind.forward})


def call_gathered(layer: nn.Module, hidden: Tensor, *rest: Any) -> Any:
    """Calls a layer of `gather_whole`; for diffusers' gradient checkpointing.

    DeepSpeed takes a layer's gradients once those of its inputs are there. Of inputs without any, the first layer's, it
    would take them before they are computed.
    """
    return layer(hidden if hidden.requires_grad else hidden.detach().requires_grad_(), *rest)


def _is_whole(parameter: Parameter) -> bool:
    """Whether this rank's tensor is the parameter's one and only value: no ZeRO optimizer holds its fp32 master."""
    return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")


def whole_shape(parameter: Parameter) -> torch.Size:
    """The parameter's shape, also where ZeRO 3 has spread it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def whole_parameter(parameter: Parameter) -> Tensor:
    """The value of a trained parameter, gathered. Every rank must call it."""
    if _is_whole(parameter):
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


@torch.no_grad()
def set_whole_parameter(parameter: Parameter, value: Tensor) -> None:
    """The inverse of `whole_parameter`; ``value`` is whole on every rank. Every rank must call it."""
    value = value.to(parameter.device, torch.float32)
    if _is_whole(parameter):
        parameter.copy_(value)
        return
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # of stage 3; does nothing to others
        parameter.copy_(value)
    if hasattr(parameter, "ds_id"):
        safe_set_local_fp32_param(parameter, _share(parameter, value))
    else:
        safe_set_full_fp32_param(parameter, value)


def gather_optimizer_state(optimizer: Any, groups: Sequence[Sequence[Parameter]], keep: bool) -> dict[str, Any]:
    """The state of a DeepSpeed optimizer in the format of the torch optimizer that it wraps. Every rank must call it.

    Args:
        optimizer: what ``deepspeed.initialize`` returned.
        groups: the parameters that the wrapped optimizer was made with.
        keep: whether this rank wants the result; it is collected on the CPU.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    numbers = itertools.count()
    told = [
        {**_without_params(own), "params": [next(numbers) for _ in group]}
        for own, group in zip(optimizer.optimizer.param_groups, groups, strict=True)
    ]
    masters = _masters(optimizer)
    first = optimizer.optimizer.state.get(masters[0], {})
    if first:
        _link(optimizer)
    state: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(itertools.chain.from_iterable(groups) if first else ()):
        state[index] = {}
        for key, value in first.items():
            whole = safe_get_full_optimizer_state(parameter, key) if value.shape == masters[0].shape else value
            if keep:
                state[index][key] = whole.detach().cpu().clone()
    return {"state": state if keep else {}, "param_groups": told}


@torch.no_grad()
def scatter_optimizer_state(optimizer: Any, groups: Sequence[Sequence[Parameter]], saved: dict[str, Any]) -> None:
    """The inverse of `gather_optimizer_state`; ``saved`` is whole on every rank. Every rank must call it."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    for own, group in zip(optimizer.optimizer.param_groups, saved["param_groups"], strict=True):
        own.update(_without_params(group))
    if not saved["state"]:
        return
    parameters = itertools.chain.from_iterable(groups)
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    first = saved["state"][numbers[0]]
    scalars = {key for key, value in first.items() if value.shape != whole_shape(groups[0][0])}
    for master in _masters(optimizer):
        optimizer.optimizer.state[master] = {
            key: value.clone() if key in scalars else torch.zeros_like(master) for key, value in first.items()
        }
    _link(optimizer)
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in saved["state"][number].items():
            if key in scalars:
                continue
            value = value.to(parameter.device, torch.float32)
            if hasattr(parameter, "ds_id"):
                safe_set_local_optimizer_state(parameter, _share(parameter, value), key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)


def _link(optimizer: Any) -> None:
    """Has each parameter find its part of the optimizer's state; stage 3 keeps no links.

    Stages 1 and 2 link once, after the first group's first step, when the other groups have no state yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _masters(optimizer: Any) -> list[Tensor]:
    """The flat fp32 tensors of this rank that the wrapped optimizer really steps on."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def _share(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor under ZeRO 3; the last part is padded by zeros."""
    length, rank = parameter.partition_numel(), torch.distributed.get_rank()
    part = value.flatten()[rank * length : (rank + 1) * length]
    return F.pad(part, (0, length - part.numel()))
