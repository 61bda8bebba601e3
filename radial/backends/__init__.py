"""The backends, fastest first, and the choice among them."""

from __future__ import annotations

from radial.backends.base import AttentionCall, Backend
from radial.backends.fa4.backend import Fa4
from radial.backends.flashinfer import FlashInfer
from radial.backends.flex import Flex
from radial.backends.flex_flash import FlexFlash
from radial.backends.torch_blocks import TorchBlocks
from radial.backends.torch_dense import Sdpa
from radial.errors import RadialError

__all__ = ["BACKENDS", "AttentionCall", "Backend", "choose_backend"]

_FASTEST_FIRST: tuple[Backend, ...] = (Fa4(), FlexFlash(), Sdpa(), FlashInfer(), Flex(), TorchBlocks())
_SLOW_TO_START = {"flashinfer": 16_384}
"""Backends whose kernels take a minute or two to compile at their first use, and the fewest tokens that repay it."""
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _FASTEST_FIRST}


def choose_backend(call: AttentionCall, name: str | None = None) -> Backend:
    """The named backend, or the fastest that can serve the call, but for one whose start few tokens do not repay.

    Raises:
        RadialError: an unknown name, or a backend that cannot serve the call, with its reason. A request is never
            passed on to another backend.
    """
    if name is not None:
        if name not in BACKENDS:
            raise RadialError(f"attention backend is {name!r}, expected one of {', '.join(BACKENDS)}")
        reason = BACKENDS[name].why_not(call)
        if reason is not None:
            raise RadialError(f"attention backend {name} cannot serve this call: {reason}")
        return BACKENDS[name]
    reasons = []
    for backend in BACKENDS.values():
        reason = backend.why_not(call)
        if reason is None and call.layout.grid.tokens < _SLOW_TO_START.get(backend.name, 0):
            reason = "its kernels take longer to compile than so few tokens repay"
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise RadialError("no attention backend can serve this call: " + "; ".join(reasons))
