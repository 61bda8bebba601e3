"""What each rank of the sequence-parallel tests runs (tests/train/attention/test_sequence.py)."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from data.shards.sample import Prompt, Sample, TextTokens
from radial import Dense, Released, VideoGrid, build_layout
from tests.helpers.attention import step_attention
from tests.helpers.patterns import ByHead, fitted
from tests.helpers.tiny import ARCHITECTURE
from train.attention.collectives import all_gather, all_to_all
from train.attention.sequence import SequenceGroup, SequenceShard, sharded_attention
from train.config.schema import ParallelConfig
from train.errors import UserError
from train.flow import SigmaSchedule, flow_loss, noised
from train.lora.layers import inject_lora
from train.measures.euler import generate
from train.measures.losses import clip_losses
from train.memory.apply import set_memory_policy
from train.memory.layer_policies import LayerPolicies, check_agreement
from train.models.conditions import Conditions
from train.models.families.wan import WanAdapter
from train.step.objective import Objective

FOUR_HEADS = {**ARCHITECTURE, "num_attention_heads": 4, "attention_head_dim": 16}
EIGHT_HEADS = {**ARCHITECTURE, "num_attention_heads": 8, "attention_head_dim": 16}
WITH_TEXT = r"blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)|condition_embedder\.text_embedder\.linear_\d"
"""LoRA on cross-attention and on the text's own layers too, where every rank sees all text tokens."""
ODD_GRID = VideoGrid(3, 3, 5)
PATTERNS = {
    "fitted": fitted(ODD_GRID, 16, layers=(0, 1, 2)),
    "dense": Dense(),
    "released": Released(),
    "by_head": ByHead(tiled=True),
}


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def group_of(size: int) -> SequenceGroup | None:
    return SequenceGroup.of(size) if size > 1 else None


def wan_gradients(
    pattern: str, cells: tuple[int, int, int], size: int, samples: int, checkpointing: bool, trained: str = "lora"
) -> dict[str, Any]:
    """Gradients, averaged over the world, and the mean loss, of ``samples`` clips split over the groups.

    ``trained``: ``lora``, ``text`` (LoRA on text layers too), ``all`` weights, or ``eight`` (heads, to share among 8).
    """
    sequence = group_of(size)
    groups = world_size() // size
    mine = (dist.get_rank() if dist.is_initialized() else 0) // size
    adapter = tiny_adapter(EIGHT_HEADS if trained == "eight" else FOUR_HEADS, WITH_TEXT if trained == "text" else None)
    if trained == "all":
        adapter.transformer.requires_grad_(True)
    if checkpointing:
        adapter.transformer.enable_gradient_checkpointing()
    adapter.transformer.train()
    x0, eps, sigma, text = clips(samples, cells)
    part = slice(mine, None, groups)
    x, target = noised(x0[part], eps[part], sigma[part])
    text = {"text": TextTokens(text.tokens[part], text.mask[part])}
    plan = step_attention(PATTERNS[pattern], adapter.grid(x), block=16, sequence=sequence)
    adapter.set_attention(plan)
    loss = flow_loss(adapter.velocity(x, sigma[part], Conditions(text)), target, plan.shard, adapter.patch)
    loss.backward()
    gradients = {n: average(p.grad) for n, p in adapter.transformer.named_parameters() if p.requires_grad}
    return {"loss": average(loss.detach()), "gradients": gradients}


