"""What a user may set, and where the rest comes from: the LoRA's header, the model's conf, the released scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from radial import PATTERNS, Fitted, HeadMasks, RadialError, Random, Released, VideoGrid
from radial.backends import BACKENDS
from radial.cli.reader import guess, read_some
from radial.cli.settings import POSITIVE, POWER_OF_TWO, Bound, at_least, check_value, setting, text_of
from radial.errors import Mistake
from radial.patterns import RULES
from train.attention.recipe import AttentionRecipe
from train.config.check import check_model
from train.config.compose import compose_run
from train.config.schema import ROPE_KINDS, ModelConfig
from train.config.sections import AttentionConfig
from train.errors import UserError
from train.lora import file_checks as loras
from train.sample import noise_levels

_UNTRAINED = AttentionConfig()
"""What attention has where neither the user nor a LoRA's header says so."""
_SEEDS = Bound("at least 0 and less than 2 to the 64th", lambda value: 0 <= value < 2**64)
_OF_ONE_PATTERN = ("reach", "per_head")  # a header's are of its own pattern, and mean nothing for another
_DECAYING = (Released.name, Random.name)  # what rule and decay count for
_OF_THE_MODEL = ("rope", "rule")  # which a LoRA's header has too: what is typed goes before it
_EXPERTS = ("lora_2", "add_2", "guidance_2")  # what only a model of two experts has


@dataclass(frozen=True)
class Settings:
    """The settings of one run of ``python -m train.sample``. What is None is filled in by `complete`."""

    prompt: str | None = setting("what to show", None)
    prompts: Path | None = setting("many: a file with a prompt a line, or .jsonl with prompt, negative, image", None)
    negative: str | None = setting("what not to show, with guidance above 1 (Wan: its authors' words)", None)
    image: Path | None = setting("first frame, for image-to-video models; cut to the clip's shape", None)
    out: Path | None = setting("the video; with prompts a folder (clip.mp4, clips)", None)
    frames: int | None = setting("length (the LoRA's, else the model's)", None, must=at_least(1))
    height: int | None = setting("pixels (the LoRA's, else the model's)", None, must=at_least(1))
    width: int | None = setting("pixels (the LoRA's, else the model's)", None, must=at_least(1))
    fps: float | None = setting("pace (the model's)", None, must=POSITIVE)
    steps: int | None = setting("denoising steps (the model's)", None)
    guidance: float | None = setting("weight of guidance; 1 is off (the model's)", None, must=POSITIVE)
    guidance_2: float | None = setting("of the expert for low noise levels (guidance, else the model's)", None,
                                      must=POSITIVE)  # fmt: skip
    shift: float | None = setting("of the noise levels (the LoRA's, else the model's at this size)", None,
                                  must=POSITIVE)  # fmt: skip
    seed: int = setting("of the noise", 0, must=_SEEDS)
    lora: str | None = setting(
        "the LoRA: file or folder, with :strength; an export's folder has both experts'", None, path=True
    )
    lora_2: str | None = setting("that of the expert for low noise levels; none for none", None, path=True)
    add: str | None = setting("further LoRAs: style.safetensors:0.8,few_step.safetensors", None, path=True)
    add_2: str | None = setting("the same for the expert for low noise levels", None, path=True)
    pattern: str | None = setting(f"attention: {', '.join(PATTERNS)} (the LoRA's, else {_UNTRAINED.pattern})", None)
    rule: str | None = setting(f"of released: {', '.join(RULES)} (the LoRA's, else the model's)", None)
    decay: float | None = setting(f"of released (the LoRA's, else {_UNTRAINED.decay:g})", None)
    reach: float | None = setting("of the patterns that have one (the LoRA's, else the pattern's own)", None)
    per_head: bool | None = setting(
        f"of random: a draw for each head of each layer (the LoRA's, else {text_of(_UNTRAINED.per_head)})", None
    )
    masks: Path | None = setting("of fitted: masks that fit the model (those beside the LoRA)", None)
    block: int | None = setting(f"tokens of a block (the LoRA's, else {_UNTRAINED.block})", None, must=POWER_OF_TWO)
    dense_layers: int | None = setting(
        f"first layers that stay dense (the LoRA's, else {_UNTRAINED.dense_layers})", None, must=at_least(0)
    )
    dense_steps: int | None = setting("first steps that stay dense (else dense_sigma)", None, must=at_least(0))
    dense_sigma: float | None = setting(
        "noise level from which on steps stay dense (the LoRA's, whatever the steps; else "
        f"{noise_levels.DENSE_STEPS} steps)", None,
    )  # fmt: skip
    rope: str | None = setting(
        "temporal positions past the native length (the LoRA's, else the model's own)", None, ROPE_KINDS
    )
    backend: str | None = setting("attention backend", None, tuple(BACKENDS))
    compare: str | None = setting("dense: generate with dense attention too, and compare", None, ("dense",))
    sequence: int | None = setting("GPUs that share a clip's tokens (with torchrun: as many as there are)", None,
                                  must=at_least(1))  # fmt: skip
    split_guidance: bool | None = setting("half of the GPUs take the negative prompt (with torchrun: yes)", None)
    offload: str = setting(
        "model: the transformer only while it runs; layer: its layers one by one", "none", ("none", "model", "layer")
    )
    tiled: bool | None = setting("decode frames in squares: less memory (the model's own way)", None)
    compile: bool = setting("compile the transformer's layers", False)
    dtype: str = setting("the transformer's numbers", "bf16", ("bf16", "fp32"))


