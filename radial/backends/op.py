"""The torch operators ``radial::attention`` and ``radial::attention_backward``, and the backends behind them.

A kernel that torch does not know would break the graph of a compiled transformer block. As an operator with a fake
implementation and a registered gradient it is one node of the graph, and selective checkpointing can name it and keep
its results (the output and the log-sum-exp), so that attention is not computed again. An operator takes tensors and
numbers only, so a layout goes in as its handle and a backend as its name. Where masks differ by head the handle is that
of all layers, and the layer goes in as a tensor: a number would be a constant of the graph, and each layer a graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from radial.backends.base import AttentionCall, Layout
from radial.head_layouts import HeadLayout, HeadLayouts
from radial.layout import layout_of


class Kept(NamedTuple):
    """What a backward needs beside the gradient of the output: the forward's arguments and what it returned."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    layout: Layout
    text_lengths: Tensor | None
    scale: float


class KernelBackend(ABC):
    """A backend with kernels of its own. Subclasses give `forward`, and `backward` when they are differentiable."""

    name: str
    # Does forward return the log-sum-exp (batch, heads, tokens) that backward needs? An empty tensor stands in if not.
    gives_lse: bool

    @abstractmethod
    def why_not(self, call: AttentionCall) -> str | None:
        """See `radial.backends.base.Backend`."""

    def prepare(self, call: AttentionCall) -> None:  # noqa: B027  a default, not a duty
        """Nothing to do: the operator prepares for itself."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, text_lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Contiguous output (batch, tokens, heads, head_dim), dtype of q, and the log-sum-exp, float32 (or empty).

        Arguments as in `radial.backends.base.Backend`, with a `BlockLayout` on the device of q.
        """

    def backward(self, grad: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        """Contiguous gradients of q, k and v, from the gradient of the output and what `forward` returned."""
        raise NotImplementedError(f"attention backend {self.name} runs forward only")

    def backward_into(self, grad: Tensor, kept: Kept) -> None:
        """`backward` that overwrites q, k and v by their gradients."""
        gradients = self.backward(grad, kept)
        for x, gradient in zip((kept.q, kept.k, kept.v), gradients, strict=True):
            x.copy_(gradient)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, text_lengths: Tensor | None, scale: float
    ) -> Tensor:
        layer = layout.layer if isinstance(layout, HeadLayout) else None
        return torch.ops.radial.attention(q, k, v, text_lengths, scale, layout.handle, self.name, layer)[0]


def _kernels(name: str) -> KernelBackend:
    from radial.backends import BACKENDS  # here, since the registry imports the backends and they import this file

    backend = BACKENDS[name]
    assert isinstance(backend, KernelBackend)
    return backend


def _layout(handle: int, layer: Tensor | None, device: torch.device) -> Layout:
    """The layout of a call, ready for `KernelBackend`."""
    found = layout_of(handle)
    if isinstance(found, HeadLayouts):
        assert layer is not None
        return found.layer(int(layer))
    return found.to(device)


@torch.library.custom_op("radial::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_lengths: Tensor | None,
    scale: float,
    layout: int,
    backend: str,
    layer: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return _kernels(backend).forward(q, k, v, _layout(layout, layer, q.device), text_lengths, scale)


@torch.library.custom_op("radial::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    text_lengths: Tensor | None,
    scale: float,
    layout: int,
    backend: str,
    layer: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    own = _layout(layout, layer, q.device)
    return _kernels(backend).backward(grad, Kept(q, k, v, out, lse, own, text_lengths, scale))


@torch.library.custom_op("radial::attention_backward_into", mutates_args=("q", "k", "v"))
def _attention_backward_into(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    text_lengths: Tensor | None,
    scale: float,
    layout: int,
    backend: str,
    layer: Tensor | None = None,
) -> None:
    own = _layout(layout, layer, q.device)
    _kernels(backend).backward_into(grad, Kept(q, k, v, out, lse, own, text_lengths, scale))


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_lengths: Tensor | None,
    scale: float,
    layout: int,
    backend: str,
    layer: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    shape = (batch, heads, tokens) if _kernels(backend).gives_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, text_lengths, ctx.scale, ctx.layout, ctx.backend, layer = inputs
    ctx.save_for_backward(q, k, v, text_lengths, layer, *output)
    # the graph keeps the layout alive as long as its backward may come
    ctx.owner = layout_of(ctx.layout)


def _gradients(ctx: Any, grad: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, text_lengths, layer, out, lse = ctx.saved_tensors
    rest = (out, lse, text_lengths, ctx.scale, ctx.layout, ctx.backend, layer)
    if isinstance(q, FunctionalTensor):
        # the compiler drops the copies where nothing else needs q, k and v: a block's backward then holds three
        # tensors of its full length less at the moment when it holds most
        gradients = q.clone(), k.clone(), v.clone()
        torch.ops.radial.attention_backward_into(grad, *gradients, *rest)
    else:
        gradients = torch.ops.radial.attention_backward(grad, q, k, v, *rest)
    return (*gradients, None, None, None, None, None)


_attention.register_autograd(_gradients, setup_context=_save)
