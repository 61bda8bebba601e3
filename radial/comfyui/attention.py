"""The attention of a LoRA's header in ComfyUI's models, through two of ComfyUI's own places for such things.

An ``APPLY_MODEL`` wrapper runs around each call of the model and knows the latent, from which the token grid follows,
and the step's noise level. ``transformer_options["optimized_attention_override"]`` gets every attention of that call:
the video's self-attention is computed here, every other one, and dense layers and steps, by what would have run.

    model        self-attention's q, k, v                    beside it
    WanModel     (batch, video tokens, heads x head_dim)     cross-attention, with the keys of text or image
    HunyuanVideo (batch, heads, video + text, head_dim)      the text's own layers, without the video

Before February 2026 ComfyUI put HunyuanVideo's text behind the video, since then before it (`Model.text_first`); here
it is brought behind, as in training.

Positive and negative prompts come as one batch or in turn; tiles and context windows come as latents of their own size,
and have the mask of that size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.patterns import HeadMasks
from radial.serving import attention_for, is_dense

CALL = "radial_call"
"""The key of ``transformer_options`` under which a call of the model finds its `Call`."""
OVERRIDE = "optimized_attention_override"
"""ComfyUI's key for what computes attention instead of its own function."""
_PURE_NOISE = 0.999  # a schedule that starts below is the later part of a clip's
_LATER = sys.maxsize  # the number of its steps


@dataclass(frozen=True)
class Model:
    """What attention has to know of one of ComfyUI's models.

    Attributes:
        kind: name of its class.
        patch: cells of a token in (t, h, w).
        layers: with self-attention over the video.
        double: the first of them, whose blocks ComfyUI calls double.
        joint: whether text tokens stand beside the video's in self-attention.
        text_first: whether they come before the video's there, not after them.
    """

    kind: str
    patch: tuple[int, int, int]
    layers: int
    double: int
    joint: bool
    text_first: bool = False


@dataclass
class Call:
    """One call of the model.

    Attributes:
        grid: of its tokens.
        sigma: the noise level, 0 to 1.
        step: of the sampler's schedule.
        layer: how many self-attention layers have run.
        numbered: whether ComfyUI said of one of them which it is.
        text_lengths: of each sample, where text is masked; found in the first layer.
    """

    grid: VideoGrid
    sigma: float
    step: int
    layer: int = 0
    numbered: bool = False
    text_lengths: Tensor | None = None


