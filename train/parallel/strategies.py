"""How Lightning spreads a run over processes: DDP, or DeepSpeed ZeRO with the project's own checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.config.schema import ParallelConfig
from train.parallel.zero import gather_optimizer_state, scatter_optimizer_state, spread_weights, zero_config


def strategy_arguments(
    parallel: ParallelConfig,
    devices: int,
    precision: str,
    frozen: torch.dtype,
    *,
    idle: bool = False,
    compiled: bool = False,
) -> dict[str, Any]:
    """The strategy and the precision of ``lightning.Trainer``, as its keyword arguments.

    Args:
        precision: ``bf16`` or ``fp32``.
        frozen: dtype of the frozen weights.
        idle: whether steps may leave some of what is trained alone, the same on all ranks (of two experts, one).
        compiled: whether layers are.
    """
    if parallel.strategy != "ddp":
        config = zero_config(
            int(parallel.strategy.removeprefix("zero")),
            bf16=precision == "bf16",
            offload_optimizer=parallel.offload_optimizer,
            offload_parameters=parallel.offload_parameters,
            compiled=compiled,
        )
        return {"strategy": ZeroStrategy(config, frozen, ZeroPrecision(precision))}
    return {
        "strategy": ExactDDP(find_unused_parameters=idle) if devices > 1 else "auto",
        "precision": "bf16-mixed" if precision == "bf16" else "32-true",
    }


class ExactDDP(DDPStrategy):
    """DDP whose sums over ranks do not depend on how it groups gradients, on a CPU.

    DDP regroups them after its first step, and with more than two ranks the order of a sum depends on the place in the
    group: the first step after a resume would differ in its last digits from that of an uninterrupted run. NCCL on GPUs
    promises no order at all, so there the gradients stay grouped.
    """

    def configure_ddp(self) -> None:
        super().configure_ddp()
        if self.root_device.type == "cpu":
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, lambda _, bucket: _mean_of_each(bucket))


def _mean_of_each(bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    world = torch.distributed.get_world_size()
    sums = [torch.distributed.all_reduce(each.div_(world), async_op=True) for each in bucket.gradients()]
    done = torch.futures.collect_all([work.get_future() for work in sums])
    return done.then(lambda _: bucket.buffer())


class ZeroPrecision(DeepSpeedPrecision):
    """Autocast as in `lightning.pytorch.plugins.MixedPrecision`; inputs keep their dtype."""

    def __init__(self, precision: str) -> None:
        super().__init__("bf16-mixed" if precision == "bf16" else "32-true")

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def backward(self, tensor: Tensor, model: Any, *args: Any, **kwargs: Any) -> None:
        # Lightning has divided the loss by the accumulated micro-batches already
        model.trainer.model.backward(tensor, scale_wrt_gas=False)

    def forward_context(self) -> AbstractContextManager[None]:
        if self.precision == "32-true":
            return nullcontext()
        return MixedPrecision("bf16-mixed", "cuda").forward_context()


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy with checkpoints of whole tensors, written by rank 0 in the project's format.

    Args:
        config: of `train.parallel.zero.zero_config`.
        frozen: dtype of the frozen weights. With stage 3 the module comes with its weights as they are stored, and
            they are spread over the ranks part by part, so that no rank ever holds the model.
        precision: the arithmetic.
    """

    def __init__(self, config: dict[str, Any], frozen: torch.dtype, precision: ZeroPrecision) -> None:
        super().__init__(config=config, precision_plugin=precision)
        self.frozen = frozen

    def setup(self, trainer: L.Trainer) -> None:
        if self.zero_stage_3:
            assert self.lightning_module is not None and self.config is not None
            spread_weights(self.lightning_module.transformer, self.frozen, self.root_device, self.config)
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # the module puts its trained weights into the checkpoint itself

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return gather_optimizer_state(self.optimizers[0], self._groups(), self.is_global_zero)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        DDPStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return DDPStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        scatter_optimizer_state(self.optimizers[0], self._groups(), checkpoint["optimizer_states"][0])

    def _groups(self) -> list[list[nn.Parameter]]:
        module: Any = self.lightning_module
        groups: list[list[nn.Parameter]] = module.parameter_groups
        return groups
