"""The base model: where it lies, and the sign by which it is trained enough to judge masks on.

A model that has learned little has no structure in its attention that a mask could keep: on one stopped early, blocks
drawn at random did better than every mask. The sign is the loss at the model's own length on held-out clips, beside
what is possible from the colours of single pixels alone. A pixel of variance s² (about the mean of all clips) seen at
noise level t leaves of its velocity, at best, by a linear guess::

    s² / ((1 - t)² s² + t²)

A base whose loss is above ``enough=`` times the mean of that over the noise levels is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train.errors import UserError
from train.storage.run_folder import get_state

BASE_RUN = "study_base"


@dataclass(frozen=True)
class BaseSign:
    """How far a base is.

    Attributes:
        loss: of held-out clips at its own length, the mean over the study's noise levels.
        pixels: what single pixels leave (the formula of this module).
        enough: largest share of it.
    """

    loss: float
    pixels: float
    enough: float

    @property
    def share(self) -> float:
        """The loss as a share of what single pixels leave."""
        return self.loss / self.pixels

    def __str__(self) -> str:
        return (
            f"held-out loss {self.loss:.4f} at its own length, {self.share:.1%} of the {self.pixels:.3f} that single "
            f"pixels leave; expected at most {self.enough:.1%}"
        )

    def check(self, base: Path) -> None:
        """Refuses a base that is not trained enough.

        Raises:
            UserError: in words.
        """
        if not self.share <= self.enough:  # a loss may be no number
            raise UserError(
                f"base {base} is not trained enough to judge masks: {self}. Masks keep structure that such a model "
                "does not have yet; train it for more steps, or set enough= to measure all the same"
            )


def pixels_leave(clips: Sequence[Tensor], sigmas: Sequence[float]) -> float:
    """What single pixels leave of the velocity, the mean over channels and noise levels.

    Args:
        clips: (C, F, H, W) each.
    """
    values = torch.stack([clip.float() for clip in clips]).double()
    variance = values.var(dim=(0, 2, 3, 4), unbiased=False)
    left = [variance / ((1 - sigma) ** 2 * variance + sigma**2) for sigma in sigmas]
    return float(torch.stack(left).mean())


def find_base(given: Path | None, runs: Path) -> Path | None:
    """The folder of the base model in diffusers' format; None where none is named and no run is finished yet.

    Args:
        given: what ``base=`` names.
        runs: where runs lie.

    Raises:
        UserError: what is named is no base model.
    """
    if given is None:
        done = [run for run in sorted((runs / BASE_RUN).glob("*")) if get_state(run)[0] == "done"]
        if not done:
            return None
        given = done[-1]
    for folder in (given, given / "export" / "model"):
        if (folder / "config.json").is_file():
            return folder
    state = get_state(given)[0]
    if (given / "config.yaml").is_file():
        raise UserError(f"base {given} is a run that is {state}, expected one that is done: resume it to its end")
    raise UserError(
        f"base {given} has neither a model's config.json nor export/model/config.json: leave base= out to have one "
        f"trained, or name the run folder of python -m train conf={BASE_RUN}"
    )
