"""FlexAttention with the kernels of flash-attn-4 instead of Triton's, on Blackwell's data centre GPUs.

torch marks it as experimental, and this project has tried it on no such GPU: it is used only where
`radial.backends.self_check` has found its results to be right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radial.backends.base import AttentionCall, Layout
from radial.backends.flex import Flex
from radial.backends.imports import import_problem
from radial.backends.self_check import why_unproven
from radial.head_layouts import HeadLayouts


class FlexFlash(Flex):
    """Compute capability 10; bf16 and fp16, head dims 64 and 128, blocks of 128, one mask for all heads."""

    name = "flex_flash"

    def options(self, layout: Layout, q: Tensor) -> dict[str, Any]:
        """Takes flash-attn-4's kernels."""
        return {"BACKEND": "FLASH"}

    def why_not(self, call: AttentionCall) -> str | None:
        reason = super().why_not(call)
        if reason is not None:
            return reason
        capability = call.capability
        if capability[0] != 10:
            return f"it is for compute capability 10 (B200, B300), this GPU has {capability[0]}.{capability[1]}"
        if call.dtype not in (torch.bfloat16, torch.float16) or call.head_dim not in (64, 128):
            return f"q, k and v are {call.dtype} with head_dim {call.head_dim}, it takes 16 bits, and 64 or 128"
        if call.layout.block != 128 or isinstance(call.layout, HeadLayouts):
            return "it takes one mask for all heads, in blocks of 128 tokens"
        if call.planned_for:
            return "no plan counts on it: its self-check on the GPU itself decides"
        missing = import_problem("flash-attn-4", "flash_attn.cute")
        return missing or why_unproven(self.name, call.device, call.dtype, call.head_dim)
