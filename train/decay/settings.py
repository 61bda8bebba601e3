"""What a user may set for ``python -m train.decay``, and what it stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from radial import Released
from radial.cli.reader import read_some
from radial.cli.settings import Bound, at_least, setting
from train.attention.recipe import AttentionRecipe
from train.config.compose import compose_run, finish
from train.config.schema import RunConfig
from train.decay.bins import Blocks, Tiling
from train.errors import UserError

T = TypeVar("T", int, float)
_ERROR = Bound("a number between 0 and 1, such as 0.1", lambda value: 0 < value < 1)
LONGER = ("2x", "4x")


@dataclass(frozen=True)
class Settings:
    """The command's own keys; all others are those of a training run."""

    clips: int = setting("clips that are measured", 4, must=at_least(1))
    sigmas: str = setting("noise levels, with commas", "0.3,0.6,0.9")
    layers: str = setting("layers that are looked at: all, or numbers from 0 such as 0,5,10", "all")
    frames: str = setting("length of the clips: native, 2x, 4x, or a number of latent frames", "native")
    attention: str = setting("patterns held against dense attention: options of attention=, with commas", "radial")
    masks: str | None = setting(
        "files of python -m radial fit dense_layers=0, with commas: fitted patterns that are held against dense "
        "attention too",
        None,
    )
    decays: str = setting("decay factors at which a released pattern is tried", "0.5,1,2")
    dense_layers: str = setting("numbers of first layers left dense that are tried", "0,2")
    rows: int = setting("query rows sampled in each tile of each frame; at least 2", 4, must=at_least(2))
    tile: str = setting(
        "tokens of a tile: strip (as many as a block has, in raster order), patch (as many, compact), or HxW such as "
        "8x16; masks are fitted to strips or patches",
        "patch",
    )
    error: float = setting("relative error of the velocity that the advice stays under", 0.1, must=_ERROR)
    out: Path | None = setting("folder for the results (<runs>/decay/<model>-<frames>)", None)


@dataclass(frozen=True)
class Candidate:
    """A pattern that is held against dense attention.

    Attributes:
        name: in tables.
        recipe: of its attention, in all layers and at all noise levels.
    """

    name: str
    recipe: AttentionRecipe


@dataclass(frozen=True)
class Job:
    """All that is to be done.

    Attributes:
        config: model, shards, seed and attention of a run.
        model: the word that ``model=`` named.
        sigmas: rising.
        layers: numbers of layers; None for all.
        frames: latent frames of the clips.
        length: the word for them.
        candidates: patterns.
        dense_layers: how many first layers stay dense, each tried with each pattern.
    """

    config: RunConfig
    model: str
    clips: int
    sigmas: tuple[float, ...]
    layers: tuple[int, ...] | None
    frames: int
    length: str
    candidates: tuple[Candidate, ...]
    dense_layers: tuple[int, ...]
    rows: int
    tiling: Tiling | Blocks
    error: float
    out: Path

    @classmethod
    def of(cls, words: Sequence[str]) -> Job:
        """The job of a command line.

        Raises:
            UserError, DataError: an unknown key, or a value that is not possible.
        """
        return cls.made_of(*read_some(Settings, words))

    @classmethod
    def made_of(cls, given: Settings, rest: dict[str, str]) -> Job:
        """The job of the command's own settings and those of a run.

        Raises:
            UserError, DataError: a value that is not possible.
        """
        if "conf" not in rest and "model" in rest and not rest["model"].startswith("shapes"):
            rest["conf"] = "wan_4x"  # of which the model is replaced, and attention has blocks of 128
        # with the first option already, since attention.per_head and the like are not every pattern's
        config = finish(compose_run({**rest, "attention": given.attention.split(",")[0]}))
        sigmas = _numbers("sigmas", given.sigmas, float, "noise levels between 0 and 1", lambda x: 0 < x < 1)
        layers = None
        if given.layers != "all":
            layers = _numbers("layers", given.layers, int, "all, or numbers of layers from 0", lambda x: x >= 0)
        dense = _numbers("dense_layers", given.dense_layers, int, "numbers of layers from 0", lambda x: x >= 0)
        decays = _numbers("decays", given.decays, float, "positive numbers", lambda x: x > 0)
        model, length = rest.get("model", config.conf), given.frames
        return cls(
            config=config,
            model=model,
            clips=given.clips,
            sigmas=sigmas,
            layers=layers,
            frames=_latent_frames(config, length),
            length=length,
            candidates=_candidates(rest, given.attention, decays, given.masks),
            dense_layers=dense,
            rows=given.rows,
            tiling=_tiling(given.tile, config.attention.block),
            error=given.error,
            out=given.out or Path(config.runs) / "decay" / f"{model}-{length}",
        )


def _numbers(key: str, text: str, kind: type[T], expected: str, fits: Callable[[T], bool]) -> tuple[T, ...]:
    """Numbers with commas between them, rising, each once."""
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(fits(number) for number in found):
        raise UserError(f"{key} is {text!r}, expected {expected}, with commas")
    return tuple(sorted(set(found)))


def _latent_frames(config: RunConfig, length: str) -> int:
    """The latent frames that ``frames=`` names."""
    if length == "native":
        if config.model.native_frames is None:
            raise UserError("frames is native, and the model has no native length (model.native_frames): give a number")
        return config.model.time.latents(config.model.native_frames)
    if length in LONGER:
        if length not in config.model.longer:
            raise UserError(f"frames is {length}, and the model has no such length (model.longer): give a number")
        return config.model.time.latents(config.model.longer[length])
    if not length.isdigit() or int(length) < 3:
        raise UserError(f"frames is {length!r}, expected native, {', '.join(LONGER)}, or 3 latent frames or more")
    return int(length)


def _candidates(
    settings: dict[str, str], options: str, decays: Sequence[float], masks: str | None
) -> tuple[Candidate, ...]:
    found = []
    for option in options.split(","):
        config = finish(compose_run({**settings, "attention": option}))
        recipe = replace(AttentionRecipe.of(config), dense_layers=0)
        if isinstance(recipe.pattern, Released):
            for decay in decays:
                pattern = replace(recipe.pattern, decay=decay)
                found.append(Candidate(f"{option}, decay {decay:g}", recipe.under(pattern)))
        else:
            found.append(Candidate(option, recipe))
    theirs = ("attention.share", "attention.reach", "attention.per_head", "attention.masks")  # of other patterns
    others = {key: value for key, value in settings.items() if key not in theirs}
    for file in masks.split(",") if masks else ():
        config = finish(compose_run({**others, "attention": "fitted", "attention.masks": file}))
        found.append(Candidate(f"fitted, {Path(file).stem}", replace(AttentionRecipe.of(config), dense_layers=0)))
    names = [candidate.name for candidate in found]
    if len(set(names)) < len(names):
        raise UserError(
            f"attention is {options!r} and masks {masks!r}, expected each option once, and files of other names"
        )
    return tuple(found)


def _tiling(text: str, block: int) -> Tiling | Blocks:
    if text in ("strip", "patch"):
        return Blocks("raster" if text == "strip" else "patches", block)
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if sides is None:
        raise UserError(f"tile is {text!r}, expected strip, patch, or rows x columns of tokens such as 8x16")
    return Tiling(int(sides[1]), int(sides[2]))
