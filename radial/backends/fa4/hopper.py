"""flash-attn-4's Hopper kernels over block lists, with a tile order of our own.

The library's block-sparse kernels issue their tiles in ascending order. The two kernel classes are derived here with a
tile scheduler that reads the order from a tensor (`radial.backends.fa4.schedule` says which), and compiled once for any
number of tokens, heads and samples. Everything else is the library's. Importing this file imports flash-attn-4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cutlass
import torch
from cutlass import Float32, Int32, cute
from flash_attn.cute.block_sparsity import BlockSparseTensors
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.interface import _bwd_postprocess_convert, _bwd_preprocess, _flash_attn_bwd, _flash_attn_fwd
from flash_attn.cute.tile_scheduler import SingleTileScheduler, WorkTileInfo
from flash_attn.cute.utils import AuxData
from quack.compile_utils import make_fake_tensor
from torch import Tensor

from radial.backends.lists import Lists

TILE = 128  # both kernels' tile along their grid
# Heads are taken in groups whose float32 sums of dq are about this large together: each group still fills the GPU many
# times over, and 40 heads of 291,600 tokens would take 5.6 GiB at once.
DQ_SUM_BYTES = 3 * 2**29
_DTYPES = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}


class OrderedScheduler(SingleTileScheduler):
    """The library's one-tile-a-block scheduler; block i of the grid works on tile ``order[i]``."""

    @dataclass
    class Params(SingleTileScheduler.Params):
        order: cute.Tensor | None = None

    @staticmethod
    def create(params: Any, ctx: Any = None, *, loc: Any = None, ip: Any = None) -> OrderedScheduler:
        return OrderedScheduler(params, cute.arch.block_idx())

    def get_current_work(self, *, loc: Any = None, ip: Any = None) -> WorkTileInfo:
        position, head, batch = self._blk_coord
        return WorkTileInfo((self.params.order[position], head, batch, Int32(0)), self._is_first_block)

    def __new_from_mlir_values__(self, values: list) -> OrderedScheduler:
        plain = super().__new_from_mlir_values__(values)
        scheduler = OrderedScheduler(plain.params, plain._blk_coord)
        scheduler._is_first_block = plain._is_first_block
        return scheduler


def _ordered(args: tuple) -> list:
    """A kernel's arguments with the scheduler exchanged; the order travels in a field that only sm100 reads."""
    order = next(a.dq_write_order for a in args if isinstance(a, BlockSparseTensors))
    out = []
    for arg in args:
        if isinstance(arg, SingleTileScheduler.Params):
            fields = {name: getattr(arg, name) for name in SingleTileScheduler.Params.__dataclass_fields__}
            arg = OrderedScheduler.Params(**fields, order=order)
        out.append(OrderedScheduler if arg is SingleTileScheduler else arg)
    return out


class _Forward(FlashAttentionForwardSm90):
    def kernel(self, *args: Any) -> Any:
        return super().kernel(*_ordered(args))


class _Backward(FlashAttentionBackwardSm90):
    def kernel(self, *args: Any) -> Any:
        return super().kernel(*_ordered(args))


