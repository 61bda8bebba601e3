"""The memory of a run, before a GPU is touched.

    memory of a GPU = weights + LoRA, gradients and optimizer + what layers keep + the working set of one backward

Every term follows from counted sizes (`train.planning.sizes`) and a few measured figures
(`train.planning.calibration`); those of layers stand in `train.planning.layer_memory`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from train.attention.recipe import AttentionRecipe
from train.attention.sequence import check_heads
from train.config.global_batch import micro_batches
from train.config.schema import RunConfig
from train.errors import UserError
from train.memory.layer_policies import LayerPolicies, configured
from train.memory.weight_stream import SLOTS
from train.parallel.zero import REDUCE_BUCKET
from train.planning import calibration
from train.planning.choose_policies import chosen
from train.planning.hardware import Machine, this_machine
from train.planning.kernels import trains_plainly
from train.planning.layer_memory import LayerMemory, at_peak, movable_bytes
from train.planning.prompts import EncoderMemory
from train.planning.sizes import Sizes

GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """One run on one machine.

    Args:
        config: the run; its ``trainer.nodes`` and ``devices`` are not read: the machine has its own number of GPUs.
        machine: where.
        sizes: of its model and clip.
        given: what each layer keeps, instead of what the run's settings or the memory give.
    """

    config: RunConfig
    machine: Machine
    sizes: Sizes
    given: LayerPolicies | None = None

    @classmethod
    def of(cls, config: RunConfig, machine: Machine, layers: int | None = None) -> Budget | None:
        """The budget of a run; None where the model's dimensions are not known without downloading it."""
        sizes = Sizes.of(config, machine.precision(config.trainer.precision), layers)
        return None if sizes is None else cls(config, machine, sizes)

    @classmethod
    def here(cls, config: RunConfig, layers: int | None = None) -> Budget | None:
        """The budget of a run on this machine; None as for `of`."""
        return cls.of(config, this_machine(config.trainer.devices, config.trainer.nodes), layers)

    def dense(self) -> Budget:
        """The same run with dense attention in every layer."""
        config = replace(self.config, attention=self.config.attention.under("dense"))
        return replace(self, config=config, sizes=replace(self.sizes, density=1.0))

    @property
    def placed(self) -> RunConfig:
        """The run with as many nodes and GPUs as the machine has."""
        trainer = replace(self.config.trainer, nodes=self.machine.nodes, devices=self.machine.gpus)
        return replace(self.config, trainer=trainer)

    @cached_property
    def attention(self) -> AttentionRecipe:
        """Which layers are dense."""
        return AttentionRecipe.of(self.config)

    @cached_property
    def window(self) -> Budget | None:
        """The same run on what a dense teacher sees of its clips (`train.step.objective`); None without a teacher."""
        config = self.config
        native = config.model.native_frames
        if not config.objective.dense_teacher or native is None:
            return None
        clip = replace(config.clip, frames=min(native, config.clip.frames))
        config = replace(config, clip=clip, objective=replace(config.objective, dense_teacher=0.0))
        sizes = Sizes.of(config, self.machine.precision(config.trainer.precision), self.sizes.layers)
        assert sizes is not None, "the clips' own are known"
        density = self.attention.density(config.grid())  # of a pattern whose share was found on the whole clip
        return replace(self, config=config, sizes=replace(sizes, density=density))

    @property
    def shorter(self) -> Budget | None:
        """That window where it is less than the clip: the model runs it too, forward and backward."""
        window = self.window
        return window if window is not None and window.layer.tokens < self.layer.tokens else None

    @cached_property
    def layer(self) -> LayerMemory:
        """What a layer keeps for its backward, and the working set of that backward."""
        return LayerMemory(self.config, self.sizes, trains_plainly(self), self.float8)

    @property
    def float8(self) -> bool:
        """Whether frozen linear layers multiply in float8; stored in float8, they are expanded where the GPU cannot."""
        config = self.config
        return config.trainer.fp8 or (config.model.storage is not None and self.machine.gpu.float8)

    @property
    def stage(self) -> int:
        """The stage of ZeRO; 0 is DDP."""
        strategy = self.config.parallel.strategy
        return 0 if strategy == "ddp" else int(strategy.removeprefix("zero"))

    @property
    def sequence(self) -> int:
        """Ranks that share a clip."""
        return self.config.parallel.sequence

    @cached_property
    def weights(self) -> float:
        """Frozen weights on a GPU: all; with ZeRO 3 a rank's share and two gathered layers, or only those two; where
        they stream, what lies outside the layers and a ring of some layers."""
        sizes, parallel = self.sizes, self.config.parallel
        if parallel.offload_weights:
            return sizes.weights - self.streamed + min(SLOTS * sizes.layer_weights, sizes.weights)
        if self.stage < 3:
            return sizes.weights
        own = 0.0 if parallel.offload_parameters else sizes.weights / self.machine.world
        return own + min(2 * sizes.layer_weights, sizes.weights)

    @property
    def streamed(self) -> float:
        """Frozen weights that lie in a node's CPU memory, one copy for all its GPUs."""
        return self.sizes.layers_weights if self.config.parallel.offload_weights else 0.0

    @cached_property
    def training(self) -> float:
        """fp32 weights that are trained, their gradients, Adam's two moments and the moving average on a GPU."""
        n, world = 4.0 * self.sizes.trained, self.machine.world
        average = 0.0 if self.config.optim.ema is None else n  # whole on every rank
        if self.stage == 0:  # DDP reduces gradients through buckets of their size
            return average + 3 * n + self.gradients + (n if world > 1 else 0)
        own = n / world if self.stage == 3 else n
        moments = 0.0 if self.config.parallel.offload_optimizer else 3 * n / world  # with the fp32 masters
        return average + own + self.gradients + moments + 2 * min(n, 4.0 * REDUCE_BUCKET)

    @property
    def gradients(self) -> float:
        """fp32 gradients of what is trained on a GPU."""
        n = 4.0 * self.sizes.trained
        return n if self.stage < 2 else n / self.machine.world

    @cached_property
    def policies(self) -> LayerPolicies:
        """What each layer keeps: as configured, or chosen by the memory there is."""
        if self.given is not None:
            return self.given
        parallel, layers = self.config.parallel, self.sizes.layers
        if parallel.activations != "auto":
            return configured(parallel, layers)
        limit = min(self.cpu_room(), math.inf if parallel.offload_gib is None else parallel.offload_gib * GIB)
        first = sum(self.attention.is_dense_layer(layer) for layer in range(layers))
        dense = 0 if first == layers else first
        return chosen(layers, dense, max(limit, 0.0), self._needed_offload)

    def _needed_offload(self, names: Sequence[str]) -> float:
        room = (1 - calibration.MARGIN) * self.usable - self.weights - self.training
        over = sum(at_peak(self._passed, names, 0.0)) - room
        if over <= 0:
            return 0.0
        room -= self.layer.in_flight  # offloading takes some memory itself
        movable = movable_bytes(self._passed, names)
        least = sum(at_peak(self._passed, names, movable))
        if least <= room:
            return min(over + self.layer.in_flight, movable)
        # everything goes out, and some of the margin is used, or it does not fit at all
        return movable if least <= room + calibration.MARGIN * self.usable else math.inf

    @property
    def _passed(self) -> list[LayerMemory]:
        """What has run forward when the backward begins: the clip, then a dense teacher's window."""
        return [self.layer] if self.shorter is None else [self.layer, self.shorter.layer]

    @cached_property
    def offloaded(self) -> float:
        """Kept activations of one GPU that lie in CPU memory."""
        return min(self.policies.offload, movable_bytes(self._passed, self.policies.names))

    @cached_property
    def gpu_parts(self) -> dict[str, float]:
        """Memory of one GPU by part, at the peak of a step."""
        kept, running = at_peak(self._passed, self.policies.names, self.offloaded)
        return {
            "weights": self.weights,
            "LoRA, gradients, optimizer" if self.config.lora else "weights, gradients, optimizer": self.training,
            "kept activations": kept + (min(self.layer.in_flight, self.offloaded) if self.offloaded else 0.0),
            "working set": running,
        }

    @property
    def gpu_memory(self) -> float:
        """Bytes that torch has allocated on one GPU at the peak of a step."""
        return sum(self.gpu_parts.values())

    @cached_property
    def encoders(self) -> EncoderMemory:
        """What encodes ``validation.prompts`` on the first GPU, before the first step."""
        machine = self.machine
        return EncoderMemory.of(self.config, machine.precision(self.config.trainer.precision), cpu=machine.is_cpu)

    @property
    def gpu_encoding(self) -> float:
        """Bytes on the first GPU meanwhile, or of each rank on the CPU that they share; 0: no prompts are encoded."""
        encoders = self.encoders.all / (self.machine.gpus if self.machine.is_cpu else 1)
        return self.weights + self.training - self.gradients + encoders if encoders else 0.0

    @property
    def usable(self) -> float:
        """Bytes of one GPU that a step may allocate."""
        gpu = self.machine.gpu
        if self.machine.is_cpu:
            return (1 - calibration.CPU_SPARE) * gpu.memory
        return (1 - calibration.FRAGMENTATION) * gpu.memory - calibration.CONTEXT

    @cached_property
    def cpu_parts(self) -> dict[str, float]:
        """Memory of one node's CPU by part. The weights' files are mapped: their pages are the node's, and can go."""
        gpus, others = self.machine.gpus, self._beside_activations
        if self.machine.is_cpu:
            return {"processes": gpus * self.gpu_memory, "layers' weights": self.streamed}
        return {"processes": others["processes"], "kept activations, page-locked": gpus * self.offloaded, **others}

    @property
    def _beside_activations(self) -> dict[str, float]:
        """Memory of a node's CPU that runs on GPUs take whatever layers keep."""
        parallel, gpus = self.config.parallel, self.machine.gpus
        share = gpus / self.machine.world
        return {
            "processes": float(gpus * calibration.PROCESS),
            "layers' weights, page-locked": self.streamed,
            "weights": share * self.sizes.weights if parallel.offload_parameters else 0.0,
            "optimizer": share * 16 * self.sizes.trained if parallel.offload_optimizer else 0.0,
        }

    @property
    def cpu_memory(self) -> float:
        """Bytes of one node's CPU memory."""
        return sum(self.cpu_parts.values())

    @property
    def cpu_usable(self) -> float:
        """Bytes of one node's CPU memory that a run may take."""
        return (1 - calibration.CPU_SPARE) * self.machine.cpu_memory

    def cpu_room(self) -> float:
        """Bytes of CPU memory for each GPU's activations."""
        if self.machine.is_cpu:
            return 0.0
        return (self.cpu_usable - sum(self._beside_activations.values())) / self.machine.gpus

    @property
    def unshared(self) -> str | None:
        """Why these GPUs cannot share the clips of a step among them, in words; None if they can."""
        if self.machine.gpus % self.sequence:
            gpus = self.machine.gpus
            sizes = ", ".join(str(n) for n in range(1, gpus + 1) if gpus % n == 0)
            return f"parallel.sequence is {self.sequence}, expected a divisor of a node's {gpus} GPUs: {sizes}"
        try:
            micro_batches(self.placed)
            check_heads(self.sequence, self.sizes.heads)
        except UserError as error:
            return str(error)
        return None

    @property
    def misfit(self) -> str | None:
        """Why the run cannot work there, in words; None if it can."""
        if self.unshared is not None:
            return self.unshared
        dense, layers = self.config.attention.dense_layers, self.sizes.layers
        if dense > layers:
            return f"attention.dense_layers is {dense}, the model has {layers} layers"
        where = "the CPU has" if self.machine.is_cpu else f"an {self.machine.gpu.name} has"
        if self.config.trainer.fp8 and not self.machine.is_cpu and not self.machine.gpu.float8:
            return f"trainer.fp8 is true, {where} no float8 products: leave it out (model.storage=fp8 runs there)"
        if self.gpu_memory > self.usable + 1:  # a byte, for rounding
            return f"a step needs {self.gpu_memory / GIB:.1f} GiB a rank, {where} {self.usable / GIB:.1f} GiB for it"
        if self.gpu_encoding > self.usable + 1:
            needs = f"encoding validation.prompts before the first step needs {self.gpu_encoding / GIB:.1f} GiB"
            return f"{needs}, {where} {self.usable / GIB:.1f} GiB for it (validation.samples_every=0 encodes none)"
        if self.cpu_memory > self.cpu_usable:
            needs = f"a node needs {self.cpu_memory / GIB:.1f} GiB of CPU memory"
            return f"{needs}, it has {self.cpu_usable / GIB:.1f} GiB for it"
        return None


def chosen_policies(config: RunConfig, layers: int | None = None) -> LayerPolicies | None:
    """With ``parallel.activations=auto``, the policies that fit this machine's memory; None with any other.

    Args:
        layers: another number of layers than the model's.

    Raises:
        UserError: the model has no dimensions to plan with.
    """
    if config.parallel.activations != "auto":
        return None
    budget = Budget.here(config, layers)
    if budget is None:
        raise UserError("parallel.activations is auto, which needs a local model.path; set none, full or selective")
    return budget.policies
