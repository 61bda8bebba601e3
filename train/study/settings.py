"""What a user may set for ``python -m train.study``, and what it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from radial.cli.settings import POSITIVE, at_least, setting
from train.config.compose import compose_run, finish
from train.config.schema import RunConfig
from train.errors import UserError
from train.study.base import find_base
from train.study.fits import Fit, fits_of

RUN = "study_4x"
_OWN = (
    "attention", "attention.pattern", "attention.reach", "attention.share", "attention.per_head", "attention.masks",
    "rope", "model.rope", "seed", "model.path", "clip.frames", "resume",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The command's own keys; all others are those of a training run, the same in every row."""

    base: Path | None = setting(
        "the base model: a run folder of conf=study_base, or a folder in diffusers' format; null: the newest finished "
        "run of study_base, which is trained first if there is none", None, path=True,
    )  # fmt: skip
    rows: str = setting("all, or names of rows with commas, in the order in which they are measured", "all")
    seeds: str = setting("seeds of the tuned rows, with commas", "0,1,2")
    length: str = setting("how much longer the clips are made", "4x", ("2x", "4x"))
    held_out: int = setting("held-out clips of the losses", 32, must=at_least(4))
    sigmas: str = setting("noise levels of the losses, with commas", "0.3,0.6,0.8,0.95")
    clips: int = setting(
        "clips that each row generates, of the first seed's runs, from the first half of held-out clips; 0: none", 64,
        must=at_least(0),
    )  # fmt: skip
    at_once: int = setting("clips that are generated together", 4, must=at_least(1))
    sampling_steps: int = setting("denoising steps of these clips", 20, must=at_least(1))
    fitted: str = setting(
        "shares of the released mask's blocks at which masks are fitted to the base's own attention, with commas; each "
        "is a row, fitted_<share>. 0.6:1 draws all of the blocks, 0.6:0 none; half of them otherwise",
        "1,0.8,0.6,0.4,0.6:1",
    )
    masks: Path | None = setting(
        "folder with files of python -m radial fit, instead: each is a row, fitted_<name of the file>", None, path=True,
    )  # fmt: skip
    enough: float = setting(
        "a base is trained enough when its held-out loss at its own length is at most this share of what the colours "
        "of single pixels allow", 0.08, must=POSITIVE,
    )  # fmt: skip
    processes: int = setting(
        "rows that are trained, measured or generated at the same time, each in a process of its own, which takes one "
        "of the GPUs in turn: several small models fill one", 1, must=at_least(1),
    )  # fmt: skip
    minutes: float = setting("ends in an orderly way before so long has passed; 0: when all is done", 0.0,
                             must=at_least(0))  # fmt: skip
    out: Path | None = setting("folder of the study (<runs>/study/<the base's name>-<length>)", None, path=True)


@dataclass(frozen=True)
class Job:
    """All that is to be done.

    Attributes:
        given: the command's own settings.
        words: the settings of a run that every row shares, as typed.
        config: the run of the row ``released`` with the first seed.
        base: folder of the base model, in diffusers' format; None as long as it is to be trained.
        masks: that are fitted to the base; none where ``masks=`` names a folder.
        seeds, sigmas: at least one each.
        lengths: frames at 1x, 2x and so on, the longest last.
        out: folder of the study.
    """

    given: Settings
    words: dict[str, str]
    config: RunConfig
    base: Path | None
    masks: tuple[Fit, ...]
    seeds: tuple[int, ...]
    sigmas: tuple[float, ...]
    lengths: dict[str, int]
    out: Path

    @classmethod
    def made_of(cls, given: Settings, others: dict[str, str]) -> Job:
        """The job of the command's own settings and those of a run.

        Raises:
            UserError: a value that is not possible, or what ``base=`` names is no base model.
        """
        for key in _OWN:
            if key in others:
                raise UserError(f"{key} is set by the study, row by row: leave it out, and choose rows with rows=")
        words = {"conf": RUN, **others}
        base = find_base(given.base, Path(words.get("runs", "runs")))
        if base is not None:
            words["model.path"] = str(base)
        first = finish(compose_run(words))
        native = first.model.native_frames
        if native is None or given.length not in first.model.longer:
            raise UserError(f"length is {given.length}, and the model has no such length (model.longer)")
        words["clip.frames"] = str(first.model.longer[given.length])
        reached = {name: n for name, n in first.model.longer.items() if n <= first.model.longer[given.length]}
        seeds = _numbers("seeds", given.seeds, int, "whole numbers from 0", lambda x: x >= 0)
        sigmas = _numbers("sigmas", given.sigmas, float, "noise levels between 0 and 1", lambda x: 0 < x < 1)
        config = finish(compose_run({**words, "seed": str(int(seeds[0]))}))
        if config.data.synthetic_scenes != "memory":
            raise UserError("data.synthetic_scenes is sunrise, the study measures the truth of memory: leave it out")
        if config.data.places:
            raise UserError("data.shards is given, the study needs clips whose truth it knows, its own: leave it out")
        for key in ("devices", "nodes"):
            if (count := getattr(config.trainer, key)) > 1:
                raise UserError(
                    f"trainer.{key} is {count}, and each row is trained by one process: leave it out; with processes= "
                    "several rows are trained at the same time, on all GPUs of a machine"
                )
        name = "base" if base is None else base.parent.parent.name if base.name == "model" else base.name
        return cls(
            given=given,
            words=words,
            config=config,
            base=base,
            masks=fits_of(given.fitted) if given.masks is None else (),
            seeds=tuple(int(seed) for seed in seeds),
            sigmas=sigmas,
            lengths={"1x": native, **dict(sorted(reached.items(), key=lambda item: item[1]))},
            out=given.out or Path(config.runs) / "study" / f"{name}-{given.length}",
        )

    @property
    def frames(self) -> int:
        """Frames of the lengthened clips."""
        return self.config.clip.frames


def _numbers(key: str, text: str, kind: type, expected: str, fits: object) -> tuple[float, ...]:
    """Numbers with commas between them, in their order."""
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found) or not (callable(fits) and all(fits(number) for number in found)):
        raise UserError(f"{key} is {text!r}, expected {expected}, each once, with commas")
    return tuple(found)