def parse_settings(words: Sequence[str]) -> tuple[Settings, ModelConfig]:
    """Reads the command line; ``model=`` and ``model.*`` are those of a training run.

    Raises:
        UserError, DataError: an unknown key, a wrong value, settings that do not fit together.
    """
    return settled(*read_some(Settings, words))


def settled(settings: Settings, others: dict[str, str]) -> tuple[Settings, ModelConfig]:
    """The settings with every value filled in, and the model that ``model`` and ``model.*`` among the others name.

    Raises:
        UserError, DataError: an unknown key, settings that do not fit together.
    """
    for key in others:
        if key != "model" and not key.startswith("model."):
            names = [field.name for field in fields(Settings)]
            raise UserError(f"{key} is not a known key{guess(key, names) or ' (see --help)'}")
    if "model" not in others:
        raise UserError("model is not set, give one of conf/model such as model=wan_14b, and model.path=<folder>")
    config = OmegaConf.to_object(compose_run({"conf": "wan_4x", **others}).model)
    assert isinstance(config, ModelConfig)
    for name in _OF_THE_MODEL:
        if f"model.{name}" in others and getattr(settings, name) is None:
            settings = replace(settings, **{name: getattr(config, name)})
    settings = complete(settings, config)
    recipe = recipe_of(settings)
    if isinstance(recipe.pattern, Fitted):  # of an extended pipeline only its calls know the size
        try:
            recipe.pattern.masks.about.check_grid(grid(settings, config), recipe.block)
        except RadialError as error:
            raise UserError(str(error)) from error
    return settings, config


def complete(settings: Settings, model: ModelConfig) -> Settings:
    """The settings with every value filled in, and checked.

    Raises:
        UserError: naming the key.
    """
    if (settings.prompt is None) == (settings.prompts is None):
        raise UserError("give prompt=TEXT, or --prompts FILE for many: one of them")
    check_model(model)
    _check_each(settings)
    if settings.dense_steps is not None and settings.dense_sigma is not None:
        raise UserError("dense_steps and dense_sigma are both set, expected one: each says which steps stay dense")
    if model.expert is None:
        for name in _EXPERTS:
            if getattr(settings, name) is not None:
                raise UserError(f"{name} is for the second of two experts, the model has one transformer: leave it out")
    else:
        lora, lora_2 = loras.of_experts(settings.lora, settings.lora_2)
        settings = replace(settings, lora=lora, lora_2=lora_2)
    found = slots(settings, model)
    loras.check(found, model)
    unset = [f.name for f in fields(Settings) if getattr(settings, f.name) is None]
    trained = loras.header_settings(found, unset, model)
    pattern = settings.pattern or trained.get("pattern") or (Fitted.name if settings.masks else _UNTRAINED.pattern)
    alike = ["pattern", "block", "dense_layers", "rope", *(("rule", "decay") if pattern in _DECAYING else ())]
    if loras.header_settings(found, ["pattern"], model).get("pattern") == pattern:
        alike += _OF_ONE_PATTERN
    else:
        trained = {name: value for name, value in trained.items() if name not in _OF_ONE_PATTERN}
    loras.check_alike(found, [name for name in alike if name in unset])
    if pattern == Fitted.name:
        settings = replace(settings, masks=loras.masks_of(found, model, settings.masks))
    from train.models.families import family_of  # takes seconds to import

    family = family_of(model)
    size: list[Any] = list(model.native_size or (None, None))
    guidance = (model.guidance or []) if settings.guidance is None else []  # what is given is for both experts
    fallback: dict[str, Any] = {
        "out": Path("clip.mp4" if settings.prompts is None else "clips"),
        "frames": model.native_frames,
        "height": size[0],
        "width": size[1],
        "fps": model.fps,
        "steps": model.steps,
        "guidance": guidance[0] if guidance else None,
        "guidance_2": guidance[1] if len(guidance) == 2 else None,
        "pattern": pattern,
        "rule": model.rule,
        "decay": _UNTRAINED.decay,
        "per_head": _UNTRAINED.per_head,
        "block": _UNTRAINED.block if settings.masks is None else _block_of(settings.masks),
        "dense_layers": _UNTRAINED.dense_layers,
        "rope": model.rope,
        "tiled": family.decodes_tiled,
    }
    for name in ("frames", "height", "width", "fps"):
        if (getattr(settings, name) or trained.get(name) or fallback[name]) is None:
            raise UserError(f"{name} is not set, and neither the LoRA nor the model has one: set it")
    if settings.shift is None:
        height, width = (getattr(settings, n) or trained.get(n) or fallback[n] for n in ("height", "width"))
        header = loras.header_settings(found, noise_levels.TRAINED, model)
        trained |= noise_levels.at_size(header, height, width, model)
    trained |= noise_levels.dense_side(
        {name: getattr(settings, name) for name in ("dense_steps", "dense_sigma")}, trained
    )
    filled = {
        f.name: trained.get(f.name, fallback.get(f.name)) for f in fields(Settings) if getattr(settings, f.name) is None
    }
    settings = replace(settings, **{key: value for key, value in filled.items() if value is not None})
    for name in ("steps", "guidance"):
        if getattr(settings, name) is None:
            raise UserError(f"{name} is not set, and the model has none of its own (model.{name}): set it")
    if settings.negative is None:
        guided = family.takes_negative(settings.guidance or 1.0)
        settings = replace(settings, negative=family.negative_of(model) if guided else "")
    if settings.shift is None:
        assert settings.height and settings.width
        settings = replace(settings, shift=model.shift_at(settings.height, settings.width))
    _check(settings, model)
    return settings


