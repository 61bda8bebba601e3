"""Compiling transformer blocks, with their memory in mind.

A checkpointed block runs again in its backward, as one graph with it, and the compiler keeps what both use. By default
that takes some hidden states more than it needs: it keeps float32 results of norms instead of the 16-bit tensors from
which a few operations give them again, and reserves the memory of a tensor that is gone for a later one of its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

_GRAPHS = 128  # of a process: kinds of block x shapes of clips x layouts, dense and sparse
_CONVERT = torch.ops.prims.convert_element_type.default
_NORMS = (torch.ops.aten.var_mean.correction, torch.ops.aten.pow.Tensor_Scalar)
_NARROW = (torch.bfloat16, torch.float16)


class StoreNarrow(CustomGraphPass):
    """Stores the 16-bit tensors that norms widen to float32, and those that are widened to go on in both widths.

    Where the compiler stores a step further on instead, it stores float32.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=_CONVERT):
            source, dtype = node.args
            value = source.meta.get("val")  # the compiler's own passes may leave a node without it
            narrow = isinstance(value, Tensor) and value.dtype in _NARROW
            if narrow and dtype == torch.float32 and any(map(_wants_narrow, node.users)):
                source.meta["inductor_realize_to_strides"] = True  # what the compiler reads when it lowers a node

    def uuid(self) -> Any:
        """Changes with this file: compiled graphs in the cache are then made anew."""
        return get_hash_for_files((__file__,))


def _wants_narrow(user: fx.Node) -> bool:
    return user.target in _NORMS or (user.target is _CONVERT and user.args[1] in _NARROW)


_SETTINGS: dict[str, Any] = {
    "dynamic": False,  # no graph for any shape
    "options": {"allow_buffer_reuse": False, "post_grad_custom_post_pass": StoreNarrow()},
}


def compile_call(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a block, with one graph for each kind of block, shape of clip and layout of attention."""
    _allow_graphs()
    return torch.compile(run, **_SETTINGS)


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles the blocks themselves, in place."""
    _allow_graphs()
    for block in blocks:
        block.compile(**_SETTINGS)


def _allow_graphs() -> None:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    config.optimize_ddp = False  # it cuts graphs where buckets of gradients end, and a LoRA's are small
