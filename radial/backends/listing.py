"""``python -m radial backends``: which backends can run here and why the others cannot, and whether they are right."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from radial.backends import BACKENDS, AttentionCall
from radial.backends.flex_flash import FlexFlash
from radial.backends.self_check import DTYPES, LIMIT, check
from radial.cli.settings import at_least, setting
from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.layout import build_layout
from radial.patterns import Dense, Released


@dataclass
class BackendsOptions:
    """Whether they are tried, and which."""

    check: bool = setting(
        "compute with each and compare with plain torch: forward, gradients, uneven ends, text", False
    )
    backend: str | None = setting("check this one alone; null: all that can run here", None)
    dtype: str | None = setting("of the check; null: bfloat16 on a GPU, else float32", None, tuple(DTYPES))
    head_dim: int = setting("of the check", 128, must=at_least(16))


def show_backends(arguments: BackendsOptions) -> None:
    """Prints a line for each backend, device and kind of layout; or checks them."""
    if arguments.check:
        _check_backends(arguments)
        return
    for name in ("backend", "dtype"):
        if getattr(arguments, name) is not None:
            raise RadialError(f"{name} is of check=true: give that too, or leave {name} out")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    sparse = build_layout(Released(), VideoGrid(8, 16, 16))
    dense = build_layout(Dense(), VideoGrid(8, 16, 16))
    print(f"{'backend':<12} {'device':<6} {'layout':<8} usable")
    for name, backend in BACKENDS.items():
        for device in devices:
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            for kind, layout in (("sparse", sparse), ("dense", dense)):
                trains, infers = (
                    backend.why_not(AttentionCall(torch.device(device), dtype, 128, grad, False, layout))
                    for grad in (True, False)
                )
                usable = "yes" if trains is None else f"no: {infers}" if infers else "without gradients"
                print(f"{name:<12} {device:<6} {kind:<8} {usable}")


def _check_backends(arguments: BackendsOptions) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    name = arguments.backend
    if name is not None and name not in BACKENDS:
        raise RadialError(f"backend is {name!r}, expected one of {', '.join(BACKENDS)}")
    layout = build_layout(Released(), VideoGrid(8, 16, 16))
    call = AttentionCall(device, dtype, arguments.head_dim, True, True, layout)
    wrong = []
    for backend in BACKENDS.values() if name is None else [BACKENDS[name]]:
        # flex_flash asks for this very check where it is not known yet
        reason = None if name == FlexFlash.name else backend.why_not(call)
        if reason is not None and name is not None:
            raise RadialError(f"backend {name} cannot be checked here: {reason}")
        if reason is not None:
            print(f"{backend.name:<12} not checked: {reason}")
            continue
        error = check(backend, device, dtype, arguments.head_dim)
        right = error <= LIMIT
        print(f"{backend.name:<12} {'right' if right else 'WRONG'}: {error:.2e} off plain torch, limit {LIMIT:g}")
        wrong += [] if right else [backend.name]
    if wrong:
        raise RadialError(f"wrong results of {', '.join(wrong)}: take another one, attention.backend=")
