"""One case of a benchmark: LoRA steps on random weights and data of the real shapes, in fresh processes.

Kernels are sorted by their names as a profiler sees them in one step; what is left of the step's time is waiting. A
case whose loss or gradients are not finite has no speed.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from train.attention.recipe import AttentionRecipe
from train.attention.sequence import SequenceGroup, check_heads
from train.callbacks.throughput import compile_seconds
from train.config.schema import RunConfig
from train.errors import UserError
from train.flow import flow_loss, noised
from train.lora.layers import inject_lora
from train.memory.apply import set_memory_policy
from train.memory.fp8 import use_fp8
from train.memory.fp8_storage import store_fp8
from train.memory.layer_policies import LayerPolicies
from train.models.loading import benchmark_adapter
from train.models.weights import settle
from train.planning import chosen_policies, resolve_precision
from train.planning.flops import SampleFlops, peak_rate
from train.planning.full_memory import memory_in_words
from train.planning.sizes import Sizes
from train.step.objective import frozen

_MOST_DENSE = 4  # layers of a dense case: 40 of Wan-14B at 4x take ten minutes a step
# in the names of kernels on a GPU, and of operators on a CPU
_KINDS = {
    "copies": ("memcpy",),
    "communication": ("nccl", "c10d::", "gloo:", "_c10d_functional"),
    # what radial.backends.fa4.hopper compiles is called kernel_cutlass_kernel_...
    "attention": ("kernel_cutlass", "flash", "fmha", "attention", "attn"),
    "linear": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "aten::mm", "aten::addmm", "aten::bmm", "mkldnn_linear"),
}


@dataclass(frozen=True)
class Result:
    """One case, of rank 0."""

    pattern: str
    sp: int
    layers: int
    tokens: int
    device: str
    first_step: float  # seconds, compilation included
    compile: float  # seconds of it, and of later steps, that torch.compile took
    step: float  # seconds, median
    layer: float  # seconds of a step for each layer
    parts: dict[str, float]  # seconds of a step by kind
    memory: float  # GiB, peak of the GPU
    tflops: float
    mfu: float | None
    chosen: LayerPolicies | None = None  # what parallel.activations=auto chose


def layers_of(config: RunConfig) -> int:
    """Layers of a run's model, whose dimensions are known."""
    sizes = Sizes.of(config, "bf16")
    assert sizes is not None
    return sizes.layers


def run_case(config: RunConfig, sp: int, layers: int | None, steps: int, limit: float | None = None) -> Result:
    """Measures ``steps`` steps of one clip on ``sp`` new processes.

    Args:
        limit: GiB that torch may allocate on each GPU; None: all.

    Raises:
        UserError: fewer GPUs than ``sp``, heads that it does not divide, numbers that are not finite, or memory that
            is full.
    """
    if config.attention.pattern == "dense":
        layers = min(layers_of(config) if layers is None else layers, _MOST_DENSE)
    if torch.cuda.is_available() and sp > torch.cuda.device_count():
        raise UserError(f"sp is {sp}, but there are {torch.cuda.device_count()} GPUs")
    context = multiprocessing.get_context("spawn")  # libraries start CUDA when they are imported
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(sp, mp_context=context) as pool:
        store = f"file://{folder}/store"
        tasks = [pool.submit(_rank, config, rank, sp, store, layers, steps, limit) for rank in range(sp)]
        with memory_in_words(
            f"It was pattern={config.attention.pattern} sp={sp}: parallel.ffn_chunk=, "
            "parallel.offload_activations=true, parallel.offload_weights=true, fewer layers= or frames= take less; "
            f"python -m launch plan conf={config.conf} says what fits"
        ):
            results = [task.result() for task in tasks]  # of all, so that no rank's failure is lost
    return results[0]


def _rank(
    config: RunConfig, rank: int, sp: int, store: str, layers: int | None, steps: int, limit: float | None
) -> Result:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler would announce each start and stop
    torch.set_num_threads(max(1, torch.get_num_threads() // sp))
    if cuda:
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(rank)
        if limit is not None:
            there = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 2**30 / there), device)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=store, rank=rank, world_size=sp)
    try:
        return _measure(config, device, sp, layers, steps)
    finally:
        dist.destroy_process_group()


