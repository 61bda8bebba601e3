"""The CUDA backends against float64, beside dense flash attention on the same inputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from radial import (
    BlockLayout,
    Dense,
    HeadLayouts,
    Paper,
    RadialError,
    Released,
    VideoGrid,
    attention_over,
    build_head_layouts,
    build_layout,
)
from radial.backends import BACKENDS, AttentionCall
from radial.sampled_errors import sampled_errors
from tests.helpers.oracles import masked_softmax
from tests.helpers.patterns import ByHead, fitted

CUDA = torch.device("cuda")
BACKEND_NAMES = ["fa4", "flex"]
HEAD_PATTERNS = [ByHead(), ByHead(tiled=True), fitted(VideoGrid(9, 13, 17), 128, heads=3, order="patches")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    """The compiler remembers how often it compiled anew, and gives up at some number."""
    torch._dynamo.reset()


def usable(name: str, layout: BlockLayout | HeadLayouts, masks_text: bool = False) -> None:
    call = AttentionCall(CUDA, torch.bfloat16, 128, True, masks_text, layout)
    reason = BACKENDS[name].why_not(call)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def random_layout(tokens: int, density: float, seed: int) -> BlockLayout:
    """A layout of independent random blocks, where a kernel that computes more or fewer blocks shows at once."""
    torch.manual_seed(seed)
    blocks = -(-tokens // 128)
    mask = torch.rand(blocks, blocks) < density
    mask |= torch.eye(blocks, dtype=torch.bool)
    mask[tokens // 128 :] = True
    mask[:, tokens // 128 :] = True

    def lists(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        return offsets.int(), mask.nonzero()[:, 1].int()

    return BlockLayout(Released(), VideoGrid(1, 1, tokens), 128, *lists(mask), *lists(mask.t()))


def draw(layout: BlockLayout, *, batch: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v as views of one fused projection, as models produce them, and the gradient of the output."""
    tokens = layout.grid.tokens
    q, k, v = torch.randn(batch, tokens, 3, heads, dim, device=CUDA, dtype=dtype).unbind(2)
    grad = torch.randn(batch, heads, tokens, dim, device=CUDA, dtype=dtype).transpose(1, 2)
    return q, k, v, grad


def run(attention, q, k, v, grad) -> list[torch.Tensor]:
    """Output and gradients; what the kernels allocate was filled with NaN before."""
    torch.full((max(64 << 20, 40 * q.numel()),), float("nan"), device=CUDA)
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def errors(got: list[torch.Tensor], reference: list[torch.Tensor]) -> list[float]:
    assert all(torch.isfinite(t).all() for t in got)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, reference, strict=True)]


def flash(q, k, v):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def check(name, layout, *, batch=1, heads=2, dim=128, dtype=torch.bfloat16, text_lengths=None):
    """At most 1.2 times the errors of dense flash attention, which are measured on the same inputs."""
    usable(name, layout, text_lengths is not None)
    tensors = draw(layout, batch=batch, heads=heads, dim=dim, dtype=dtype)
    exact = [t.double() for t in tensors]
    scale = dim**-0.5

    def oracle(of, lengths):
        return run(lambda q, k, v: masked_softmax(q, k, v, of, lengths, scale), *exact)

    dense = errors(run(flash, *tensors), oracle(build_layout(Dense(), layout.grid), None))
    ours = errors(
        run(lambda q, k, v: attention_over(q, k, v, layout, text_lengths=text_lengths, backend=name), *tensors),
        oracle(layout, text_lengths),
    )
    print(
        name, layout.grid, dim, dtype, *(f"{mine:.1e}/{theirs:.1e}" for mine, theirs in zip(ours, dense, strict=True))
    )
    for what, mine, theirs in zip(("out", "dq", "dk", "dv"), ours, dense, strict=True):
        assert mine <= 1.2 * theirs, f"{what}: {mine:.2e} against {theirs:.2e} of dense flash attention"


@pytest.mark.parametrize("tokens", [1024, 1000, 1681, 2063])
@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_random_blocks(name, tokens):
    check(name, random_layout(tokens, 0.4, tokens))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_dtypes_head_dims_and_batches(name, dtype, dim):
    check(name, build_layout(Released(), VideoGrid(9, 13, 17)), batch=2, heads=3, dim=dim, dtype=dtype)


@pytest.mark.parametrize("pattern", [Released(), Released(rule="hunyuan", decay=0.95), Paper(), Dense()])
@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_text_with_lengths_of_its_own(name, pattern):
    # 1,989 video tokens end within a block; lengths that end in every kind of place, none and all
    grid = VideoGrid(9, 13, 17, 300)
    lengths = torch.tensor([0, 59, 60, 187, 300], device=CUDA)
    check(name, build_layout(pattern, grid), batch=5, text_lengths=lengths)


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_text_after_whole_blocks(name):
    grid = VideoGrid(8, 16, 16, 256)
    check(name, build_layout(Released(), grid), batch=3, text_lengths=torch.tensor([0, 128, 200], device=CUDA))
    check(name, build_layout(Released(), grid), batch=2)


