"""Dense attention through torch's scaled_dot_product_attention: for layouts that skip nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from radial.backends.base import AttentionCall, Layout


class Sdpa:
    """Flash, cuDNN, memory-efficient or CPU kernels, whichever torch picks; differentiable."""

    name = "sdpa"

    def why_not(self, call: AttentionCall) -> str | None:
        if call.layout.by_head:
            return f"it has no masks, and the {call.layout.pattern.name} pattern has one for each head"
        if not call.layout.is_dense:
            return f"it computes all blocks, and the {call.layout.pattern.name} pattern skips some"
        return None

    def prepare(self, call: AttentionCall) -> None:
        """Nothing to do."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, text_lengths: Tensor | None, scale: float
    ) -> Tensor:
        mask = None
        if text_lengths is not None:
            valid = layout.grid.video_tokens + text_lengths
            mask = (torch.arange(layout.grid.tokens, device=q.device) < valid[:, None])[:, None, None]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
        )
        return out.transpose(1, 2).to(q.dtype)  # which autocast may have changed
