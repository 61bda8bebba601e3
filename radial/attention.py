"""Attention of a video's tokens under a pattern: the function that users of the library call."""

from __future__ import annotations

import torch
from torch import Tensor

from radial.backends import BACKENDS, AttentionCall, choose_backend
from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.head_layouts import HeadLayout, build_head_layouts
from radial.layout import BlockLayout, build_layout, layout_of
from radial.patterns import Pattern, Released
from radial.patterns.ultravico import UltraViCo
from radial.reorder import reordered
from radial.scaled_scores import scaled_attention


def radial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: VideoGrid,
    pattern: Pattern = Released(),  # noqa: B008  frozen and stateless
    *,
    block: int = 128,
    layer: int = 0,
    text_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Self-attention of a video's tokens over the block pairs that a static pattern keeps.

        grid = VideoGrid.from_pixels(frames=321, height=720, width=1280)
        out = radial_attention(q, k, v, grid)

    Args:
        q, k, v: (batch, tokens, heads, head_dim); video tokens frame by frame in raster order, then text tokens.
        grid: how those tokens lie; ``grid.tokens`` is the sequence length.
        pattern: which block pairs are computed (`radial.patterns`).
        block: block size in tokens, a power of two (128 for `fa4`; the other GPU kernels take 64 too).
        layer: the layer that attention is of, where the pattern's masks differ by head and layer.
        text_lengths: (batch,) integer tensor, valid text tokens of each sample, clamped to the grid's. Keys after
            them are masked; their query rows are still computed. None means that all text tokens count.
        scale: factor of the scores, head_dim ** -0.5 by default.
        backend: a backend by name, or None for the fastest that can serve the call.

    Returns:
        (batch, tokens, heads, head_dim), dtype of q.

    Raises:
        RadialError: shapes that do not agree with the grid, or a backend that cannot serve the call.
    """
    layout: BlockLayout | HeadLayout
    if pattern.by_head and q.dim() == 4:
        layout = build_head_layouts(pattern, grid, block, layers=layer + 1, heads=q.shape[2]).layer(layer)
    else:
        layout = build_layout(pattern, grid, block)
    return attention_over(q, k, v, layout, text_lengths=text_lengths, scale=scale, backend=backend)


def attention_over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout | HeadLayout,
    *,
    text_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
    in_order: bool = False,
) -> Tensor:
    """`radial_attention` for callers that already hold a layout, such as the layers of a model.

    Args:
        q, k, v, text_lengths, scale, backend: as of `radial_attention`.
        layout: the pattern worked out.
        in_order: the tokens of q, k, v and the output lie in the order of the layout's blocks (``layout.orders``), so
            that nothing has to be moved.
    """
    grid = layout.grid
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise RadialError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, "
            "expected one shape (batch, tokens, heads, head_dim)"
        )
    if q.shape[1] != grid.tokens:
        raise RadialError(
            f"q has {q.shape[1]} tokens, expected {grid.tokens} "
            f"({grid.frames} frames x {grid.tokens_per_frame} + {grid.text_tokens} text tokens)"
        )
    if isinstance(layout, HeadLayout) and q.shape[2] != layout.family.own:
        raise RadialError(f"q has {q.shape[2]} heads, the layout has masks for {layout.family.own}")
    if text_lengths is not None and (text_lengths.shape != q.shape[:1] or text_lengths.is_floating_point()):
        raise RadialError(
            f"text_lengths is {text_lengths.dtype} of shape {tuple(text_lengths.shape)}, "
            f"expected integers of shape ({q.shape[0]},)"
        )
    if text_lengths is not None:
        # clamped, since checking the values would wait for the device; int64, since a narrow type cannot count tokens
        text_lengths = text_lengths.long().clamp(0, grid.text_tokens)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    name = _backend_name(
        layout.handle, str(q.device), q.dtype, q.shape[-1], needs_grad, text_lengths is not None, backend
    )
    if name == UltraViCo.name:
        assert isinstance(layout.pattern, UltraViCo)
        return scaled_attention(
            q, k, v, grid, layout.pattern, block=layout.block, text_lengths=text_lengths, scale=scale
        )
    orders = None if in_order else layout.orders(q.device)
    if orders is not None:
        q, k, v = (reordered(x, *orders) for x in (q, k, v))
    out = BACKENDS[name](
        q,
        k,
        v,
        layout,
        text_lengths=text_lengths,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
    return out if orders is None else reordered(out, orders[1], orders[0])


def _backend_name(
    layout: int,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    needs_grad: bool,
    masks_text: bool,
    name: str | None,
) -> str:
    """`choose_backend`, ready for the call; for the compiler, which must not look inside, a constant of constants."""
    if isinstance(layout_of(layout).pattern, UltraViCo):
        if name is not None:
            raise RadialError(f"attention backend {name} cannot scale scores, as ultravico does: leave it out")
        return UltraViCo.name
    call = AttentionCall(torch.device(device), dtype, head_dim, needs_grad, masks_text, layout_of(layout))
    backend = choose_backend(call, name)
    call.layout.orders(call.device)  # its copy has to be there before a compiler follows the call
    backend.prepare(call)
    return backend.name


# torch.compiler.assume_constant_result does just this, but importing the compiler for it takes seconds
_backend_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