@pytest.mark.parametrize("lengths", [None, [0, 59, 300]])
@pytest.mark.parametrize("pattern", HEAD_PATTERNS)
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_masks_that_differ_by_head(name, groups, pattern, lengths, monkeypatch):
    """Each head's output and gradients, in two layers, with the backward in one group of heads and in several."""
    layouts = build_head_layouts(pattern, VideoGrid(9, 13, 17, 300), 128, layers=2, heads=3)
    usable(name, layouts, lengths is not None)
    if groups:
        if name != "fa4":
            pytest.skip("its backward has no groups of heads")
        monkeypatch.setattr("radial.backends.fa4.hopper.DQ_SUM_BYTES", 1)
    text = None if lengths is None else torch.tensor(lengths, device=CUDA)
    whole = build_layout(Dense(), layouts.grid)
    tensors = draw(whole, batch=3, heads=3, dim=128, dtype=torch.bfloat16)
    exact = [t.double() for t in tensors]
    dense = errors(run(flash, *tensors), run(lambda q, k, v: masked_softmax(q, k, v, whole, None, 128**-0.5), *exact))
    for index in range(2):
        layout = layouts.layer(index)

        def ours(q, k, v, backend, layout=layout):
            return attention_over(q, k, v, layout, text_lengths=text, backend=backend)

        # the torch backend is held to a softmax for each head in tests/radial
        expected = run(lambda q, k, v, ours=ours: ours(q, k, v, "torch"), *exact)
        found = errors(run(lambda q, k, v, ours=ours: ours(q, k, v, name), *tensors), expected)
        for what, mine, theirs in zip(("out", "dq", "dk", "dv"), found, dense, strict=True):
            assert mine <= 1.2 * theirs, f"layer {index}, {what}: {mine:.2e} against {theirs:.2e}"


@pytest.mark.parametrize(("dim", "dtype"), [(128, torch.bfloat16), (64, torch.float16)])
def test_flashinfer(dim, dtype):
    """Forward only: its output as exact as dense flash attention's; a call that needs gradients is refused."""
    for layout in (
        random_layout(2064, 0.4, 0),
        random_layout(2063, 0.4, 1),
        build_layout(Paper(), VideoGrid(9, 13, 17)),
    ):
        q, k, v, _ = draw(layout, batch=2, heads=3, dim=dim, dtype=dtype)
        with pytest.raises(RadialError, match="forward only"):
            attention_over(q.requires_grad_(), k, v, layout, backend="flashinfer")
        q = q.detach()
        exact = [t.double() for t in (q, k, v)]
        dense = build_layout(Dense(), layout.grid)
        torch.full((64 << 20,), float("nan"), device=CUDA)
        ours = errors(
            [attention_over(q, k, v, layout, backend="flashinfer")], [masked_softmax(*exact, layout, None, dim**-0.5)]
        )
        theirs = errors([flash(q, k, v)], [masked_softmax(*exact, dense, None, dim**-0.5)])
        assert ours[0] <= 1.2 * theirs[0]


@pytest.mark.parametrize("dense", [False, True])
def test_groups_of_heads_and_gradients_in_place(monkeypatch, dense):
    """The backward in groups of heads, and writing over q, k and v: both are bit for bit the plain one but for dq.

    dq is summed in an order that changes from run to run.
    """
    grid = VideoGrid(9, 13, 17)
    layout = build_layout(Dense() if dense else Released(), grid).to(CUDA)
    usable("fa4", layout)
    from radial.backends.fa4 import hopper

    q, k, v, grad = draw(layout, batch=2, heads=5, dim=128, dtype=torch.bfloat16)
    out, lse = torch.ops.radial.attention(q, k, v, None, 128**-0.5, layout.handle, "fa4")
    rest = (out, lse, None, 128**-0.5, layout.handle, "fa4")
    plain = torch.ops.radial.attention_backward(grad, q, k, v, *rest)
    monkeypatch.setattr(hopper, "DQ_SUM_BYTES", 2 * 4 * 2 * 128 * grid.tokens)
    for own in ([t.clone() for t in (q, k, v)], [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]):
        torch.ops.radial.attention_backward_into(grad, *own, *rest)
        torch.testing.assert_close(own[0], plain[0], rtol=1.6e-2, atol=1e-3)
        assert torch.equal(own[1], plain[1]) and torch.equal(own[2], plain[2])


def test_dense_layouts():
    check("fa4", build_layout(Dense(), VideoGrid(5, 13, 17)), batch=2)
    check("sdpa", build_layout(Dense(), VideoGrid(5, 13, 17)), batch=2)


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_a_long_clip(name):
    """Wan at 4x, 291,600 tokens: output and gradients of sampled tokens, the last ones among them."""
    layout = build_layout(Released(), VideoGrid(81, 45, 80)).to(CUDA)
    usable(name, layout)
    n = layout.grid.tokens
    inputs = draw(layout, batch=1, heads=1, dim=128, dtype=torch.bfloat16)
    results = run(lambda *t: attention_over(*t, layout, backend=name), *inputs)
    tokens = torch.cat([torch.randint(n, (60,)), torch.tensor([0, 127, n - 17, n - 1])]).to(CUDA)
    found = sampled_errors(layout, [t[0, :, 0] for t in inputs], [t[0, :, 0] for t in results], tokens)
    assert max(found) < 3e-3


