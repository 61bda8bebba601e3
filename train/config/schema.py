"""The typed schema of a run: every key that a YAML file or the command line may set.

The model, the clip and the whole run stand here, the other sections in `train.config.sections` and
`train.config.output_sections`. `train.config.compose` fills it. Nothing else sees OmegaConf: the run turns these
dataclasses into plain arguments.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from radial import LatentTime, Pattern, VideoGrid, build_layout, with_share
from radial.cli.settings import POSITIVE, Bound, at_least, within
from radial.patterns import RULES
from train.config.keys import Key, key, keys_of, section
from train.config.output_sections import ExportConfig, LogConfig, ReportConfig, ValidationConfig
from train.config.sections import (
    AttentionConfig,
    DataConfig,
    LoraSettings,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    TrainerConfig,
)
from train.errors import UserError

ROPE_KINDS = ("default", "riflex", "interpolate")
_SIZES = Bound("three sizes (time, height, width) of at least 1", lambda value: len(value) == 3 and min(value) >= 1)
_SIDES = Bound("two sizes (height, width) of at least 1", lambda value: len(value) == 2 and min(value) >= 1)
_GUIDANCE = Bound(
    "a positive number, or two", lambda value: len(value) in (1, 2) and all(0 < one < math.inf for one in value)
)
_CHUNKS = Bound("two lengths, the second shorter", lambda value: len(value) == 2 and 1 <= value[1] < value[0])
_SHIFTS = Bound("positive numbers", lambda value: all(0 < shift < math.inf for shift in value.values()))
_BETWEEN = Bound("a noise level between 0 and 1", lambda value: 0 < value < 1)
_SEEDS = Bound("at least 0 and less than 2^32", lambda value: 0 <= value < 2**32)


@dataclass
class ModelConfig:
    """The pre-trained transformer and the facts of its family; conf/model has a file for each."""

    family: str = key(
        "the adapter that knows its class: wan, wan22_5b, hunyuan, hunyuan15, minimax_h3, mochi or your own", MISSING
    )
    path: str | None = key(
        "diffusers folder, hub:<organisation>/<model>, or builtin:<a model of train/assets>", None, path=True
    )
    subfolder: str | None = key("where in that folder the transformer lies", None)
    weights: str | None = key("the command that gets the weights, shown where path is not set", None)
    license: str | None = key("licence of the weights, as the hub names it; null: not known", None)
    architecture: dict[str, Any] | None = key(
        "settings of the diffusers class: random weights of these sizes are made instead of reading path", None
    )
    dimensions: dict[str, Any] | None = key(
        "settings of the public model that differ from the class's defaults, for benchmarks and plans without weights",
        None,
    )
    vae: list[int] = key("pixels of a latent cell: time, height, width", MISSING, must=_SIZES)
    vae_chunks: list[int] | None = key(
        "of a VAE that encodes a clip in chunks: the frames of each, and those of the last; null: the clip is one",
        None, must=_CHUNKS,
    )  # fmt: skip
    patch: list[int] = key("latent cells of a token: time, height, width", MISSING, must=_SIZES)
    text_tokens: int = key("every prompt is padded to so many", MISSING, unit="tokens", must=at_least(1))
    storage: str | None = key(
        "fp8: frozen weights of the layers' linear modules are rounded to 8 bits, and computed with in float8 where "
        "the GPU does; null: stored in the run's precision", None, ("fp8",),
    )  # fmt: skip
    native_frames: int | None = key("length of the clips that the model was made for", None, unit="frames of the video",
                                    must=at_least(1))  # fmt: skip
    longer: dict[str, int] = key("lengths at 2x and 4x of the native one, those of the published recipes", {})
    fps: float | None = key("pace of its clips", None, unit="frames a second", must=POSITIVE)
    rope: str = key("temporal positions past that length; the group rope sets it", "default", ROPE_KINDS)
    boundary: float | None = key("of two experts: the noise level from which on the first one runs", None,
                                 must=_BETWEEN)  # fmt: skip
    expert: str | None = key("of two experts: which are trained", None, ("both", "high", "low"))
    rule: str = key("variant of the released mask that the family's public inference runs", "wan", RULES)
    shifts: dict[int, float] = key(
        "its shift of the noise levels, by the clip's short side in pixels from which on it holds", {}, must=_SHIFTS
    )
    native_size: list[int] | None = key("height and width of what its authors generate", None, unit="pixels",
                                        must=_SIDES)  # fmt: skip
    steps: int | None = key("denoising steps that its authors generate with", None, must=at_least(1))
    guidance: list[float] | None = key(
        "its authors' weight of guidance; of two experts one each, that of high noise levels first", None,
        must=_GUIDANCE,
    )  # fmt: skip
    caption_dropout: float = key(
        "share of samples that it trains with the empty prompt; 0 for guidance-distilled models, which have no "
        "negative prompt", 0.1, must=within(0, 1),
    )  # fmt: skip

    @property
    def time(self) -> LatentTime:
        """How its VAE compresses time."""
        return LatentTime(self.vae[0], (self.vae_chunks[0], self.vae_chunks[1]) if self.vae_chunks else None)

    def grid(self, frames: int, height: int, width: int) -> VideoGrid:
        """The token grid of a clip of that size in pixels.

        Raises:
            RadialError: a size that the model cannot have, with the nearest that it can.
        """
        (_, *cell), patch = self.vae, self.patch
        return VideoGrid.from_pixels(
            frames,
            height,
            width,
            vae=(self.time.stride, cell[0], cell[1]),
            patch=(patch[0], patch[1], patch[2]),
            chunks=self.time.chunks,
        )

    def shift_at(self, height: int, width: int) -> float | None:
        """Its own noise shift for clips of this size in pixels; None where it has none."""
        fitting = [start for start in self.shifts if start <= min(height, width)]
        return self.shifts[max(fitting)] if fitting else None


@dataclass
class ClipConfig:
    """The clips to train on; shards may mix others, of which this is the largest."""

    frames: int = key("length of the video, before the VAE", MISSING, unit="frames", must=at_least(1))
    height: int = key("height of the video", MISSING, unit="pixels", must=at_least(1))
    width: int = key("width of the video", MISSING, unit="pixels", must=at_least(1))


@dataclass
class RunConfig:
    """A whole run."""

    conf: str = key("the run file of conf/ that the run starts from", MISSING)
    seed: int = key("seeds the order of samples, their noise and the LoRA", 0, must=_SEEDS)
    runs: str = key("folder of the run folders, which are <runs>/<conf>/<time>", "runs", path=True, resume=True)
    model: ModelConfig = section(ModelConfig)
    clip: ClipConfig = section(ClipConfig)
    attention: AttentionConfig = section(AttentionConfig)
    lora: LoraSettings | None = section(LoraSettings)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    data: DataConfig = section(DataConfig)
    optim: OptimConfig = section(OptimConfig)
    trainer: TrainerConfig = section(TrainerConfig)
    parallel: ParallelConfig = section(ParallelConfig, resume=True)
    validation: ValidationConfig = section(ValidationConfig, resume=True)
    log: LogConfig = section(LogConfig, resume=True)
    report: ReportConfig = section(ReportConfig, resume=True)
    export: ExportConfig = section(ExportConfig, resume=True)

    def clips_at_once(self) -> float:
        """Clips in a micro-batch of all devices together."""
        return self.data.batch_size * self.trainer.nodes * self.trainer.devices / self.parallel.sequence

    def latent_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the configured clip in latent cells."""
        _, height, width = self.model.vae
        return self.model.time.latents(self.clip.frames), self.clip.height // height, self.clip.width // width

    def grid(self) -> VideoGrid:
        """The token grid of the configured clip."""
        return self.model.grid(self.clip.frames, self.clip.height, self.clip.width)

    def pattern(self) -> Pattern:
        """Which blocks attention keeps; with ``attention.share``, on the configured clip's grid.

        Raises:
            RadialError: an unknown name, or a value that it refuses.
        """
        attention = self.attention
        pattern = attention.made(self.model.rule)
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


KEYS: dict[str, Key] = keys_of(RunConfig)
"""Every key of a run by its dotted name."""


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