@cute.jit
def _key_counts(batch: Any, head: Any, query: Any, key: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
    """The library's mask function for padded text: keys from the sample's valid length on are masked."""
    return key < aux_tensors[0][batch[0]]


def forward(q: Tensor, k: Tensor, v: Tensor, lists: Lists, valid: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention output and log-sum-exp.

    Args:
        q, k, v: (batch, tokens, heads, head_dim), bf16 or fp16, head_dim contiguous, other strides multiples of 8.
        lists: of key blocks for each query block, of all heads or of each.
        valid: (batch,) int32 keys that count in masked blocks; None without masked blocks.
        scale: factor of the scores.

    Returns:
        out (batch, tokens, heads, head_dim), dtype of q, and lse (batch, heads, tokens) float32.
    """
    batch, tokens, heads, dim = q.shape
    out = torch.empty(batch, tokens, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    kernel = _compiled_forward(_DTYPES[q.dtype], dim, valid is not None)
    kernel(
        q, k, v, out, lse, scale, *[None] * 8, _expanded(lists, batch, heads), AuxData(_aux(valid), None), None, None
    )
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    valid: Tensor | None,
    scale: float,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Gradients of q, k and v; ``lists`` hold the query blocks of each key block, the rest is as in `forward`.

    Args:
        into: where the gradients go, strided like q, k and v. It may be q, k and v themselves: a block of k and v is
            read by the tile alone that writes its gradients, and dq is summed elsewhere.
    """
    heads = q.shape[2]
    groups = math.ceil(4 * q.numel() / DQ_SUM_BYTES)
    for some in torch.arange(heads).tensor_split(min(groups, heads)):
        own = slice(int(some[0]), int(some[-1]) + 1)
        tensors = [t[:, :, own] for t in (grad, q, k, v, out)]
        _backward_of(tensors, lse[:, own], lists.of_heads(own), valid, scale, [t[:, :, own] for t in into])


def _backward_of(
    tensors: Sequence[Tensor],
    lse: Tensor,
    lists: Lists,
    valid: Tensor | None,
    scale: float,
    into: Sequence[Tensor],
) -> None:
    grad, q, k, v, out = tensors
    dq, dk, dv = into
    batch, tokens, heads, dim = q.shape
    tile = _backward_tile(dim)
    rows = -(-tokens // tile) * tile
    dtype = _DTYPES[q.dtype]
    dq_sum = torch.empty(batch, heads, rows * dim, dtype=torch.float32, device=q.device)
    delta, lse_log2 = (torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device) for _ in range(2))
    _bwd_preprocess(out, grad, delta, lse, lse_log2, dq_sum, None, None, None, dtype, dim, dim, tile, fake_mode=False)
    kernel = _compiled_backward(dtype, dim, valid is not None)
    kernel(
        *(q, k, v, grad, lse_log2, delta, dq_sum, dk, dv, scale),
        *[None] * 9,
        AuxData(_aux(valid), None),
        _expanded(lists, batch, heads),
        None,
    )
    _bwd_postprocess_convert(
        dq_sum, dq, scale, None, None, 90, dtype, dim, tile, 256, *_dq_layout(dim), fake_mode=False
    )


def dense_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`forward` over all blocks, by the library's dense kernel."""
    out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True)
    return out, lse


def dense_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """`backward` over all blocks, by the library's dense kernel."""
    dq, dk, dv = into
    _flash_attn_bwd(q, k, v, out, grad, lse, scale, dq=dq, dk=dk, dv=dv)


def _backward_tile(dim: int) -> int:
    """Query rows of one step of the backward: what the library uses with 128-token blocks."""
    return 128 if dim <= 64 else 64


def _dq_layout(dim: int) -> tuple[int, bool]:
    """AtomLayoutMdQ and dQ_swapAB of `_compiled_backward`, which the post-processing must know."""
    return (2 if dim <= 64 else 1), False


def _aux(valid: Tensor | None) -> list[Tensor] | None:
    return None if valid is None else [valid]


def _expanded(lists: Lists, batch: int, heads: int) -> tuple[Tensor | None, ...]:
    """The library's tuple of sparse tensors, broadcast over batch and heads without copies."""
    blocks = lists.masked_count.shape[-1]
    counts = [c.expand(batch, heads, blocks) for c in (lists.masked_count, lists.full_count)]
    indices = [i.expand(batch, heads, blocks, i.shape[-1]) for i in (lists.masked, lists.full)]
    return counts[0], indices[0], counts[1], indices[1], None, None, lists.order, None


def _fake_lists() -> BlockSparseTensors:
    sym = cute.sym_int
    batch, heads, blocks = sym(), sym(), sym()

    def pair() -> tuple[Any, Any]:
        return (
            make_fake_tensor(Int32, (batch, heads, blocks)),
            make_fake_tensor(Int32, (batch, heads, blocks, sym())),
        )

    return BlockSparseTensors(*pair(), *pair(), None, None, make_fake_tensor(Int32, (blocks,)), None)


def _fake_aux(masks: bool) -> AuxData:
    return AuxData([make_fake_tensor(Int32, (cute.sym_int(),))] if masks else None, None)


def _fake_tokens(dtype: Any, count: int) -> list[Any]:
    """``count`` tensors (batch, tokens, heads, head_dim) of symbolic shape and strides, 16-byte aligned."""
    shape = tuple(cute.sym_int() for _ in range(4))
    return [make_fake_tensor(dtype, shape, divisibility=8) for _ in range(count)]


@lru_cache
def _compiled_forward(dtype: Any, dim: int, masks: bool) -> Any:
    kernel = _Forward(
        *(dtype, dim, dim, 1),
        is_causal=False,
        is_local=False,
        pack_gqa=False,
        tile_m=TILE,
        tile_n=TILE,
        num_stages=2,
        num_threads=384,
        Q_in_regs=False,
        intra_wg_overlap=True,
        mma_pv_is_rs=True,
        mask_mod=_key_counts if masks else None,
        score_mod=None,
        has_aux_tensors=masks,
        q_subtile_factor=1,
        paged_kv_non_tma=False,
    )
    q, k, v, out = _fake_tokens(dtype, 4)
    lse = make_fake_tensor(Float32, (q.shape[0], q.shape[2], q.shape[1]))
    return cute.compile(
        *(kernel, q, k, v, out, lse, Float32(1.0)),
        *[None] * 8,
        *(_fake_lists(), _fake_aux(masks), None, None, _stream()),
        options="--enable-tvm-ffi",
    )


@lru_cache
def _compiled_backward(dtype: Any, dim: int, masks: bool) -> Any:
    atom_layout, swap = _dq_layout(dim)
    kernel = _Backward(
        *(dtype, dim, dim, 1, False),
        is_local=False,
        deterministic=False,
        tile_m=_backward_tile(dim),
        tile_n=TILE,
        Q_stage=2,
        dO_stage=2,
        PdS_stage=2,
        SdP_swapAB=True,
        dKV_swapAB=False,
        dQ_swapAB=swap,
        AtomLayoutMSdP=1,
        AtomLayoutNdKV=2,
        AtomLayoutMdQ=atom_layout,
        num_threads=384,
        V_in_regs=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=_key_counts if masks else None,
        has_aux_tensors=masks,
        q_subtile_factor=TILE // _backward_tile(dim),
        dQ_single_wg=False,
    )
    q, k, v, grad, dk, dv = _fake_tokens(dtype, 6)
    batch, heads = q.shape[0], q.shape[2]
    rows, flat = cute.sym_int(), cute.sym_int()
    lse, delta = (make_fake_tensor(Float32, (batch, heads, rows), divisibility=4) for _ in range(2))
    dq_sum = make_fake_tensor(Float32, (batch, heads, flat), divisibility=4)
    return cute.compile(
        *(kernel, q, k, v, grad, lse, delta, dq_sum, dk, dv, Float32(1.0)),
        *[None] * 9,
        *(_fake_aux(masks), _fake_lists(), None, _stream()),
        options="--enable-tvm-ffi",
    )


def _stream() -> Any:
    return cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