def _measure(config: RunConfig, device: torch.device, sp: int, layers: int | None, steps: int) -> Result:
    dtype = torch.bfloat16 if resolve_precision(config.trainer.precision) == "bf16" else torch.float32
    torch.manual_seed(config.seed)
    streams, stored = config.parallel.offload_weights, config.model.storage is not None
    adapter = benchmark_adapter(config.model, layers, dtype, device, layers_on_cpu=streams or stored)
    layers, heads, _ = adapter.attention_shape
    check_heads(sp, heads)
    assert config.lora is not None
    lora = config.lora
    targets = lora.targets or adapter.targets(text=lora.text)
    inject_lora(adapter.transformer, lora.rank, lora.alpha, targets, config.seed, dora=lora.dora)
    for transformer in adapter.transformers:
        settle(transformer, dtype, device, on_cpu=adapter.layers() if streams or stored else ())
    if stored:
        store_fp8(adapter.layers(), device, torch.device("cpu") if streams else device)
    if config.trainer.fp8:
        use_fp8(adapter.layers(), device)
    on_all = replace(config.trainer, devices=sp)
    policies = chosen_policies(replace(config, trainer=on_all, parallel=replace(config.parallel, sequence=sp)), layers)
    set_memory_policy(adapter, config.parallel, compiled=config.trainer.compile, policies=policies)
    adapter.transformer.train()
    trained = [p for p in adapter.transformer.parameters() if p.requires_grad]
    for parameter in trained:  # B starts at zero: A would have no gradient
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    latent, noise = (torch.randn(1, adapter.latent_channels, *config.latent_size(), device=device) for _ in range(2))
    conditions = adapter.random_conditions(latent)
    if config.objective.first_frame > 0:  # the heavier of the two kinds of steps: each token has its own timestep
        conditions = replace(conditions, image={**conditions.image, "first_frame": latent[:, :, :1]})
    given = adapter.given_frames(conditions)
    sigma = torch.tensor([0.6], device=device)
    x, target = noised(latent, noise, sigma)
    attention = config.attention
    recipe = AttentionRecipe.of(config)
    recipe = recipe.dense() if attention.pattern == "dense" else recipe
    of_step = recipe.step(adapter.grid(x), dense=False, sequence=SequenceGroup.of(sp))
    adapter.set_attention(of_step)

    weight = config.objective.distilled_guidance

    def step() -> float:
        aim = target
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
            if weight is not None:  # the frozen model's pass costs the same for any prompt
                with frozen(adapter.transformer):
                    unguided = adapter.velocity(x, sigma, conditions)
                aim = unguided + weight * (target - unguided)
            loss = flow_loss(adapter.velocity(x, sigma, conditions), aim, of_step.shard, adapter.patch, given)
        loss.backward()
        for parameter in trained if sp > 1 else ():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        optimizer.zero_grad()
        if not torch.isfinite(loss + norm) or norm == 0:
            raise UserError(
                f"pattern {attention.pattern}: loss {loss:.3g}, gradient norm {norm:.3g}: not finite or zero, so no "
                "speed is reported"
            )
        return loss.item()

    first = _timed(step)
    seconds = statistics.median(_timed(step) for _ in range(steps))
    flops = SampleFlops.of(adapter, of_step).step / sp
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_rate(name)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return Result(
        pattern=attention.pattern,
        sp=sp,
        layers=layers,
        tokens=of_step.pattern_layout.grid.tokens,
        device=name,
        first_step=first,
        compile=compile_seconds(),
        step=seconds,
        layer=seconds / layers,
        parts=_parts(step, device, seconds),
        memory=memory,
        tflops=flops / seconds / 1e12,
        mfu=flops / seconds / peak if peak else None,
        chosen=policies,
    )


def _timed(step: Any) -> float:
    start = time.perf_counter()
    step()  # ends by reading the loss, that is, with all work done
    return time.perf_counter() - start


def _parts(step: Any, device: torch.device, seconds: float) -> dict[str, float]:
    """Seconds of one step by kind of kernel; ``waiting`` is what none but copies, which run beside, accounts for."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
    parts = dict.fromkeys([*_KINDS, "other"], 0.0)
    for event in profile.key_averages():
        spent = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        name = event.key.lower()
        kind = next((kind for kind, words in _KINDS.items() if any(word in name for word in words)), "other")
        parts[kind] += spent
    return {**parts, "waiting": max(0.0, seconds - sum(parts.values()) + parts["copies"])}
