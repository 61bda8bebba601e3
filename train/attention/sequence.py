"""Ulysses sequence parallelism: a group of ranks shares the tokens of each sample (arXiv 2309.14509).

Everywhere but in self-attention a rank holds its own stretch of the video tokens; around self-attention an all-to-all
turns stretches of tokens with all heads into all tokens of some heads, so that the attention mask never notices; where
masks differ by head, a rank has those of its own heads:

    n tokens on S ranks: L = ceil(n / S) each, zeros after the last; head group r is heads r H/S ... (r + 1) H/S - 1

    (batch, L, H, D)  --to_heads-->  (batch, n, H / S, D)  --attention-->  --to_tokens-->  (batch, L, H, D)

Padding exists only in the sequence-sharded state; it is cut before attention. Text tokens of joint-attention families
stay whole on every rank, beside its stretch of the video.

The group lies inside the data-parallel world: ranks r S ... (r + 1) S - 1 get the same sample, noise level and noise,
and gradients are averaged over the whole world. That gives the single process's gradients if, per sample, a rank's loss
is (S / valid tokens of the sample) x the sum over its own tokens, and each collective's backward is its adjoint
(`train.attention.collectives`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from radial import BlockLayout, HeadLayout, attention_over
from train.attention.collectives import all_gather, all_to_all
from train.errors import UserError


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share each sample's tokens, with a process group of their own."""

    group: dist.ProcessGroup
    size: int
    rank: int  # in the group

    @classmethod
    def of(cls, size: int) -> SequenceGroup | None:
        """This rank's group of ``size`` neighbouring ranks; None for size 1. Every rank of the world must call it."""
        if size == 1:
            return None
        group, _ = dist.new_subgroups(size)
        return cls(group, size, dist.get_rank(group))


def check_heads(sequence: int, heads: int) -> None:
    """Sequence parallelism gives each rank some of the heads.

    Raises:
        UserError: the group size does not divide them; with the sizes that do.
    """
    if heads % sequence:
        sizes = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise UserError(f"parallel.sequence is {sequence}, expected a divisor of the model's {heads} heads: {sizes}")


@dataclass(frozen=True)
class SequenceShard:
    """How a sample's video tokens are split over a group, and the moves between the two states.

    Attributes:
        tokens: video tokens of the whole sample.
        group: who shares them.
        order: (at least ``tokens``,) int64, which token of the video lies at each place; None: each its own.
    """

    tokens: int
    group: SequenceGroup
    order: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens that each rank holds, padding included."""
        return -(-self.tokens // self.group.size)

    @property
    def start(self) -> int:
        """This rank's first token."""
        return min(self.group.rank * self.length, self.tokens)

    @property
    def stop(self) -> int:
        """One after this rank's last token that is no padding."""
        return min(self.start + self.length, self.tokens)

    def slice(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's stretch of a tensor that every rank holds whole, padded by zeros to `length` along ``dim``."""
        own = x.narrow(dim, self.start, self.stop - self.start)
        return _pad(own, self.length, dim)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The inverse of `slice`: the whole tensor on every rank, without padding."""
        return _cut(all_gather(x, dim, self.group.group), self.tokens, dim)

    def to_heads(self, x: Tensor) -> Tensor:
        """(batch, length, heads, head_dim), own tokens -> (batch, tokens, heads / size, head_dim), own heads."""
        batch, length, heads, head_dim = x.shape
        parts = x.view(batch, length, self.group.size, heads // self.group.size, head_dim).permute(2, 0, 1, 3, 4)
        gathered = all_to_all(parts, self.group.group).transpose(0, 1)
        return _cut(gathered.reshape(batch, self.group.size * length, -1, head_dim), self.tokens, 1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The inverse of `to_heads`."""
        batch, _, heads, head_dim = x.shape
        padded = _pad(x, self.group.size * self.length, 1)
        parts = padded.view(batch, self.group.size, self.length, heads, head_dim).transpose(0, 1)
        return all_to_all(parts, self.group.group).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def own_cells(self, cells: Sequence[int], patch: Sequence[int], device: torch.device) -> Tensor:
        """Which cells of a latent of ``cells`` = (F, H, W) this rank's tokens stand for: bool, (F, H, W)."""
        own = torch.zeros(self.tokens, dtype=torch.bool, device=device)
        places = slice(self.start, self.stop)
        own[places if self.order is None else self.order[places].to(device)] = True
        own = own.view([size // step for size, step in zip(cells, patch, strict=True)])
        for dim, step in enumerate(patch):
            own = own.repeat_interleave(step, dim)
        return own


def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout | HeadLayout,
    shard: SequenceShard | None,
    *,
    text_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`radial.attention_over` for a rank that holds its stretch of the tokens; without a shard it is just that.

    Args:
        q, k, v: (batch, shard.length + text tokens, heads, head_dim): the rank's video tokens, then all text tokens.
        layout, text_lengths, backend: as for `radial.attention_over`, of the whole sequence, whose tokens lie in the
            order of the layout's blocks; masks that differ by head are those of the rank's own heads.

    Returns:
        The output for the same tokens, of the same shape.
    """
    if shard is None:
        return attention_over(q, k, v, layout, text_lengths=text_lengths, backend=backend, in_order=True)
    text, heads = layout.grid.text_tokens, q.shape[2] // shard.group.size

    def to_heads(x: Tensor) -> Tensor:
        video = shard.to_heads(_cut(x, shard.length, 1))
        words = x[:, shard.length :].narrow(2, shard.group.rank * heads, heads)
        return torch.cat([video, words], dim=1) if text else video

    out = attention_over(
        to_heads(q), to_heads(k), to_heads(v), layout, text_lengths=text_lengths, backend=backend, in_order=True
    )
    video, words = shard.to_tokens(_cut(out, shard.tokens, 1)), out[:, shard.tokens :]
    return torch.cat([video, all_gather(words, 2, shard.group.group)], dim=1) if text else video


def _cut(x: Tensor, length: int, dim: int) -> Tensor:
    """The first ``length`` along ``dim``; where that is all there is, without a slice, whose gradient is a copy."""
    return x if x.shape[dim] == length else x.narrow(dim, 0, length)


def _pad(x: Tensor, length: int, dim: int) -> Tensor:
    missing = length - x.shape[dim]
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing]) if missing else x
