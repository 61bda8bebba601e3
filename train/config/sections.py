"""The sections of a run's config for what it trains, on which data and how; `train.config.schema` names the others."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from omegaconf import MISSING

from data.synth import SCENES
from radial.backends import BACKENDS
from radial.cli.settings import POSITIVE, POWER_OF_TWO, Bound, at_least, within
from radial.patterns import PATTERNS, RULES, Pattern, make_pattern
from train.config.keys import key

_SHARE = Bound("a share of dense attention's blocks, above 0 and at most 1", lambda value: 0 < value <= 1)
_FINITE = Bound("a finite number", math.isfinite)
_BETWEEN = Bound("a number between 0 and 1", lambda value: 0 < value < 1)
_BETAS = Bound("two numbers from 0 up to 1", lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value))
_WEIGHTS = Bound("numbers above 0", lambda value: all(0 < weight < float("inf") for weight in value))


@dataclass
class AttentionConfig:
    """What replaces self-attention: a static mask, and where attention stays dense."""

    pattern: str = key("which blocks attention keeps (`python -m radial mask` draws them)", "released", tuple(PATTERNS))
    rule: str | None = key("variant of the released mask; null: the model's own", None, RULES)
    decay: float = key("how fast the released mask thins out with distance: below 1 is sparser", 1.0, must=POSITIVE)
    reach: float | None = key("parameter of the patterns that have one of this name; null: the pattern's own", None,
                              must=POSITIVE)  # fmt: skip
    share: float | None = key(
        "share of all blocks that is kept: the pattern's parameter is what comes nearest; null: as it is given", None,
        must=_SHARE,
    )  # fmt: skip
    per_head: bool = key("of pattern random: a draw for each head of each layer", False)
    masks: str | None = key("of pattern fitted: the file of masks that python -m radial fit writes", None, path=True)
    block: int = key("side of a block of the mask", 128, unit="tokens", must=POWER_OF_TWO)
    dense_layers: int = key("so many of the first layers stay dense", 2, must=at_least(0))
    dense_steps: int = key(
        "so many of the model's sampling steps, the noisiest, run dense, and training at their noise levels too", 0,
        must=at_least(0),
    )  # fmt: skip
    dense_sigma: float | None = key(
        "the noise level from which on attention is dense, instead of dense_steps: runs of older versions have it",
        None, must=within(0, 1),
    )  # fmt: skip
    backend: str | None = key("what computes it; null: the fastest that can (python -m radial backends)", None,
                              tuple(BACKENDS))  # fmt: skip

    def made(self, family_rule: str) -> Pattern:
        """The pattern as its keys give it, without ``share``, which needs a grid (`RunConfig.pattern`).

        Args:
            family_rule: that of the released mask where ``rule`` is None.

        Raises:
            RadialError: an unknown name, or a value that it refuses.
        """
        return make_pattern(
            self.pattern,
            decay=self.decay,
            rule=self.rule or family_rule,
            reach=self.reach,
            per_head=self.per_head,
            masks=self.masks,
        )

    def under(self, pattern: str) -> AttentionConfig:
        """The same with a pattern in every layer and step; what another one does not have is left out."""
        same = self if pattern == self.pattern else replace(self, reach=None, share=None, per_head=False, masks=None)
        return replace(same, pattern=pattern, dense_layers=0, dense_steps=0, dense_sigma=None)


@dataclass
class LoraSettings:
    """The adapter that is trained; lora=null trains all weights of the model instead."""

    rank: int = key("rank of the two factors", 128, must=at_least(1))
    alpha: int = key(
        "the LoRA's output is scaled by alpha / rank; with rslora by alpha / sqrt(rank)", 128, must=POSITIVE
    )
    dora: bool = key(
        "DoRA: the norm of each row of the tuned weight is a number of its own, trained too (arXiv 2402.09353)", False
    )
    rslora: bool = key("rsLoRA: the LoRA is scaled by alpha / sqrt(rank), not alpha / rank (arXiv 2312.03732)", False)
    targets: str | None = key(
        "regular expression for the names of the modules that carry a LoRA; null: Q, K, V and O of self-attention", None
    )
    init: str | None = key(
        "a LoRA file in any format, or its folder, to start from; null: the LoRA starts without effect", None, path=True
    )
    text: bool = key("in joint attention, the projections of the text's tokens carry a LoRA too", False)


@dataclass
class ObjectiveConfig:
    """The flow-matching objective: which noise levels and which conditions a step draws."""

    shift: float | None = key(
        "moves noise levels towards 1; null: the model's own for each clip's resolution", None, must=POSITIVE
    )
    shift_with_length: bool = key(
        "the model's own shift grows with the square root of the clip's length over the native one", False
    )
    density: str = key("distribution of the noise levels before the shift", "uniform", ("uniform", "logit_normal"))
    mean: float = key("mean of the logit-normal density", 0.0, must=_FINITE)
    std: float = key("standard deviation of the logit-normal density", 1.0, must=POSITIVE)
    caption_dropout: float | None = key(
        "share of samples that train with the empty prompt; null: the model's own", None, must=within(0, 1)
    )
    first_frame: float = key(
        "share of steps whose clips go on from their own first frame (Wan2.2-TI2V-5B)", 0.0, must=within(0, 1)
    )
    guidance: float = key(
        "the guidance weight that a guidance-distilled model (HunyuanVideo) gets as input", 1.0, must=POSITIVE
    )
    distilled_guidance: float | None = key(
        "the weight that a model is distilled at which takes none as input (MiniMax-H3): the velocity v is trained "
        "towards u + weight (v - u), u being the frozen model's with the empty prompt; null: towards v", None,
        must=at_least(1),
    )  # fmt: skip
    dense_teacher: float = key(
        "weight of a second loss: on each clip's first frames, of the native length, the difference to the frozen "
        "model's velocity with dense attention; 0: none", 0.0, must=at_least(0),
    )  # fmt: skip


@dataclass
class DataConfig:
    """The shards and how they are read."""

    shards: str | None = key(
        "folder or URL with a manifest.json, or a pipe: command with {} in place of a file's name; [a, b] for several",
        None, path=True,
    )  # fmt: skip
    weights: list[float] = key(
        "how often each sample of each folder comes in an epoch, such as [1, 0.5]; []: once", [], must=_WEIGHTS
    )
    frames: int | None = key(
        "longer clips are cut to so many frames when they are read, where the VAE is causal; null: none is", None,
        unit="frames", must=at_least(1),
    )  # fmt: skip
    holdout: float = key(
        "hold out so many samples for validation, all clips of a video or none; below 1 a share of the videos", 0.0,
        must=at_least(0),
    )  # fmt: skip
    cache: str | None = key("folder that keeps whole remote shards; null: none is kept", None, path=True, resume=True)
    max_bad: int = key("more damaged samples than this on one rank stop the run", 16, must=at_least(0), resume=True)
    stages: list[str] = key("functions that stand in the stream, sample in, sample out, as package.module.function", [])
    batch_size: int = key("samples in a micro-batch of each device", 1, must=at_least(1), resume=True)
    workers: int = key("threads of each rank that load samples", 2, must=at_least(0), resume=True)
    shuffle_window: int = key("samples that are shuffled together", 256, must=at_least(1))
    synthetic_clips: int = key(
        "make so many synthetic clips where data.shards is not set; 0: none", 0, must=at_least(0)
    )
    synthetic_scenes: str = key("what synthetic clips show (python -m data.synth --help)", "sunrise", SCENES)

    @property
    def places(self) -> list[str]:
        """The folders, URLs or commands of `shards`."""
        text = (self.shards or "").strip()
        if not (text.startswith("[") and text.endswith("]")):
            return [text] if text else []
        return [place for part in text[1:-1].split(",") if (place := part.strip().strip("'\""))]


@dataclass
class OptimConfig:
    """AdamW, its schedule and the clips of a step."""

    lr: float = key("learning rate after the warm-up", 1e-4, must=POSITIVE)
    betas: list[float] = key("AdamW's decay rates of the mean and of the square of the gradient", [0.9, 0.99],
                             must=_BETAS)  # fmt: skip
    lora_plus: float = key(
        "LoRA+: the learning rate of the LoRA's B (and a DoRA's norms), as a multiple of lr, which its A has "
        "(arXiv 2402.12354)", 1.0, must=POSITIVE,
    )  # fmt: skip
    ema: float | None = key(
        "decay of a moving average of what is trained, such as 0.999; validation, clips, reports and exports use the "
        "average; null: none", None, must=_BETWEEN,
    )  # fmt: skip
    weight_decay: float = key("AdamW's weight decay", 0.0, must=at_least(0))
    warmup: int = key("the learning rate rises linearly for so long", 50, unit="optimizer steps", must=at_least(0))
    decay: str = key("the learning rate after the warm-up", "constant", ("constant", "cosine"))
    clip: float = key("largest norm of the gradient; a larger one is scaled down to it", 1.0, must=POSITIVE)
    global_batch: int | None = key(
        "clips in a step of all devices together; null: those of one micro-batch", None, must=at_least(1), resume=True
    )
    accumulate: int | None = key(
        "micro-batches in a step; null: as many as global_batch needs", None, must=at_least(1), resume=True
    )


@dataclass
class TrainerConfig:
    """How long a run trains, in which precision, on how many devices, and when it saves."""

    steps: int = key("length of the run", MISSING, unit="optimizer steps", must=at_least(1))
    precision: str = key(
        "of the frozen weights and the forward pass; auto: bf16 where the hardware multiplies it", "bf16",
        ("bf16", "fp32", "auto"),
    )  # fmt: skip
    nodes: int = key("machines that train together", 1, must=at_least(1), resume=True)
    devices: int = key("GPUs, or processes on a CPU, of each node", 1, must=at_least(1), resume=True)
    compile: bool = key("compile each transformer layer with torch.compile", False, resume=True)
    fp8: bool = key("the layers' frozen linear modules compute in float8", False)
    check_memory: bool = key("refuse a run that cannot fit this machine by its plan", True, resume=True)
    checkpoint_every: int = key("distance of two checkpoints", 100, unit="optimizer steps", must=at_least(1),
                                resume=True)  # fmt: skip
    checkpoint_minutes: float = key(
        "save also when so long has passed since the last checkpoint; 0: by steps alone", 10.0, unit="minutes",
        must=at_least(0), resume=True,
    )  # fmt: skip
    keep: int = key("how many of the newest checkpoints stay on disk, beside the best", 2, must=at_least(1),
                    resume=True)  # fmt: skip
    timeout: float = key(
        "after so long at one place of a step the run ends and names the rank that hangs", 540.0, unit="seconds",
        must=POSITIVE, resume=True,
    )  # fmt: skip
    max_skipped: int = key(
        "steps whose loss or gradient is not finite are skipped; more than so many end the run", 20, must=at_least(0),
        resume=True,
    )  # fmt: skip


@dataclass
class ParallelConfig:
    """How the work is spread over GPUs, and what is kept for the backward pass."""

    strategy: str = key("ddp, or DeepSpeed's ZeRO of that stage, on GPUs only", "ddp",
                        ("ddp", "zero1", "zero2", "zero3"))  # fmt: skip
    sequence: int = key("GPUs that share each clip's tokens", 1, must=at_least(1))
    offload_optimizer: bool = key("with ZeRO, the optimizer's state and its step are on the CPU", False)
    offload_parameters: bool = key("with zero3, the weights are in CPU memory", False)
    offload_weights: bool = key(
        "the layers' frozen weights are in CPU memory, and come to the GPU one layer ahead of use", False
    )
    activations: str = key(
        "what a layer keeps for its backward pass: none recomputes nothing, full keeps the layer's input, selective "
        "also attention's output, auto chooses what fits", "none", ("none", "full", "selective", "auto"),
    )  # fmt: skip
    offload_activations: bool = key("what full or selective keep goes to CPU memory", False)
    offload_gib: float | None = key(
        "CPU memory that each GPU's activations may take, the rest stays on the GPU; null: no limit", None, unit="GiB",
        must=POSITIVE,
    )  # fmt: skip
    ffn_chunk: int | None = key(
        "tokens that a feed-forward layer takes at a time; null: all", None, unit="tokens", must=at_least(1)
    )