@dataclass(frozen=True)
class RadialOverride:
    """What the node puts on a model.

    Attributes:
        header: of the LoRA's file.
        model: which it is put on.
        before: the override that was there, which computes all that this one does not.
        masks: of a LoRA that was trained under fitted ones.
    """

    header: Mapping[str, str]
    model: Model
    before: Callable[..., Tensor] | None = None
    masks: HeadMasks | None = None

    def around(
        self, executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: dict[str, Any] | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """The ``APPLY_MODEL`` wrapper: as ComfyUI calls its models.

        Raises:
            RadialError: a latent that the mask cannot serve, or a node that leaves out some of the layers.
        """
        options = transformer_options or {}
        call = Call(self._grid(x, c_crossattn, kwargs.get("clip_fea")), *moment(options))
        options = {**options, CALL: call}
        out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        if call.layer not in (0, self.model.layers) and not call.numbered:
            raise RadialError(
                f"{call.layer} of the model's {self.model.layers} layers have run: a node that skips layers needs a "
                "ComfyUI that numbers them (transformer_options['block_index']), please update it"
            )
        return out

    def __call__(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The override: ``func`` is ComfyUI's own attention, of q, k, v, heads and options.

        Raises:
            RadialError: self-attention over other tokens than the latent's, or text that is masked in its middle.
        """
        options = kwargs.get("transformer_options") or {}
        call: Call | None = options.get(CALL)
        if call is None or not self._is_ours(call, args, kwargs):
            return self._other(func, *args, **kwargs)
        layer = self._layer(call, options)
        call.layer += 1
        if is_dense(self.header, layer=layer, step=call.step, sigma=call.sigma):
            return self._other(func, *args, **kwargs)
        q, k, v, heads = args[:4] if len(args) > 3 else (*args[:3], kwargs["heads"])
        whole = bool(kwargs.get("skip_reshape"))  # heads lie before tokens already
        first = call.grid.text_tokens if self.model.text_first else 0
        q, k, v = (rolled(x.transpose(1, 2) if whole else x.unflatten(-1, (heads, -1)), 1, first) for x in (q, k, v))
        mask = args[4] if len(args) > 4 else kwargs.get("mask")
        mask = None if mask is None else rolled(mask, -1, first)
        if mask is not None and call.text_lengths is None:
            call.text_lengths = text_lengths(mask, call.grid, len(q))
        attention = attention_for(
            self.header, call.grid, layer=layer, layers=self.model.layers, step=call.step, sigma=call.sigma,
            masks=self.masks,
        )  # fmt: skip
        out = attention(q.to(v.dtype), k.to(v.dtype), v, text_lengths=None if mask is None else call.text_lengths)
        out = rolled(out, 1, -first)
        return out.transpose(1, 2) if kwargs.get("skip_output_reshape") else out.flatten(2)

    def _grid(self, latent: Tensor, text: Tensor | None, image: Tensor | None) -> VideoGrid:
        if latent.dim() != 5:
            raise RadialError(f"the latent has shape {tuple(latent.shape)}, expected that of a video")
        sides = latent.shape[2:]
        if self.model.joint and any(side % step for side, step in zip(sides, self.model.patch, strict=True)):
            raise RadialError(f"the latent has sides {tuple(sides)}, expected multiples of {self.model.patch}")
        # Wan's are padded to whole tokens
        frames, height, width = (-(-side // step) for side, step in zip(sides, self.model.patch, strict=True))
        beside = 0 if text is None else text.shape[1]
        grid = VideoGrid(frames, height, width, beside if self.model.joint else 0)
        if not self.model.joint and grid.tokens in (beside, 0 if image is None else image.shape[-2]):
            raise RadialError(f"the clip has {grid.tokens} tokens, as many as the prompt: choose another size")
        return grid

    def _is_ours(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        side = 2 if kwargs.get("skip_reshape") else 1
        queries, keys = args[0].shape[side], args[1].shape[side]
        if queries != keys or (self.model.joint and queries == call.grid.text_tokens):
            return False
        if queries != call.grid.tokens:
            raise RadialError(
                f"self-attention has {queries} tokens, the clip {call.grid.tokens}: reference frames and other "
                "tokens beside the clip's have no place in the mask"
            )
        return True

    def _layer(self, call: Call, options: Mapping[str, Any]) -> int:
        if "block_index" not in options:
            return call.layer
        call.numbered = True
        return int(options["block_index"]) + (self.model.double if options.get("block_type") == "single" else 0)

    def _other(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return func(*args, **kwargs) if self.before is None else self.before(func, *args, **kwargs)


def moment(options: Mapping[str, Any]) -> tuple[float, int]:
    """The noise level of a call, 0 to 1, and the number of its step, from ``transformer_options``.

    A schedule that starts below pure noise is the later part of a clip's (a second sampler, or ``denoise`` below 1):
    its steps are none of the first ones, and have numbers that no count of dense steps reaches.

    Raises:
        RadialError: there is no noise level.
    """
    if options.get("sigmas") is None:
        raise RadialError("the sampler gives no noise level (transformer_options['sigmas']): use one of ComfyUI's own")
    sigma = float(options["sigmas"].max())
    schedule = options.get("sample_sigmas")
    if schedule is None or float(schedule[0]) < _PURE_NOISE:
        return sigma, _LATER
    # samplers that look between two steps belong to the first of them
    return sigma, max(0, int((schedule.float().cpu() >= sigma - 1e-6).sum()) - 1)


def rolled(x: Tensor, dim: int, count: int) -> Tensor:
    """The first ``count`` places of a dimension moved to its end; a negative one moves the last to its front."""
    return x.roll(-count, dim) if count else x


def text_lengths(mask: Tensor, grid: VideoGrid, batch: int) -> Tensor:
    """How many text tokens count in each sample.

    Args:
        mask: of the keys, (batch or 1, 1, tokens) or with a dimension of heads; added to the scores, or true where a
            key counts.

    Returns:
        (batch,) int64.

    Raises:
        RadialError: a key of the video is masked, or one of the text before another that counts.
    """
    counts = mask.reshape(-1, mask.shape[-1])
    counts = counts if counts.dtype == torch.bool else counts == 0
    text = counts[:, grid.video_tokens :]
    lengths = text.sum(1)
    first = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
    if mask.shape[-1] != grid.tokens or len(counts) not in (1, batch) or bool((text != first).any()):
        raise RadialError("attention has a mask that is not one of the text's padding: the node does not know it")
    if not bool(counts[:, : grid.video_tokens].all()):
        raise RadialError("attention has a mask over the video's own tokens: the node does not know it")
    return lengths.expand(batch)
