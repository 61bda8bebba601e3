"""Compiling transformer layers, with their memory in mind.

A checkpointed layer runs again in its backward, as one graph with it, and the compiler keeps what both use. By default
that takes some hidden states more than it needs: it keeps float32 numbers instead of the 16-bit tensors from which a
few operations give them again, and reserves the memory of a tensor that is gone for a later one of its size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import OpOverload

_GRAPHS = 128  # of a process: kinds of layer x shapes of clips x layouts, dense and sparse
_CONVERT = torch.ops.prims.convert_element_type.default
_SUMS = (
    torch.ops.aten.sum.dim_IntList,
    torch.ops.aten.mean.dim,
    torch.ops.aten.var_mean.correction,
    torch.ops.aten.amax.default,
)
_NARROW = (torch.bfloat16, torch.float16)


class StoreNarrow(CustomGraphPass):
    """Stores 16-bit tensors that are widened to float32 and then summed over rows, or go on in both widths.

    Those are the inputs and gradients of norms, what is rounded to float8, and residual streams. Kernels pass over them
    twice; by itself the compiler stores what the second pass needs a few operations further on, as float32.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=_CONVERT):
            source, dtype = node.args
            value = source.meta.get("val")  # the compiler's own passes may leave a node without it
            narrow = isinstance(value, Tensor) and value.dtype in _NARROW
            if narrow and dtype == torch.float32 and (_goes_on_narrow(node) or _reaches_a_sum(node)):
                source.meta["inductor_realize_to_strides"] = True  # what the compiler reads when it lowers a node

    def uuid(self) -> Any:
        """Changes with this file: compiled graphs in the cache are then made anew."""
        return get_hash_for_files((__file__,))


def _narrows(node: fx.Node) -> bool:
    return node.target is _CONVERT and node.args[1] in _NARROW


def _goes_on_narrow(node: fx.Node) -> bool:
    return any(map(_narrows, node.users))


def _reaches_a_sum(node: fx.Node) -> bool:
    """Whether a value gets into a sum by operations on single numbers alone, and in float32 all the way."""
    seen, ahead = {node}, [node]
    while ahead:
        for user in ahead.pop().users:
            if user.target in _SUMS:
                return True
            if user not in seen and _of_single_numbers(user) and not _narrows(user):
                seen.add(user)
                ahead.append(user)
    return False


def _of_single_numbers(node: fx.Node) -> bool:
    operation = node.target
    return isinstance(operation, OpOverload) and (operation.is_view or torch.Tag.pointwise in operation.tags)


SETTINGS: dict[str, Any] = {
    "dynamic": False,  # no graph for any shape
    "options": {"allow_buffer_reuse": False, "post_grad_custom_post_pass": StoreNarrow()},
}
"""What all layers are compiled with."""


def compile_call(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a layer, with one graph for each kind of layer, shape of clip and layout of attention."""
    _allow_graphs()
    return torch.compile(run, **SETTINGS)


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compiles the layers themselves, in place."""
    _allow_graphs()
    for layer in layers:
        layer.compile(**SETTINGS)


def _allow_graphs() -> None:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    config.optimize_ddp = False  # it cuts graphs where buckets of gradients end, and a LoRA's are small
    # warns of operators in place under a checkpoint, of which layers have none
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
