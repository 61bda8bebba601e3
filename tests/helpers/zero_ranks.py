"""What each rank of tests/train/parallel/test_zero.py runs: DeepSpeed on the CPU, without Lightning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from data.shards.sample import TextTokens
from radial.backends import BACKENDS
from tests.helpers.attention import step_attention
from tests.helpers.sequence_ranks import PATTERNS, WITH_TEXT, clips, group_of, tiny_adapter, world_size
from train.config.schema import ParallelConfig
from train.flow import flow_loss, noised
from train.lora.layers import load_parameters, lora_parameters
from train.memory.apply import set_memory_policy
from train.models.conditions import Conditions
from train.parallel.zero import (
    gather_optimizer_state,
    scatter_optimizer_state,
    spread_weights,
    whole_parameter,
    zero_config,
)
from train.storage.checkpoints import FolderCheckpointIO, load_state, load_weights

CELLS = (3, 12, 20)
SPREAD = {f"stage3_{key}": 0 for key in ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")}
LR, CLIP = 1e-2, 0.02  # below the gradients' norm, so that clipping counts


class Step(nn.Module):
    """What DeepSpeed wraps: the loss of this rank's share of the clips, as `LengthExtensionModule` computes it."""

    def __init__(self, size: int, samples: int, compiled: ParallelConfig | None = None) -> None:
        super().__init__()
        self.adapter, self.sequence = tiny_adapter(targets=WITH_TEXT), group_of(size)
        self.transformer = self.adapter.transformer
        parallel = compiled or ParallelConfig(activations="full")
        set_memory_policy(self.adapter, parallel, compiled=compiled is not None)
        self.transformer.train()
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.part, self.samples = slice(rank // size, None, world_size() // size), samples

    def forward(self) -> Tensor:
        x0, eps, sigma, text = (entry for entry in clips(self.samples, CELLS))
        sigma = sigma[self.part]
        x, target = noised(x0[self.part], eps[self.part], sigma)
        plan = step_attention(PATTERNS["released"], self.adapter.grid(x), block=16, sequence=self.sequence)
        self.adapter.set_attention(plan)
        words = {"text": TextTokens(text.tokens[self.part], text.mask[self.part])}
        return flow_loss(self.adapter.velocity(x, sigma, Conditions(words)), target, plan.shard, self.adapter.patch)


def grouped(transformer: Any, ratio: float) -> list[dict[str, Any]]:
    """What an optimizer takes: the LoRA in one group, or A and B in groups whose rates have a ratio other than 1."""
    named = lora_parameters(transformer)
    if ratio == 1:
        return [{"params": list(named.values()), "lr": LR}]
    return [
        {"params": [p for name, p in named.items() if f".lora_{part}." in name], "lr": rate}
        for part, rate in (("A", LR), ("B", ratio * LR))
    ]


def plain(steps: int, samples: int, folder: Path, start: Path | None = None, ratio: float = 1) -> list[float]:
    """One process, torch alone: the losses of ``steps`` steps; saves a checkpoint after each."""
    step = Step(1, samples)
    parameters = list(lora_parameters(step.transformer).values())
    optimizer = torch.optim.AdamW(grouped(step.transformer, ratio))
    if start is not None:
        load_parameters(lora_parameters(step.transformer), load_weights(start))
        optimizer.load_state_dict(load_state(start)["optimizer_states"][0])
    losses = []
    for index in range(steps):
        loss = step()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        save(folder / f"step-{index + 1}", index + 1, step.transformer, optimizer.state_dict())
    return losses


def zero(
    stage: int,
    size: int,
    steps: int,
    samples: int,
    folder: Path,
    start: Path | None = None,
    offload: bool = False,
    ratio: float = 1,
    compiled: ParallelConfig | None = None,
) -> list[float]:
    """The same with DeepSpeed; from the checkpoint ``start`` if there is one, then with other weights and rates before.

    ``compiled`` holds the memory policy of layers that are compiled; None leaves them eager and fully checkpointed.
    """
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    config = zero_config(
        stage,
        bf16=False,
        offload_optimizer=offload,
        offload_parameters=offload and stage == 3,
        compiled=compiled is not None,
    )
    config |= {"gradient_clipping": CLIP}
    if stage == 3:  # without this, all of a small model would stay where it was gathered
        config["zero_optimization"] |= SPREAD
    step = Step(size, samples, compiled)
    if start is not None:
        with torch.no_grad():
            for parameter in lora_parameters(step.transformer).values():
                parameter.add_(1)
    if stage == 3:
        spread_weights(step.transformer, torch.float32, "cpu", config)
    described = grouped(step.transformer, ratio)
    groups = [group["params"] for group in described]
    if start is not None:
        described = [{**group, "lr": 7 * LR} for group in described]
    engine, optimizer, _, _ = deepspeed.initialize(
        model=step,
        model_parameters=list(lora_parameters(step.transformer).values()),
        optimizer=torch.optim.AdamW(described, lr=LR),
        config=config,
    )
    if start is not None:
        load_parameters(lora_parameters(step.transformer), load_weights(start))
        scatter_optimizer_state(optimizer, groups, load_state(start)["optimizer_states"][0])
    gathered = [] if compiled is None else gathered_weights(step.adapter.layers())
    losses = []
    for _ in range(steps):
        loss = engine()
        if compiled is not None:  # no layer holds on to them until its backward
            assert gathered and all(weights.expired() for weights in gathered)
            gathered.clear()
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    state = gather_optimizer_state(optimizer, groups, keep=dist.get_rank() == 0)
    save(folder, steps, step.transformer, state)
    dist.barrier()
    return losses


def gathered_weights(layers: list[nn.Module]) -> list[StorageWeakRef]:
    """Grows by the memory of a layer's weights whenever the layer is about to run."""
    seen: list[StorageWeakRef] = []
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda layer, _: seen.extend(StorageWeakRef(weight.untyped_storage()) for weight in layer.parameters())
        )
    return seen


def zero3_compiled(parallel: ParallelConfig, folder: Path) -> dict[str, Any]:
    """Losses of three steps of compiled layers, and of how many graphs and attentions they consist."""
    kernel, attentions = type(BACKENDS["torch"]), []
    whole = kernel.forward
    kernel.forward = lambda *arguments: attentions.append(1) or whole(*arguments)  # type: ignore[method-assign]
    losses = zero(3, 1, 3, 2, folder, compiled=parallel)
    counters = torch._dynamo.utils.counters
    return {"losses": losses, "graphs": counters["stats"]["unique_graphs"], "attentions": len(attentions)}


def save(folder: Path, step: int, transformer: Any, optimizer_state: dict[str, Any]) -> None:
    weights = {name: whole_parameter(parameter).clone() for name, parameter in lora_parameters(transformer).items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        about = {"position": step, "global_step": step, "optimizer_states": [optimizer_state]}
        FolderCheckpointIO().save_checkpoint({"state_dict": weights, **about}, folder)
