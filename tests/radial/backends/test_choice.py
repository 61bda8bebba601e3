"""Which backend serves on which GPU: the table of radial/README.md."""

from pathlib import Path

import pytest
import torch

from radial import Released, VideoGrid, build_head_layouts, build_layout
from radial.backends import AttentionCall, choose_backend, flashinfer, flex_flash
from radial.backends.fa4 import backend as fa4
from tests.helpers.patterns import ByHead

README = Path(__file__).parents[3] / "radial/README.md"
GPUS = {
    "A100": (8, 0), "RTX 3090, A40": (8, 6), "RTX 4090, L40S": (8, 9), "H100, H200": (9, 0), "B200": (10, 0),
    "RTX 5090": (12, 0),
}  # fmt: skip


@pytest.mark.parametrize("gpu", GPUS)
def test_the_readme_says_what_is_taken(gpu, monkeypatch):
    """With every library there and self-checks that pass; bf16, head dim 128."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: GPUS[gpu])
    for module in (fa4, flashinfer, flex_flash):
        monkeypatch.setattr(module, "import_problem", lambda *_: None)
    monkeypatch.setattr(flex_flash, "why_unproven", lambda *_: None)
    grid = VideoGrid(65, 16, 16, 64)
    by_head = build_head_layouts(ByHead(), grid, 128, layers=2, heads=2)
    whole, half = build_layout(Released(), grid, 128), build_layout(Released(), grid, 64)

    def taken(layout, needs_grad):
        call = AttentionCall(torch.device("cuda"), torch.bfloat16, 128, needs_grad, False, layout)
        return f"`{choose_backend(call).name}`"

    cells = [taken(layout, grad) for layout in (whole, by_head, half) for grad in (True, False)]
    row = f"| {gpu} | {GPUS[gpu][0]}.{GPUS[gpu][1]} | {' | '.join(cells)} |"
    assert row in README.read_text(encoding="utf-8").splitlines(), row


@pytest.mark.parametrize("gpu", GPUS)
def test_a_plan_is_told_the_same_without_the_gpu(gpu, monkeypatch):
    """But for `flex_flash`, which no plan counts on: whether it is right is found out on the GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: pytest.fail("there is no GPU"))
    grid, cuda = VideoGrid(9, 16, 16, 64), torch.device("cuda")
    for block, cell in ((128, 2), (64, 6)):
        layout = build_layout(Released(), grid, block)
        call = AttentionCall(cuda, torch.bfloat16, 128, True, False, layout, planned_for=GPUS[gpu])
        (row,) = (row for row in README.read_text(encoding="utf-8").splitlines() if row.startswith(f"| {gpu} |"))
        assert f"`{choose_backend(call).name}`" == row.split(" | ")[cell].replace("flex_flash", "flex")
