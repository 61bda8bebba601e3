"""What a user may set for ``python -m train.evaluate``, and what it stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from data.errors import DataError
from data.io.lines import lines_of, read_utf8
from radial import Pattern, RadialError
from radial.cli.settings import POSITIVE, at_least, setting
from radial.patterns.ultravico import UltraViCo
from train.config.compose import read_config
from train.config.schema import RunConfig
from train.config.sections import AttentionConfig
from train.errors import UserError
from train.lora.file_lists import files_with_strengths
from train.measures.euler import guidance_of_experts
from train.models.families import family_of

TIMES = (1, 2, 4)
TUNED, BASE = "tuned", "base"


@dataclass(frozen=True)
class Settings:
    """The command's keys."""

    run: Path = setting("a run folder: its model, attention, temporal positions and newest checkpoint")
    lora: str | None = setting("a LoRA in any format, with :strength, instead of the run's", None, path=True)
    prompts: Path | None = setting(
        "a file with a prompt a line, whose clips are generated; null: the captions of the first held-out clips", None
    )
    shards: str | None = setting(
        "held-out clips; null: the run's validation.shards, or synthetic ones where it trained on such", None, path=True
    )
    against: str | None = setting(
        "controls without a LoRA, with commas: base has the run's own attention, dense, released, the other "
        "patterns and ultravico their own; null: none", "base,dense,released",
    )  # fmt: skip
    lengths: str | None = setting(
        "lengths in multiples of the model's own, with commas; null: those of 1,2,4 that are not above the run's", None
    )
    held_out: int = setting("held-out clips whose loss is measured, the first ones", 16, must=at_least(2))
    clips: int = setting("clips that are generated where prompts is not set; 0: none", 4, must=at_least(0))
    steps: int | None = setting("denoising steps; null: the model's own", None, must=at_least(1))
    guidance: float | None = setting("weight of guidance; null: the model's own", None, must=POSITIVE)
    seed: int = setting("of the noise of generated clips", 0, must=at_least(0))
    clip: Path | None = setting(
        "folder of a CLIP of transformers: how well frames fit their prompt; null: not measured", None
    )
    out: Path | None = setting("folder for the results; null: evaluation in the run's folder", None)


@dataclass(frozen=True)
class Variant:
    """One row: a model and its attention.

    Attributes:
        name: in tables.
        tuned: with the LoRA, or the trained weights.
        pattern: instead of the run's own; None: the run's own.
    """

    name: str
    tuned: bool
    pattern: Pattern | None = None

    @property
    def what(self) -> str:
        """What finished parts are found by: two commands may give one name to two patterns."""
        return f"{self.name} {self.pattern!r}"


@dataclass(frozen=True)
class Length:
    """A length of clips: so many times the model's own, in pixel frames and in latents."""

    times: int
    frames: int
    latents: int


@dataclass(frozen=True)
class Job:
    """All that is to be done.

    Attributes:
        given: the settings, with steps, guidance and out filled in.
        config: of the run, for one process.
        variants: the controls, then the tuned model.
        lengths: rising.
        native: latent frames of the model's own length.
        lora: a LoRA file with its strength instead of the run's own.
        prompts: texts; empty: captions of held-out clips are taken.
        guidance: its weight; of two experts one each, that of high noise levels first.
    """

    given: Settings
    config: RunConfig
    variants: tuple[Variant, ...]
    lengths: tuple[Length, ...]
    native: int
    lora: tuple[Path, float] | None
    prompts: tuple[str, ...]
    steps: int
    guidance: tuple[float, ...]
    out: Path

    @classmethod
    def of(cls, given: Settings) -> Job:
        """The job of the command's settings.

        Raises:
            UserError: no run, or a value that is not possible.
        """
        config = read_config(given.run)
        config = replace(config, parallel=replace(config.parallel, sequence=1))
        loras = [] if given.lora is None else files_with_strengths("lora", given.lora)
        if len(loras) > 1:
            raise UserError(f"lora is {given.lora!r}, expected one file, with :strength if wanted")
        lora = loras[0] if loras else None
        if lora is not None and config.model.expert == "both":
            raise UserError("lora is one transformer's, the run's model has two: leave it out, the run's own is taken")
        model, report = config.model, config.report
        family_of(model).check_guidance("guidance", given.guidance)
        own = guidance_of_experts(config, model.guidance or [report.guidance])
        return cls(
            given=given,
            config=config,
            variants=variants(config, given.against),
            lengths=_lengths(config, given.lengths),
            native=_lengths(config, "1")[0].latents,
            lora=lora,
            prompts=() if given.prompts is None else _prompts(given.prompts),
            steps=given.steps or model.steps or report.sampling_steps,
            guidance=(given.guidance,) if given.guidance else tuple(own),
            out=given.out or given.run / "evaluation",
        )


def variants(config: RunConfig, against: str | None) -> tuple[Variant, ...]:
    """The controls that ``against`` names, each pattern once, then the run's own model.

    Raises:
        UserError: an unknown pattern.
    """
    own = config.pattern()
    found: dict[Pattern | None, Variant] = {}
    for word in () if against is None else against.split(","):
        pattern: Pattern | None = None
        if word == UltraViCo.name:
            pattern = UltraViCo(float(_lengths(config, "1")[0].latents))
        elif word != BASE:
            attention = AttentionConfig(word, rule=config.attention.rule, decay=config.attention.decay)
            try:
                pattern = attention.made(config.model.rule)
            except RadialError as error:
                raise UserError(f"against has {word!r}: {error}, {UltraViCo.name} or {BASE}") from error
            pattern = None if pattern == own else pattern
        words = config.pattern_in_words()
        name = words if pattern is None else pattern.name + " as it is by default" * (pattern.name == words)
        found.setdefault(pattern, Variant(f"{BASE}, {name}", False, pattern))
    return (*found.values(), Variant(f"{TUNED}, {config.pattern_in_words()}", True))


def _lengths(config: RunConfig, text: str | None) -> tuple[Length, ...]:
    native = config.model.native_frames
    if native is None:
        raise UserError("the run's model has no native length (model.native_frames), of which lengths are multiples")
    if text is None:
        found = [_length(config, times, native) for times in TIMES]
        return tuple(one for one in found if one.frames <= config.clip.frames) or (Length(1, native, found[0].latents),)
    words = text.split(",")
    if not all(word.isdigit() and int(word) for word in words):
        raise UserError(f"lengths is {text!r}, expected multiples of the model's own length such as 1,2,4")
    return tuple(_length(config, times, native) for times in sorted({int(word) for word in words}))


def _length(config: RunConfig, times: int, native: int) -> Length:
    time = config.model.time
    plain = times * native if time.step == 1 else times * (native - time.rest) // time.step * time.step + time.rest
    frames = native if times == 1 else config.model.longer.get(f"{times}x", plain)
    return Length(times, frames, time.latents(frames))


def _prompts(file: Path) -> tuple[str, ...]:
    try:
        found = tuple(line.strip() for line in lines_of(read_utf8(file)) if line.strip())
    except OSError as error:
        raise UserError(f"prompts {file} cannot be read: {error.strerror}") from error
    except DataError as error:
        raise UserError(f"prompts {error}") from error
    if not found:
        raise UserError(f"prompts {file} is empty, expected a prompt a line")
    return tuple(dict.fromkeys(found))