def compiled_gradients(policy: str, size: int) -> dict[str, Any]:
    """LoRA gradients with each layer and its checkpoint compiled, those without, and what the compiler says and keeps.

    ``kept`` counts tensors of a hidden state's size: of the rank's tokens or, around attention, of its heads.
    """
    sequence = group_of(size)
    kept: set[int] = set()

    def gradients(compiled: bool) -> list[Tensor]:
        adapter = tiny_adapter()
        set_memory_policy(adapter, ParallelConfig(activations=policy), compiled=compiled)
        adapter.transformer.train()
        x0, eps, sigma, text = clips(1, (3, 12, 20))
        x, target = noised(x0, eps, sigma)
        plan = step_attention(Released(), adapter.grid(x), block=16, sequence=sequence)
        adapter.set_attention(plan)
        width = 64
        sizes = {plan.shard.length * width, plan.shard.tokens * width // size}

        def note(tensor: Tensor) -> Tensor:
            if tensor.numel() in sizes and compiled:
                kept.add(tensor.data_ptr())
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            velocity = adapter.velocity(x, sigma, Conditions({"text": text}))
        flow_loss(velocity, target, plan.shard, adapter.patch).backward()
        return [p.grad for p in adapter.transformer.parameters() if p.requires_grad]

    counters = torch._dynamo.utils.counters
    compiled = gradients(True)
    said = {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}
    return {"compiled": compiled, "eager": gradients(False), "kept": len(kept), **said}


def wan_validation(cells: tuple[int, int, int], size: int) -> list[float]:
    """The flow losses of two held-out clips."""
    sequence = group_of(size)
    adapter = tiny_adapter()
    x0, _, _, text = clips(2, cells)
    held_out = [
        Sample(str(row), x0[row], {"text": TextTokens(text.tokens[row], text.mask[row])}, {}, {}, {"caption": ""})
        for row in (0, 1)
    ]
    plan = lambda x, sigma: step_attention(Released(), adapter.grid(x), block=16, sequence=sequence)  # noqa: E731
    return clip_losses(adapter, held_out, plan, SigmaSchedule(3.0), Objective(0, Prompt({}, {})), label="clips")


def wan_sample(cells: tuple[int, int, int], size: int) -> Tensor:
    """A latent sampled in three Euler steps."""
    sequence = group_of(size)
    adapter = tiny_adapter()
    _, noise, _, text = clips(1, cells)
    batched = Conditions({"text": text})
    return generate(
        adapter,
        noise,
        batched,
        batched,
        lambda sigma: step_attention(Released(), adapter.grid(noise), block=16, sequence=sequence),
        steps=3,
        shift=SigmaSchedule().shift,
        guidance=1.0,
    )


def tiny_adapter(architecture: dict[str, Any] = FOUR_HEADS, targets: str | None = None) -> WanAdapter:
    torch.manual_seed(0)
    adapter = WanAdapter.from_config(architecture, text_tokens=32)
    inject_lora(adapter.transformer, 4, 8, targets or adapter.lora_targets, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return adapter


def clips(samples: int, cells: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, TextTokens]:
    torch.manual_seed(3)
    x0, eps = torch.randn(samples, 3, *cells), torch.randn(samples, 3, *cells)
    tokens = torch.randn(samples, 32, 64)
    return x0, eps, torch.linspace(0.2, 0.9, samples), TextTokens(tokens, torch.ones(samples, 32, dtype=torch.bool))


def average(x: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def joint_attention(size: int, tokens: tuple[int, int, int], text: int) -> dict[str, Tensor]:
    """Output and gradients of q, k, v with text tokens after the video, in float64, put together over the ranks."""
    sequence = group_of(size)
    grid = VideoGrid(*tokens, text_tokens=text)
    layout = build_layout(Released(), grid, 16)
    torch.manual_seed(5)
    inputs = [torch.randn(2, grid.tokens, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, grid.tokens, 4, 8, dtype=torch.float64)
    lengths = torch.tensor([text, max(text - 3, 1)]) if text else None
    if sequence is None:
        out = sharded_attention(*inputs, layout, None, text_lengths=lengths)
        (out * weight).sum().backward()
        return {"out": out, **{f"d{name}": x.grad for name, x in zip("qkv", inputs, strict=True)}}
    shard = SequenceShard(grid.video_tokens, sequence)

    def local(x: Tensor) -> Tensor:
        video, words = x.split([grid.video_tokens, text], dim=1)
        return torch.cat([shard.slice(video), words], dim=1)

    out = sharded_attention(*map(local, inputs), layout, shard, text_lengths=lengths)
    own_video, own_text = (out * local(weight)).split([shard.length, text], dim=1)
    # every rank computes the text's term, so that it counts 1 / S of the sum of the ranks' losses
    (own_video.sum() + own_text.sum() / size).backward()
    video, words = out.detach().split([shard.length, text], dim=1)
    whole = torch.cat([shard.gather(video), words], dim=1)
    for x in inputs:
        dist.all_reduce(x.grad)
    return {"out": whole, **{f"d{name}": x.grad for name, x in zip("qkv", inputs, strict=True)}}


def adjoints() -> dict[str, float]:
    """|<A x, y> - <x, A' y>| over the whole world for each collective, float64."""
    group = SequenceGroup.of(dist.get_world_size())
    assert group is not None
    shard = SequenceShard(7, group)
    local = {"all_to_all": (group.size, 3), "all_gather": (2, 3), "gather": (1, shard.length, 2)}
    local |= {"to_heads": (2, shard.length, 4, 3), "to_tokens": (2, 7, 4 // group.size, 3), "slice": (1, 7, 2)}
    moves = {
        "all_to_all": lambda x: all_to_all(x, group.group),
        "all_gather": lambda x: all_gather(x, 1, group.group),
        "gather": shard.gather,
        "to_heads": shard.to_heads,
        "to_tokens": shard.to_tokens,
        "slice": shard.slice,
    }
    torch.manual_seed(dist.get_rank())
    errors = {}
    for name, move in moves.items():
        x = torch.randn(local[name], dtype=torch.float64, requires_grad=True)
        out = move(x)
        y = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, x, y)
        products = torch.stack([(out * y).sum().detach(), (x * gradient).sum().detach()])
        dist.all_reduce(products)
        errors[name] = (products[0] - products[1]).abs().item()
    return errors


def agreement(names_by_rank: list[tuple[str, ...]]) -> str:
    """What `check_agreement` says, or nothing."""
    try:
        check_agreement(LayerPolicies(names_by_rank[dist.get_rank()]))
    except UserError as error:
        return str(error)
    return ""


def round_trips(tokens: int) -> dict[str, bool]:
    """Whether each move followed by its inverse gives back what went in, and heads hold what they should."""
    group = SequenceGroup.of(dist.get_world_size())
    assert group is not None
    shard = SequenceShard(tokens, group)
    whole = torch.randn(2, tokens, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own, heads = shard.slice(whole), 4 // group.size
    mine = whole[:, :, group.rank * heads : (group.rank + 1) * heads]
    return {
        "gather": torch.equal(shard.gather(own), whole),
        "to_heads": torch.equal(shard.to_heads(own), mine),
        "to_tokens": torch.equal(shard.to_tokens(mine), own),
    }
