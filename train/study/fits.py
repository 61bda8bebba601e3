"""Which masks are fitted to the base's own attention; `train.study.masks` fits them."""

from __future__ import annotations

from dataclasses import dataclass

from train.errors import UserError

_HALF = 0.5


@dataclass(frozen=True)
class Fit:
    """One mask to be fitted.

    Attributes:
        share: of the released mask's blocks.
        coverage: of these blocks, the part that is drawn.
    """

    share: float
    coverage: float = _HALF

    @property
    def name(self) -> str:
        """Of its file, and after ``fitted_`` of its row."""
        return f"{self.share:g}" + ("" if self.coverage == _HALF else f"_drawn_{self.coverage:g}")


def fits_of(text: str) -> tuple[Fit, ...]:
    """The masks that ``fitted=`` names, those with the most blocks first; none where it is empty.

    Raises:
        UserError: something else stands there.
    """
    try:
        found = [Fit(*map(float, word.split(":"))) for word in text.split(",") if word]
    except (ValueError, TypeError):
        found = []
    right = all(fit.share > 0 and 0 <= fit.coverage <= 1 for fit in found) and len(set(found)) == len(found)
    if (text and not found) or not right:
        raise UserError(
            f"fitted is {text!r}, expected shares of the released mask's blocks above 0, each once, with commas, such "
            "as 1,0.6,0.6:1"
        )
    return tuple(sorted(found, key=lambda fit: (-fit.share, fit.coverage)))