class Block(nn.Module):
    """What surrounds attention in a transformer block."""

    def __init__(self, layout: BlockLayout, name: str) -> None:
        super().__init__()
        self.layout, self.name = layout, name
        self.norm, self.project = nn.LayerNorm(256), nn.Linear(256, 3 * 256)
        self.text_lengths: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(self.norm(x)).unflatten(-1, (3, 2, 128)).unbind(2)
        out = attention_over(q, k, v, self.layout, text_lengths=self.text_lengths, backend=self.name)
        return x + out.flatten(2)


@pytest.mark.parametrize("masks_text", [False, True])
@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_a_compiled_block_has_no_graph_break(name, masks_text):
    layout = build_layout(Released(), VideoGrid(9, 13, 17, 100))
    usable(name, layout, masks_text)
    block = Block(layout, name).to(CUDA, torch.bfloat16)
    x = torch.randn(2, layout.grid.tokens, 256, device=CUDA, dtype=torch.bfloat16)
    compiled = torch.compile(block, fullgraph=True)
    for lengths in ([30, 100], [100, 1]) if masks_text else (None,):
        block.text_lengths = None if lengths is None else torch.tensor(lengths, device=CUDA)
        results = []
        for forward in (compiled, block):
            block.zero_grad()
            out = forward(x)
            out.square().mean().backward()
            results.append([out.detach(), *(p.grad.clone() for p in block.parameters())])
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("masks_text", [False, True])
@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_later_calls_do_not_wait_for_the_gpu(name, masks_text):
    layout = build_layout(Released(), VideoGrid(9, 13, 17, 100))
    usable(name, layout, masks_text)
    lengths = torch.tensor([30], device=CUDA) if masks_text else None
    q, k, v, grad = draw(layout, batch=1, heads=2, dim=128, dtype=torch.bfloat16)
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]

    def step():
        out = attention_over(*inputs, layout, text_lengths=lengths, backend=name)
        torch.autograd.grad(out, inputs, grad)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fa4_allocates_its_outputs_and_its_workspace_only():
    layout = build_layout(Released(), VideoGrid(41, 45, 80))
    usable("fa4", layout)
    n, heads, dim = layout.grid.tokens, 2, 128
    q, k, v, grad = (torch.randn(1, n, heads, dim, device=CUDA, dtype=torch.bfloat16) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    tensor, rows = 2 * n * heads * dim, 4 * heads * n
    rounding = 2**20  # of each: torch splits no block of its cache for less, and counts all of it as allocated

    def peak(work) -> tuple[int, object]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return torch.cuda.max_memory_allocated() - before, result

    torch.autograd.grad(attention_over(*inputs, layout, backend="fa4"), inputs, grad)
    forward, out = peak(lambda: attention_over(*inputs, layout, backend="fa4"))
    backward, _ = peak(lambda: torch.autograd.grad(out, inputs, grad))
    # out and log-sum-exp; three gradients, dq's float32 sum (twice as large), and two numbers a row
    assert forward <= tensor + rows + 2 * rounding
    assert backward <= 3 * tensor + 2 * tensor + 2 * rows + 6 * rounding


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_flex_reads_blocks_of_64(dtype, dim):
    """Forward only: Hopper has no backward of them."""
    layout = build_layout(Released(), VideoGrid(9, 13, 17, 300), 64)
    q, k, v, _ = draw(layout, batch=2, heads=3, dim=dim, dtype=dtype)
    lengths = torch.tensor([59, 300], device=CUDA)
    with torch.no_grad():
        got = attention_over(q, k, v, layout, text_lengths=lengths, backend="flex")
    exact = masked_softmax(q.double(), k.double(), v.double(), layout, lengths, dim**-0.5)
    (error,) = errors([got], [exact])
    assert error <= (3e-3 if dtype == torch.bfloat16 else 1e-5)


def test_flex_in_float32():
    """Forward and backward in tiles of our own choice."""
    layout = build_layout(Released(), VideoGrid(9, 13, 17))
    tensors = draw(layout, batch=1, heads=2, dim=128, dtype=torch.float32)
    exact = run(lambda q, k, v: masked_softmax(q, k, v, layout, None, 128**-0.5), *(t.double() for t in tensors))
    got = run(lambda q, k, v: attention_over(q, k, v, layout, backend="flex"), *tensors)
    assert max(errors(got, exact)) <= 1e-5


def test_a_call_that_cannot_be_served_says_why():
    layout = build_layout(Released(), VideoGrid(4, 16, 16), 64)
    q = torch.randn(1, layout.grid.tokens, 2, 128, device=CUDA, dtype=torch.bfloat16)
    with pytest.raises(RadialError, match="fa4 cannot serve this call"):
        attention_over(q, q, q, layout, backend="fa4")
    with pytest.raises(RadialError, match=r"float32|Hopper"):
        attention_over(*[q.float()] * 3, build_layout(Released(), VideoGrid(4, 16, 16)), backend="fa4")
