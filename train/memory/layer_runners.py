"""What a transformer layer keeps for its backward: one policy a run, or one a layer (``parallel.activations=auto``).

    none        everything that autograd saves
    full        the layer's input; the layer runs again in the backward
    selective   the input, and attention's output and log-sum-exp: all but attention runs again

What is kept can go to CPU memory (`train.memory.offload`). A feed-forward layer can run in stretches of tokens, each of
which runs again in the backward, so that its wide middle never exists for all tokens.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from train.errors import UserError
from train.memory.compiler import compile_call
from train.memory.offload import Offload, Stored

_Runner = Callable[..., Any]


def mixed_runner(runners: Mapping[nn.Module, _Runner]) -> _Runner:
    """Runs each layer by its own `layer_runner`; what else a model checkpoints, such as its text's, as it is."""
    by_layer = {id(layer): runner for layer, runner in runners.items()}
    return lambda layer, hidden, *rest: by_layer.get(id(layer), call_layer)(layer, hidden, *rest)


def call_layer(layer: nn.Module, *inputs: Any) -> Any:
    """Calls a layer as the model does by itself, its hooks included."""
    return layer(*inputs)


def layer_runner(
    policy: str, offload: Offload | None = None, *, compiled: bool = False, call: _Runner = call_layer
) -> _Runner:
    """How a model calls its layers, ``run(layer, hidden_states, *rest)``, for diffusers' gradient checkpointing.

    Args:
        policy: ``full``, ``selective`` or, beside layers that have one of those, ``none``.
        offload: where to what is kept goes; None leaves it on the device.
        compiled: compile the layer with its checkpoint as one graph. Operators inside a compiled layer are out of
            reach from outside, so that checkpointing a compiled layer would compute attention again.
        call: what is compiled, or checkpointed, of a layer.
    """
    if policy == "none":
        return compile_call(call) if compiled else call
    settings: dict[str, Any] = {"use_reentrant": False}
    if compiled:
        settings["context_fn"] = functools.partial(_compiled_contexts, policy == "selective")
    elif policy == "selective":
        settings["context_fn"] = functools.partial(_contexts, offload)

    def inner(layer: nn.Module, *inputs: Any) -> Any:
        return checkpoint(functools.partial(call, layer), *inputs, **settings)

    plain = call
    if compiled:
        inner, plain = compile_call(inner), compile_call(call)
    kept = inner if offload is None else _offloading(inner, offload)

    def run(layer: nn.Module, *inputs: Any) -> Any:
        # the first layers where a LoRA leaves them out: there is no backward that could take back what is kept
        learns = any(x.requires_grad for x in _tensors(inputs)) or any(p.requires_grad for p in layer.parameters())
        return (kept if learns else plain)(layer, *inputs)

    return run


def _offloading(inner: _Runner, offload: Offload) -> _Runner:
    def run(layer: nn.Module, hidden: Tensor, *rest: Any) -> Any:
        # what all layers share stays: text, modulation, rotary angles; and so do weights, which compiled layers save
        shared = {x.data_ptr() for x in _tensors(rest)}

        def pack(x: Tensor) -> Any:
            stays = x.data_ptr() in shared or any(x.data_ptr() == weight.data_ptr() for weight in layer.parameters())
            return x if stays else offload.put(x)

        with saved_tensors_hooks(pack, offload.get):
            return inner(layer, hidden, *rest)

    return run


def chunk_tokens(layer: nn.Module, tokens: int) -> None:
    """Makes a layer that treats each token alone run on ``tokens`` of them at a time, and again in the backward.

    Args:
        layer: takes and gives (batch, tokens, features).
    """
    layer.__class__ = _chunked(type(layer), tokens)  # type: ignore[arg-type]


@functools.cache
def _chunked(kind: Any, tokens: int) -> Any:
    """A class for all feed-forwards of a kind, so that the layers that hold them share one compiled graph."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        whole = super(chunked, self).forward
        return torch.cat([checkpoint(whole, part, use_reentrant=False) for part in x.split(tokens, dim=1)], dim=1)

    chunked: Any = type(f"Chunked{kind.__name__}", (kind,), {"forward": forward})
    return chunked


def _is_self_attention(operator: Any, args: Sequence[Any]) -> bool:
    """Whether an operator's results are worth keeping; cross-attention to a few text tokens is not."""
    if operator is torch.ops.radial.attention.default:
        return True
    return operator in _DENSE and args[0].shape == args[1].shape


_DENSE = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _compiled_contexts(keep_attention: bool) -> Any:
    """The compiler's policy for each operator; without one, torch 2.11 keeps what a collective gives."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = keep_attention and _is_self_attention(operator, args)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _contexts(offload: Offload | None) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    results: deque[Any] = deque()
    put, get = (offload.put, offload.get) if offload is not None else (_same, _same)
    return _Keep(results, put), _Reuse(results, get)


class _Keep(TorchDispatchMode):
    """Keeps what attention gives.

    torch's selective contexts do so too, but cannot move it off the GPU, and FlexAttention, which is always compiled,
    does not reach their policy: it would be computed again without a word.
    """

    supports_higher_order_operators = True

    def __init__(self, results: deque[Any], put: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.results, self.put = results, put

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(operator, HigherOrderOperator):  # FlexAttention, which torch would run uncompiled in this mode
            raise UserError(
                f"parallel.activations=selective cannot keep what {operator.name()} gives in layers that are not "
                "compiled: add trainer.compile=true, or take parallel.activations=full"
            )
        out = operator(*args, **(kwargs or {}))
        if _is_self_attention(operator, args):
            self.results.append(tree_map_only(Tensor, lambda x: self.put(x.detach()), out))
        return out


class _Reuse(TorchDispatchMode):
    """Gives what `_Keep` kept, in the same order, instead of computing it."""

    def __init__(self, results: deque[Any], get: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.results, self.get = results, get

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_self_attention(operator, args):
            return operator(*args, **(kwargs or {}))
        return tree_map_only((Tensor, Stored), self.get, self.results.popleft())


def _same(x: Tensor) -> Tensor:
    return x


def _tensors(items: Iterable[Any]) -> Iterable[Tensor]:
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (tuple, list)):
            yield from _tensors(item)
