"""What happens in each denoising step of a stock pipeline: its attention, its share of several GPUs, its time.

The pipeline calls its transformer as always; the call goes through `Denoiser`, which counts the steps, gives the step's
attention to the transformer, and splits the work (`train.sample.ranks`). Both branches' predictions are
exchanged, so that every rank goes on with the same latent. A step's noise level is the scheduler's own, in float32: the
timestep that the transformer is given may be rounded to bf16 or to a whole number.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from radial import Dense
from train.attention.recipe import AttentionRecipe
from train.errors import UserError
from train.models.base import ModelAdapter
from train.sample.ranks import Split

_MARK = "radial_denoiser"


def has_denoiser(transformer: Any) -> bool:
    """Whether a transformer's calls go through a `Denoiser`, of this pipeline or of another one that shares it."""
    return hasattr(transformer, _MARK)


@dataclass
class Denoiser:
    """Stands between a pipeline and its transformers while a clip is generated.

    Attributes:
        pipeline: of diffusers; its scheduler counts the steps.
        adapters: our attention on each of its transformers.
        attention: of the clip.
        split: of the ranks.
        negative: the inputs that the negative prompt has instead of the prompt's, where the pipeline asks for both one
            after the other.
        bring: called with the transformer that runs next.
    """

    pipeline: Any
    adapters: list[ModelAdapter]
    attention: AttentionRecipe
    split: Split = field(default_factory=Split)
    negative: Mapping[str, Tensor] = field(default_factory=dict)
    bring: Callable[[Any], None] = lambda transformer: None
    seconds: list[float] = field(default_factory=list)
    """Of each step so far."""
    dense: list[bool] = field(default_factory=list)
    """Whether each step was dense throughout."""

    def __post_init__(self) -> None:
        self._step: tuple[Any, ...] = ()  # what the attention in place was made for
        self._ahead: Tensor | None = None
        self._started = 0.0
        self._before = [(adapter.transformer, vars(adapter.transformer).get("forward")) for adapter in self.adapters]
        for adapter in self.adapters:
            transformer = adapter.transformer
            transformer.forward = functools.partial(self._forward, adapter, transformer.forward)
            setattr(transformer, _MARK, True)

    def leave(self) -> None:
        """Gives the transformers their own forward back.

        Raises:
            UserError: something has wrapped the forward since, as offloading does; all stays as it is.
        """
        for transformer, _ in self._before:
            own = vars(transformer).get("forward")
            if not isinstance(own, functools.partial) or own.func != self._forward:
                raise UserError(
                    "the pipeline was offloaded after it was extended: call pipeline.remove_all_hooks() first"
                )
        for transformer, forward in self._before:
            delattr(transformer, _MARK)
            del transformer.forward
            if forward is not None:
                transformer.forward = forward

    def restart(self, attention: AttentionRecipe, negative: Mapping[str, Tensor]) -> None:
        """Before another clip."""
        self.attention, self.negative = attention, negative
        self.seconds, self.dense = [], []
        self._step, self._ahead = (), None
        self._started = time.perf_counter()

    def step_end(self, pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipelines' ``callback_on_step_end``."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._started)
        self._started = now
        return {}

    def _forward(self, adapter: ModelAdapter, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("return_dict") is not False:
            raise UserError(
                "the transformer of an extended pipeline was called with "
                f"{'positional arguments' if args else 'return_dict=True'}, expected keywords and return_dict=False, "
                "as diffusers' pipelines call it: call the pipeline, or take ours out first (train.sample.unextend)"
            )
        step = self.pipeline.scheduler.step_index or 0  # None before the first step
        now = (step, noise_level(self.pipeline.scheduler, step), kwargs["hidden_states"].shape[2:])
        if now != self._step:
            self._step, self._ahead = now, None
            self._set_attention(kwargs["hidden_states"])
        elif self._ahead is not None:
            return (self._ahead,)  # the negative prompt's, which the other branch has computed
        self.bring(adapter.transformer)
        return (self._predict(adapter, inner, kwargs),)

    def _set_attention(self, latent: Tensor) -> None:
        recipe, (step, level, _) = self.attention, self._step
        if step == 0:
            self.dense = []
        self.dense.append(isinstance(recipe.pattern, Dense) or recipe.is_dense(level, step))
        for adapter in self.adapters:
            grid = adapter.grid(latent)
            adapter.set_attention(recipe.step(grid, dense=self.dense[-1], sequence=self.split.sequence))

    def _predict(self, adapter: ModelAdapter, inner: Callable[..., Any], kwargs: dict[str, Any]) -> Tensor:
        branch, together = self.split.branch, len(kwargs["hidden_states"]) == 2
        if self.split.branches == 2 and together:  # negative and positive prompt in one batch
            kwargs = {k: v[branch : branch + 1] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        elif self.split.branches == 2 and branch == 1:
            kwargs = {k: self.negative[k].to(v) if k in self.negative else v for k, v in kwargs.items()}
        out = adapter.predicted(inner, kwargs)
        if self.split.branches == 1:
            return out
        both = [torch.empty_like(out), torch.empty_like(out)]
        dist.all_gather(both, out.contiguous(), group=self.split.partner)
        if together:
            return torch.cat(both)
        self._ahead = both[1]
        return both[0]


def noise_level(scheduler: Any, step: int) -> float:
    """The noise level in (0, 1] at which a pipeline's scheduler takes a step, in float32."""
    sigma: float = scheduler.sigmas[step].item()
    return 1 - sigma if scheduler.config.get("invert_sigmas") else sigma  # Mochi's time runs from noise to data
