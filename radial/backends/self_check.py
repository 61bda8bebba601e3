"""Backends that were never tried on a kind of GPU hold themselves against plain torch there before they are used.

Forward and gradients are compared on masks with uneven ends, with and without text of several lengths, in a process of
its own, since a kernel that reaches past its memory takes the process with it. What was found is kept in the user's
cache folder with the GPU's name, its driver and the versions of the packages: another of these is another check.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from radial.backends.base import AttentionCall, Backend
from radial.backends.torch_blocks import TorchBlocks
from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.layout import build_layout
from radial.patterns import Released
from radial.whole import written

LIMIT = 1e-2
"""The largest error of an output or a gradient, relative in norm; right kernels have 0.0025 in bf16."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_GRIDS = (VideoGrid(3, 9, 13), VideoGrid(5, 12, 20), VideoGrid(5, 12, 20, 77))  # 351, 1200 and 1277 tokens
_PATIENCE = 900  # seconds, most of them for compiling kernels


def compare(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int = 128) -> float:
    """The largest error of a backend's outputs and gradients against plain torch in float32, relative in norm.

    Raises:
        Exception: whatever the backend raises.
    """
    oracle, worst = TorchBlocks(), 0.0
    generator = torch.Generator().manual_seed(0)
    for grid in _GRIDS:
        layout = build_layout(Released(), grid, 128).to(device)
        lengths = torch.tensor([5, grid.text_tokens], device=device) if grid.text_tokens else None
        shape = (2, grid.tokens, 2, head_dim)
        q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
        if lengths is not None:  # what queries behind a prompt's end give is not looked at by anyone
            grad[0, grid.video_tokens + 5 :] = 0
        backend.prepare(AttentionCall(device, dtype, head_dim, True, lengths is not None, layout))
        results = []
        for which, own in ((oracle, torch.float32), (backend, dtype)):
            inputs = [x.to(own, copy=True).requires_grad_() for x in (q, k, v)]
            out = which(inputs[0], inputs[1], inputs[2], layout, text_lengths=lengths, scale=head_dim**-0.5)
            gradients = torch.autograd.grad(out, inputs, grad.to(own))
            results.append([(out.detach().double() * (grad != 0)), *(x.double() for x in gradients)])
        for exact, got in zip(*results, strict=True):
            error = ((got - exact).norm() / exact.norm()).item()
            worst = error if not error <= worst else worst  # a NaN too
    return worst


def place(device: torch.device) -> dict[str, str]:
    """What a result holds for: the GPU, its driver, and the packages that bring kernels."""
    driver = Path("/proc/driver/nvidia/version")
    versions = {"torch": str(torch.__version__)}
    for package in ("flash-attn-4", "triton", "nvidia-cutlass-dsl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "driver": driver.read_text(encoding="utf-8").splitlines()[0] if driver.is_file() else "none",
        **versions,
    }


def cache_file() -> Path:
    """Where results are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radial-lora" / "backends.json"


def known(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> float | None:
    """The error that a check of a backend has found here; None where there was none."""
    key = _key(name, device, dtype, head_dim)
    return next((entry["error"] for entry in _entries() if entry["of"] == key), None)


def check(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """`compare`, in this process, kept for `known`.

    Raises:
        RadialError: the backend raised something.
    """
    try:
        error = compare(backend, device, dtype, head_dim)
    except Exception as problem:
        reason = " ".join(str(problem).split())[:300]
        raise RadialError(f"backend {backend.name} does not run ({type(problem).__name__}: {reason})") from problem
    key = _key(backend.name, device, dtype, head_dim)
    entries = [entry for entry in _entries() if entry["of"] != key]
    _write([*entries, {"of": key, "error": error if error == error else None}])
    return error


@lru_cache(maxsize=64)
def why_unproven(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend that was never tried on this kind of GPU cannot be relied on here; None where its check passes.

    The first call on a machine runs the check in a process of its own, which takes about a minute.
    """
    again = f"python -m radial backends check=true backend={name} tries again"
    error = known(name, device, dtype, head_dim)
    if error is None:
        words = [f"backend={name}", f"dtype={str(dtype).removeprefix('torch.')}", f"head_dim={head_dim}"]
        command = [sys.executable, "-m", "radial", "backends", "check=true", *words]
        # the child sees this process's GPU as its first one
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        given = seen.split(",") if seen else [str(n) for n in range(torch.cuda.device_count())]
        own = {"CUDA_VISIBLE_DEVICES": given[device.index or 0]} if device.type == "cuda" and given else {}
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", timeout=_PATIENCE, env={**os.environ, **own}
            )
        except subprocess.TimeoutExpired:
            return f"it was never tried on this kind of GPU, and its check took more than {_PATIENCE} s: {again}"
        error = known(name, device, dtype, head_dim)
        if error is None:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return f"it was never tried on this kind of GPU, and its check did not end ({last}): {again}"
    if not error <= LIMIT:
        return f"its results on this GPU are wrong, {error:.1%} off plain torch's (limit {LIMIT:.0%}): {again}"
    return None


def _key(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    return {"backend": name, "dtype": str(dtype), "head_dim": head_dim, **place(device)}


def _entries() -> list[dict[str, Any]]:
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
        entries = [{"of": dict(entry["of"]), "error": entry["error"]} for entry in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # not there yet, or of another version: checks are run again
    return [{**entry, "error": float("nan") if entry["error"] is None else float(entry["error"])} for entry in entries]


def _write(entries: list[dict[str, Any]]) -> None:
    file = cache_file()
    plain = [{**entry, "error": None if entry["error"] != entry["error"] else entry["error"]} for entry in entries]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written(file) as fresh:
            fresh.write_text(json.dumps(plain, indent=1), encoding="utf-8")
    except OSError as error:
        raise RadialError(f"{file} cannot be written ({error}): set XDG_CACHE_HOME to a folder that can") from error