def _block_of(masks: Path) -> int:
    try:
        return HeadMasks.read(masks).about.block
    except RadialError as error:
        raise UserError(str(error)) from error


def slots(settings: Settings, model: ModelConfig) -> list[loras.Slot]:
    """The LoRAs of each transformer."""
    first = loras.Slot("lora", None if model.expert is None else "high", settings.lora, settings.add)
    if model.expert is None:
        return [first]
    return [first, loras.Slot("lora_2", "low", settings.lora_2, settings.add_2)]


def _check_each(settings: Settings) -> None:
    """Holds each value to its own choices and bounds: those of a program, and those of a LoRA's header too."""
    try:
        for field in fields(Settings):
            check_value(field.name, field, getattr(settings, field.name))
    except Mistake as error:
        raise UserError(str(error)) from None


def _check(settings: Settings, model: ModelConfig) -> None:
    grid(settings, model)
    from train.models.families import family_of  # takes seconds to import
    from train.models.loading import temporal_rope  # takes seconds to import

    temporal_rope(replace(model, rope=str(settings.rope)))
    recipe_of(settings)
    _check_each(settings)
    fewest = family_of(model).fewest_steps
    if settings.steps is not None and settings.steps < fewest:
        raise UserError(f"steps is {settings.steps}, expected at least {fewest}")
    family_of(model).check_guidance("guidance", settings.guidance)
    if settings.guidance is not None and settings.guidance <= 1 and settings.guidance_2 not in (None, 1):
        raise UserError(
            f"guidance is {settings.guidance:g}, which turns it off for both experts: leave guidance_2 out, or set "
            "guidance above 1"
        )
    if settings.compare is not None and settings.pattern == "dense":
        raise UserError("compare=dense with pattern=dense has nothing to compare: choose another pattern, or one clip")
    if settings.image is not None and not settings.image.is_file():
        raise UserError(f"image {settings.image} is missing")


def recipe_of(settings: Settings) -> AttentionRecipe:
    """The attention of complete settings.

    Raises:
        UserError: a pattern, a rule or a decay that is none.
    """
    assert settings.decay is not None and settings.block is not None and settings.dense_layers is not None
    try:
        pattern = AttentionConfig(
            pattern=str(settings.pattern),
            decay=settings.decay,
            reach=settings.reach,
            per_head=bool(settings.per_head),
            masks=None if settings.masks is None else str(settings.masks),
        ).made(str(settings.rule))
    except RadialError as error:
        raise UserError(str(error)) from error
    return AttentionRecipe(
        pattern=pattern,
        block=settings.block,
        dense_layers=settings.dense_layers,
        dense_sigma=settings.dense_sigma,
        dense_steps=settings.dense_steps,
        backend=settings.backend,
    )


def size_of(settings: Settings) -> tuple[int, int]:
    """Width and height of the clip."""
    assert settings.width and settings.height
    return settings.width, settings.height


def grid(settings: Settings, model: ModelConfig) -> VideoGrid:
    """The token grid of the clip.

    Raises:
        UserError: a size that the model cannot have, with the nearest that it can.
    """
    assert settings.frames and settings.height and settings.width
    try:
        return model.grid(settings.frames, settings.height, settings.width)
    except RadialError as error:
        raise UserError(str(error)) from error
