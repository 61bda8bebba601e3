"""What a backend is: one way to compute attention over a `BlockLayout`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from radial.head_layouts import HeadLayout, HeadLayouts
from radial.layout import BlockLayout

Layout = BlockLayout | HeadLayout
"""What attention is computed over: one mask for all heads, or a layer's masks that differ by head."""


@dataclass(frozen=True)
class AttentionCall:
    """What a backend needs to know of a call to say whether it can serve it.

    Attributes:
        layout: of the call, or where masks differ by head of all layers that make the same call.
        planned_for: compute capability of a GPU that is not here, for a plan, which takes libraries as installed; None:
            the device's own GPU, with what is installed here.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    needs_grad: bool
    masks_text: bool
    layout: BlockLayout | HeadLayouts
    planned_for: tuple[int, int] | None = None

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the GPU."""
        return self.planned_for or torch.cuda.get_device_capability(self.device)


class Backend(Protocol):
    """One implementation of block-sparse attention. Implementations are stateless.

    Adding one: a file in this folder with a class of this shape, and its place in this package's `_FASTEST_FIRST`. One
    that brings kernels of its own derives from `radial.backends.op.KernelBackend`, which makes it a torch operator.
    """

    name: str

    def why_not(self, call: AttentionCall) -> str | None:
        """None when the backend can serve the call, else the reason in words that a user can act on."""
        ...

    def prepare(self, call: AttentionCall) -> None:
        """Builds what the call needs of the layout, outside of any graph. Cheap when it is there already."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        *,
        text_lengths: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Attention output.

        Args:
            q, k, v: (batch, tokens, heads, head_dim), any strides.
            layout: the block lists, on any device.
            text_lengths: (batch,) integer, valid text tokens of each sample; keys after them are masked.
            scale: factor of the scores before the softmax.

        Returns:
            (batch, tokens, heads, head_dim), dtype of q.
        """
        ...
