"""The typed schema of a run: every key that a YAML file or the command line may set.

`train.config.compose` fills it. Nothing else sees OmegaConf: the run turns these dataclasses into plain arguments.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from radial import Pattern, VideoGrid, build_layout, make_pattern, with_share
from train.errors import UserError

ROPE_KINDS = ("default", "riflex", "interpolate")


@dataclass
class ModelConfig:
    """The pre-trained transformer."""

    family: str = MISSING  # a key of train.models.families.ADAPTERS
    path: str | None = None  # diffusers folder, hub:<organisation>/<model>, or builtin:<a model of train/assets>
    subfolder: str | None = None  # where in it the transformer lies
    weights: str | None = None  # how to get the weights: said when path is not set
    architecture: dict[str, Any] | None = None  # random weights of this config instead of path
    dimensions: dict[str, Any] | None = None  # of the public model: what benchmarks and plans need without its weights
    vae: list[int] = MISSING  # compression of the VAE in (t, h, w)
    patch: list[int] = MISSING  # patch of the transformer in latent cells (t, h, w)
    text_tokens: int = MISSING  # the family pads every prompt to this many tokens
    native_frames: int | None = None  # of the clips, before the VAE, that the model was made for
    rope: str = "default"  # temporal positions past that length (`train.models.rope`); rope=... sets it
    boundary: float | None = None  # of two experts: the noise level from which on the first one runs
    expert: str | None = None  # of two experts, whom to train: both, high, low
    rule: str = "wan"  # of the released mask: the one that the family's public inference runs
    shifts: dict[int, float] = field(default_factory=dict)  # its noise shift, by the short side (pixels) from which on
    native_size: list[int] | None = None  # (height, width) in pixels of what its authors generate
    steps: int | None = None  # denoising steps that its authors generate with
    guidance: list[float] | None = None  # their weight of guidance; of two experts each one's, high noise levels first
    caption_dropout: float = 0.1  # what it is trained with; guidance-distilled models have no negative prompt to learn

    def shift_at(self, height: int, width: int) -> float | None:
        """Its own noise shift for clips of this size in pixels; None where it has none."""
        fitting = [start for start in self.shifts if start <= min(height, width)]
        return self.shifts[max(fitting)] if fitting else None


@dataclass
class ClipConfig:
    """The clips to train on, in pixels."""

    frames: int = MISSING  # of the video, before the VAE
    height: int = MISSING  # pixels
    width: int = MISSING  # pixels


@dataclass
class AttentionConfig:
    """What replaces self-attention (`radial.patterns`, `train.attention.step`)."""

    pattern: str = "released"  # a key of radial.PATTERNS
    rule: str | None = None  # of released: wan, hunyuan, ports; null: the model's own (model.rule)
    decay: float = 1.0  # of released: below 1 is sparser
    reach: float | None = None  # the parameter of the patterns that have one of this name; null: its default
    share: float | None = None  # of all blocks; the pattern's parameter is what comes nearest; null: as it is given
    per_head: bool = False  # of random: a draw for each head of each layer
    block: int = 128  # tokens
    dense_layers: int = 2  # the first blocks, which stay dense
    dense_steps: int = 0  # so many of the model's sampling steps, the noisiest, run dense (`train.attention.levels`)
    dense_sigma: float | None = None  # instead of dense_steps: the noise level itself; runs of before have it
    backend: str | None = None  # an attention backend by name; null picks the fastest

    def under(self, pattern: str) -> AttentionConfig:
        """The same with a pattern in every layer and step; what another one does not have is left out."""
        same = self if pattern == self.pattern else replace(self, reach=None, share=None, per_head=False)
        return replace(same, pattern=pattern, dense_layers=0, dense_steps=0, dense_sigma=None)


@dataclass
class LoraSettings:
    """The adapter."""

    rank: int = 128
    alpha: int = 128
    targets: str | None = None  # regex on module names; null: Q, K, V, O of self-attention
    init: str | None = None  # a LoRA file in any format, or its folder, to start from; null: B starts at zero
    text: bool = False  # in joint attention also those of the text's tokens


@dataclass
class ObjectiveConfig:
    """The flow-matching objective (`train.flow`)."""

    shift: float | None = None  # moves noise levels towards 1; null: the model's own for each clip (`RunConfig.shift`)
    shift_with_length: bool = False  # the model's own times sqrt(the clip's length / the native one)
    density: str = "uniform"  # uniform, logit_normal
    mean: float = 0.0
    std: float = 1.0
    caption_dropout: float | None = None  # share of samples that train with the empty prompt; null: the model's own
    first_frame: float = 0.0  # share of steps whose clips go on from their own first frame (TI2V-5B)
    guidance: float = 1.0  # the weight that a guidance-distilled model (Hunyuan) is told


@dataclass
class DataConfig:
    """The shards and how they are read."""

    shards: str | None = None  # folder or URL with manifest.json, or a pipe: command with {} for a file's name
    cache: str | None = None  # folder that keeps whole remote shards; null: none
    max_bad: int = 16  # more damaged samples than this, on one rank, stop the run
    stages: list[str] = field(default_factory=list)  # functions, sample in, sample out (`data.shards.stages`)
    batch_size: int = 1  # samples a micro-batch on each device
    workers: int = 2  # the loader's threads a rank
    shuffle_window: int = 256  # samples that are shuffled together
    synthetic_clips: int = 0  # > 0: make that many synthetic clips where shards is missing


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    weight_decay: float = 0.0
    warmup: int = 50  # optimizer steps
    decay: str = "constant"  # after the warm-up: constant, cosine
    clip: float = 1.0  # gradient norm
    global_batch: int | None = None  # clips a step of all devices; null: those of one micro-batch
    accumulate: int | None = None  # micro-batches a step; null: as many as global_batch needs


@dataclass
class TrainerConfig:
    """How long, how exact, on what."""

    steps: int = MISSING  # optimizer steps
    precision: str = "bf16"  # bf16, fp32, auto (bf16 where the hardware multiplies it)
    nodes: int = 1
    devices: int = 1  # of each node
    compile: bool = False  # torch.compile each transformer block
    fp8: bool = False  # the blocks' frozen linear layers in float8
    check_memory: bool = True  # refuse a run that cannot fit this machine, by the plan (`train.planning`)
    checkpoint_every: int = 100  # optimizer steps
    checkpoint_minutes: float = 10.0  # and when so long has passed since the last; 0: by steps alone
    keep: int = 2  # newest checkpoints that stay, beside the best
    timeout: float = 540.0  # seconds at one place of a step after which the run ends and says which rank hangs
    max_skipped: int = 20  # steps whose loss or gradient is not finite, skipped, before the run ends


@dataclass
class ParallelConfig:
    """How the work is spread over GPUs, and what is kept for the backward."""

    strategy: str = "ddp"  # ddp; zero1, zero2, zero3: DeepSpeed, on GPUs only
    sequence: int = 1  # GPUs that share each clip's tokens
    offload_optimizer: bool = False  # of ZeRO: the optimizer state, and its step, on the CPU
    offload_parameters: bool = False  # of zero3: the weights in CPU memory
    activations: str = (
        "none"  # what blocks keep: none, full, selective, auto (`train.memory.activations`, `train.memory.policies`)
    )
    offload_activations: bool = False  # what full or selective keep goes to CPU memory
    offload_gib: float | None = None  # CPU memory that each GPU's activations may take; the rest stays; null: no limit
    ffn_chunk: int | None = None  # tokens that a feed-forward layer takes at a time


@dataclass
class ValidationConfig:
    """What is looked at while training: the loss on held-out clips, at fixed noise levels and clip lengths
    (`train.callbacks.validation`), and clips of fixed prompts (`train.callbacks.clips`)."""

    every: int = 0  # optimizer steps; 0: none
    shards: str | None = (
        None  # held-out clips, as data.shards; null: new synthetic ones where data.synthetic_clips is set
    )
    clips: int = 8  # the first of them
    sigmas: list[float] | None = None  # noise levels; null: quantiles of those that the run trains at
    samples_every: int = 0  # optimizer steps between the prompts' clips; 0: none
    prompts: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)  # a first frame for each prompt, for models that take one
    samples_steps: int = 30  # denoising steps
    samples_guidance: float = 5.0


@dataclass
class LogConfig:
    """metrics.csv is always written; TensorBoard and Weights & Biases on request, with the same keys."""

    every: int = 1  # optimizer steps
    norms_every: int = 25  # optimizer steps between the LoRA's norms by block; 0: none
    tensorboard: bool = False
    wandb: str = "disabled"  # disabled, offline, online
    project: str = "radial-lora"


@dataclass
class ReportConfig:
    """What the run shows at its end on held-out clips; only where data.synthetic_clips made the data."""

    clips: int = 0  # held-out clips in the table; 0: no report
    sampling_steps: int = 12
    guidance: float = 1.0  # classifier-free guidance of the animation
    short_frames: int = 0  # also measure the base at this length, its own; 0: not


@dataclass
class RunConfig:
    """A whole run."""

    conf: str = MISSING
    seed: int = 0
    runs: str = "runs"  # run folders are <runs>/<conf>/<time>
    model: ModelConfig = field(default_factory=ModelConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    lora: LoraSettings | None = field(default_factory=LoraSettings)  # null trains all weights
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def clips_at_once(self) -> float:
        """Clips in a micro-batch of all devices together."""
        return self.data.batch_size * self.trainer.nodes * self.trainer.devices / self.parallel.sequence

    def latent_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the configured clip in latent cells."""
        frames, height, width = self.model.vae
        return (self.clip.frames - 1) // frames + 1, self.clip.height // height, self.clip.width // width

    def grid(self) -> VideoGrid:
        """The token grid of the configured clip."""
        vae, patch = self.model.vae, self.model.patch
        return VideoGrid.from_pixels(
            self.clip.frames,
            self.clip.height,
            self.clip.width,
            vae=(vae[0], vae[1], vae[2]),
            patch=(patch[0], patch[1], patch[2]),
        )

    def pattern(self) -> Pattern:
        """Which blocks attention keeps; with ``attention.share``, on the configured clip's grid.

        Raises:
            RadialError: an unknown name, or a value that it refuses.
        """
        attention = self.attention
        pattern = make_pattern(
            attention.pattern,
            decay=attention.decay,
            rule=self.rule(),
            reach=attention.reach,
            per_head=attention.per_head,
        )
        if attention.share is None:
            return pattern
        return with_share(pattern, self.grid(), attention.block, attention.share)

    def pattern_in_words(self) -> str:
        """The pattern's name; with ``attention.share`` also what was found for it on the configured clip's grid."""
        pattern, attention = self.pattern(), self.attention
        if attention.share is None or pattern.parameter is None:
            return pattern.name
        kept = 1 - build_layout(pattern, self.grid(), attention.block).sparsity
        value = getattr(pattern, pattern.parameter)
        return f"{pattern.name} with {kept:.1%} of the blocks ({pattern.parameter} {value:.4g})"

    def rule(self) -> str:
        """The released mask's rule: ``attention.rule``, or the one that the family's public inference runs."""
        return self.attention.rule or self.model.rule

    def caption_dropout(self) -> float:
        """The share of samples that train with the empty prompt: ``objective.caption_dropout``, or the model's own."""
        given = self.objective.caption_dropout
        return self.model.caption_dropout if given is None else given

    def shift(self, clip: ClipConfig | None = None) -> float:
        """The shift of a clip's noise levels: ``objective.shift``, or the model's own at the clip's resolution.

        With ``objective.shift_with_length`` the model's own grows with the clip as it would with a frame's area: the
        square root of the ratio of sizes keeps what noise leaves to be seen (arXiv 2403.03206, eq. 23).

        Args:
            clip: by default the configured one; shards may hold others.

        Raises:
            UserError: neither is there.
        """
        if self.objective.shift is not None:
            return self.objective.shift
        clip = clip or self.clip
        shift = self.model.shift_at(clip.height, clip.width)
        if shift is None:
            raise UserError("objective.shift is not set, and the model has none of its own (model.shifts): set it")
        if not self.objective.shift_with_length:
            return shift
        if self.model.native_frames is None:
            raise UserError("objective.shift_with_length needs model.native_frames, it is not set")
        return shift * math.sqrt(clip.frames / self.model.native_frames)


def structured(config: RunConfig) -> DictConfig:
    """The config as OmegaConf's, typed; text in it stands for itself."""
    typed = OmegaConf.merge(OmegaConf.structured(RunConfig), literal(asdict(config)))
    assert isinstance(typed, DictConfig)
    return typed


def literal(value: Any) -> Any:
    """The value with each ``${`` in its text escaped, which OmegaConf would take for a reference to another key."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    return [literal(inner) for inner in value] if isinstance(value, list) else value
