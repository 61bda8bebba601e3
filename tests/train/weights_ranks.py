"""What the process of tests/train/test_train_weights.py runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from train.compose import compose_run, finish
from train.models import load_adapter


def private_memory(folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """Bytes of the model, and by how much loading and reading all of it makes this process's own memory grow."""
    config = finish(compose_run({"model.path": str(folder)})).model
    before = _anonymous()
    adapter = load_adapter(config, dtype, seed=0)
    total = sum(p.abs().sum().item() for p in adapter.transformer.parameters())  # reads every page
    size = sum(p.numel() * p.element_size() for p in adapter.transformer.parameters())
    return {"grown": _anonymous() - before, "size": size, "sum": total}


def _anonymous() -> int:
    """Memory that no other process can share, unlike a file's pages."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024
