"""What a layer keeps for its backward, and the working set of that backward, in bytes of one rank's GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from train.config.schema import RunConfig
from train.planning import calibration
from train.planning.calibration import LayerCosts
from train.planning.sizes import Sizes


@dataclass(frozen=True)
class LayerMemory:
    """One layer of a run's model on a rank's clips; every layer counts alike.

    Args:
        config: the run.
        sizes: of its model and clip.
        plain_attention: it trains without a kernel for attention (`train.planning.kernels`).
        float8: its frozen linear layers multiply in float8.
    """

    config: RunConfig
    sizes: Sizes
    plain_attention: bool = False
    float8: bool = False

    @property
    def clips(self) -> int:
        """Clips that a rank works on at once."""
        return self.config.data.batch_size

    @property
    def sequence(self) -> int:
        """Ranks that share a clip."""
        return self.config.parallel.sequence

    @property
    def tokens(self) -> int:
        """Tokens of a clip on one rank; text tokens lie on every one."""
        return -(-self.sizes.video_tokens // self.sequence) + self.sizes.tokens - self.sizes.video_tokens

    @property
    def hidden(self) -> float:
        """One hidden state of a rank."""
        return float(self.clips * self.tokens * self.sizes.width * self.sizes.element)

    @property
    def in_flight(self) -> float:
        """What offloading itself takes on the GPU: two hidden states on their way."""
        return 2 * self.hidden

    @property
    def costs(self) -> LayerCosts:
        """What the layers cost, eager or compiled."""
        if self.config.trainer.compile:
            return calibration.COMPILED
        return calibration.EAGER_OF.get(self.config.model.family, calibration.EAGER)

    @property
    def modulated(self) -> bool:
        """Whether there are steps in which each token has its own timestep."""
        return self.sizes.takes_first_frame and self.config.objective.first_frame > 0

    @property
    def chunk(self) -> int | None:
        """Tokens that every feed-forward layer takes at a time; None where some take all."""
        return self.config.parallel.ffn_chunk if self.sizes.all_chunked else None

    def kept_by(self, policy: str) -> float:
        """What the layer keeps for its backward under a policy of `train.memory`."""
        middle = self.sizes.wide / self.sizes.width if self.chunk is None else 1.0
        if policy == "none":
            return (
                self.costs.saved + self.modulated * self.costs.saved_modulated + self.sizes.dora + middle
            ) * self.hidden
        sums = 4.0 * self.clips * self.sizes.tokens * self.sizes.heads / self.sequence  # log-sum-exp
        attended = self.hidden * self.sizes.attended / self.sizes.width
        return self.hidden if policy == "full" else self.hidden + attended + sums

    def running(self, policy: str) -> float:
        """The working set of the layer's backward under that policy."""
        sizes, chunk = self.sizes, self.chunk
        own = self.costs
        costs = {"none": own.running_saved, "full": own.running, "selective": own.running_selective}[policy]
        costs += sizes.dora if policy != "none" else 0.0  # made again
        if self.modulated:
            costs += calibration.MODULATION + own.running_modulated
        middle = float(self.clips * self.tokens * sizes.wide * sizes.element)
        if chunk is not None:
            middle = min(middle, 2.0 * self.clips * chunk * sizes.wide * sizes.element)
        if self.float8 and not self.config.trainer.compile:
            wide = self.clips * (self.tokens if chunk is None else chunk) * sizes.wide
            middle += calibration.FP8_MIDDLE * wide
        latents = 24.0 * self.clips * sizes.cells  # clean, noise, noised, target, velocity and its gradient, all fp32
        if self.plain_attention:
            costs += calibration.PLAIN_ATTENTION[sizes.element] * sizes.attended / sizes.width
        return costs * self.hidden + middle + latents


def at_peak(passed: Sequence[LayerMemory], policies: Sequence[str], offload: float) -> tuple[float, float]:
    """What layers keep on the GPU, and the working set, when both together are largest.

    The last layer's backward comes first, and what a layer keeps goes with it. What the first keep goes to the CPU.

    Args:
        passed: a layer of each forward that has run when the backward begins, in that order.
        policies: of the layers of each.
        offload: bytes of what they keep that lie in CPU memory.
    """
    on_gpu, peak = -offload, (0.0, 0.0)
    for layer in passed:
        for policy in policies:
            on_gpu += layer.kept_by(policy)
            peak = max(peak, (max(on_gpu, 0.0), layer.running(policy)), key=sum)
    return peak


def movable_bytes(passed: Sequence[LayerMemory], policies: Sequence[str]) -> float:
    """What layers keep that can move to CPU memory: all but that of layers with the policy ``none``."""
    movable = set(policies) - {"none"}
    return sum(policies.count(policy) * layer.kept_by(policy) for layer in passed for policy in movable)
