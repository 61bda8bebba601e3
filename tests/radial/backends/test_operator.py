"""The registered operator: under the compiler, under checkpointing, and by torch's own checks of operators."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from radial import BlockLayout, Released, VideoGrid, attention_over, build_layout
from radial.backends.torch_blocks import TorchBlocks

GRID = VideoGrid(3, 4, 25, 7)


class SelfAttention(nn.Module):
    """Attention with its projections, as a transformer block calls it."""

    def __init__(self, layout: BlockLayout) -> None:
        super().__init__()
        self.layout = layout
        self.project = nn.Linear(32, 96)
        self.text_lengths: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 16)).unbind(2)
        return attention_over(q, k, v, self.layout, text_lengths=self.text_lengths, backend="torch").flatten(2) + x


@pytest.fixture
def module() -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(build_layout(Released(), GRID, 64))


def gradients(forward, module: SelfAttention, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    out = forward(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("masks_text", [False, True])
def test_a_compiled_block_is_one_graph_with_the_same_gradients(module, masks_text):
    module.text_lengths = torch.tensor([3, 7]) if masks_text else None
    x = torch.randn(2, GRID.tokens, 32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(gradients(compiled, module, x), gradients(module, module, x), strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_compiled_block_follows_a_change_of_layout(module):
    x = torch.randn(1, GRID.tokens, 32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    module.layout = build_layout(Released(decay=0.1, rule="hunyuan"), GRID, 16)
    after = compiled(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, module(x))


@pytest.mark.parametrize("keeps_attention", [False, True])
def test_checkpointing_gives_the_same_gradients(module, keeps_attention, monkeypatch):
    calls: list[None] = []
    forward_of = TorchBlocks.forward
    monkeypatch.setattr(TorchBlocks, "forward", lambda *a, **k: calls.append(None) or forward_of(*a, **k))

    def policy(ctx, op, *args, **kwargs):
        if op == torch.ops.radial.attention.default:
            return CheckpointPolicy.MUST_SAVE if keeps_attention else CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def forward(x):
        return checkpoint(
            module, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )

    x = torch.randn(1, GRID.tokens, 32)
    checkpointed = gradients(forward, module, x)
    assert len(calls) == (1 if keeps_attention else 2)  # what is kept is not computed again
    for ours, plain in zip(checkpointed, gradients(module, module, x), strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_compiled_backward_overwrites_what_nothing_else_needs(module):
    """Without copies where q, k and v are the block's own; with correct gradients where something else reads them."""

    def forward(x):
        q, k, v = (module.project(x) * 0.5).unflatten(-1, (3, 2, 16)).unbind(2)
        q, k, v = q.exp(), k.exp(), v.exp()  # exp's own backward reads its result
        return attention_over(q, k, v, module.layout, backend="torch").flatten(2) + x

    x = torch.randn(1, GRID.tokens, 32)
    for plain in (module, forward):
        compiled = torch.compile(plain, fullgraph=True)
        for ours, theirs in zip(gradients(compiled, module, x), gradients(plain, module, x), strict=True):
            torch.testing.assert_close(ours, theirs)
    with torch._inductor.utils.fresh_cache():
        _, code = torch._inductor.utils.run_fw_bw_and_get_code(lambda: torch.compile(module, fullgraph=True)(x))
    assert "radial.attention_backward_into" in code[-1]
    assert "copy" not in code[-1].partition("def call")[2].partition("attention_backward_into")[0]


def test_torch_accepts_the_operator():
    layout = build_layout(Released(), GRID, 64)
    q, k, v = (torch.randn(1, GRID.tokens, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    arguments = (q, k, v, torch.tensor([5]), 0.25, layout.handle, "torch")
    torch.library.opcheck(torch.ops.radial.attention.default, arguments)
