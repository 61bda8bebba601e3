"""What is wrong with a generated clip that its loss does not show: loops, stills, jumps, drifting colours.

All measures are taken on an array of frames, (C, F, H, W): a latent of the model's own VAE or RGB pixels, of any scale.
They need no weights and no download. A frame-wise array of pixels, (F, H, W, 3), is given as ``permute(3, 0, 1, 2)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW = 4
"""Frames of the windows that are compared, in clips that are long enough."""
STILL = 0.003
"""A step from one frame to the next is still below this share of what two unrelated frames differ by."""


@dataclass(frozen=True)
class ClipMeasures:
    """The measures of one clip.

    Attributes:
        repetition: share of the later frames that an earlier stretch explains, `repetition`.
        frozen: share of the steps between frames in which nothing moves, `frozen`.
        consistency: how alike neighbouring frames are, `consistency`.
        worst_step: the same of the two neighbours that are least alike: a cut or a jump.
        drift: of the mean colour from the first stretch to the last, `colour_drift`.
        trend: the part of it that is steady, `colour_trend`.
    """

    repetition: float
    frozen: float
    consistency: float
    worst_step: float
    drift: float
    trend: float


def measure_clip(frames: Tensor, native: int | None = None) -> ClipMeasures:
    """All measures of a clip.

    Args:
        frames: (C, F, H, W), at least 4 frames.
        native: frames of the length that the model was made for: repetition is asked for beyond it; by default, and for
            clips that are not longer than twice that, beyond the first half.

    Raises:
        ValueError: fewer than 4 frames, or values that are not finite.
    """
    steps = step_consistency(frames)
    return ClipMeasures(
        repetition(frames, native),
        frozen(frames),
        steps.mean().item(),
        steps.min().item(),
        colour_drift(frames),
        colour_trend(frames),
    )


def repetition(frames: Tensor, native: int | None = None) -> float:
    """The share of the later frames that an earlier stretch explains: 1 in a loop, near 0 where the clip goes on.

    Windows of ``w`` frames (`WINDOW`, at most a quarter of the clip) are compared by their mean squared distance
    ``d(s, t)``, after each frame's mean of each channel is taken out: a loop whose colours drift is still a loop. A
    window ``t`` repeats an earlier one ``s <= t - w`` as far as it is nearer to it than to the windows between the two:
    a clip that merely moves slowly is never nearer to what is further back. So::

        explained(t) = max over s of max(0, 1 - d(s, t) / median of d(u, t) over s < u < t)

    where the median of an even number is the lower of the two in the middle,
    averaged over the windows that start after frame ``min(native, F // 2)``. Where nothing moves between ``s`` and
    ``t`` the quotient has no meaning and counts as 0: stills are counted by `frozen`.

    Args:
        frames: (C, F, H, W).
        native: frames of the model's own length.

    Returns:
        A share in [0, 1].
    """
    still = STILL * _unrelated(frames)
    between = _frame_distances(frames - frames.double().mean(dim=(2, 3), keepdim=True))
    count = frames.shape[1]
    width = min(WINDOW, count // 4)
    starts = count - width + 1
    # the mean over a window is a mean along the diagonal
    distance = torch.stack([between[i : i + starts, i : i + starts] for i in range(width)]).mean(dim=0)
    first = min(native or count, count // 2)
    explained = []
    for t in range(first, starts):
        found = [0.0]
        for s in range(t - width + 1):
            typical = distance[s + 1 : t, t].median().item() if s + 1 < t else 0.0
            if typical > still:
                found.append(1 - distance[s, t].item() / typical)
        explained.append(max(found))
    return sum(explained) / len(explained)


def frozen(frames: Tensor) -> float:
    """The share of the steps between neighbouring frames in which nothing moves.

    A step is still when the mean squared difference of its frames is below `STILL` of the distance of two unrelated
    frames (`step_consistency`).

    Args:
        frames: (C, F, H, W).

    Returns:
        A share in [0, 1].
    """
    return (1 - step_consistency(frames) < STILL).double().mean().item()


def step_consistency(frames: Tensor) -> Tensor:
    """How alike each two neighbouring frames are: ``1 - |x[t+1] - x[t]|² / (2 v)``, means over channels and places.

    ``v`` is the variance of the clip's values about its channels' means, so ``2 v`` is the squared distance of two
    frames that have nothing in common: independent noise gives 0, a still 1.

    Args:
        frames: (C, F, H, W).

    Returns:
        (F - 1,) float64, at most 1; below 0 where neighbours are less alike than unrelated frames.
    """
    unrelated = _unrelated(frames)
    steps = (frames[:, 1:].double() - frames[:, :-1].double()).square().mean(dim=(0, 2, 3))
    return 1 - steps / unrelated if unrelated > 0 else torch.ones_like(steps)  # one flat colour throughout


def colour_drift(frames: Tensor) -> float:
    """How far the mean colour has gone from the first eighth of the clip to the last, in standard deviations.

    ``sqrt(mean over channels of (m_last - m_first)² / s²)``: ``m`` a channel's mean over the stretch, ``s²`` its mean
    variance within a frame. A clip of an even colour has no such unit; its drift is 0 or infinite.

    Args:
        frames: (C, F, H, W).
    """
    means, deviation = _channel_means(frames)
    stretch = max(1, frames.shape[1] // 8)
    gone = means[:, -stretch:].mean(dim=1) - means[:, :stretch].mean(dim=1)
    return _in_deviations(gone, deviation)


def colour_trend(frames: Tensor) -> float:
    """The colour drift that is steady: that of a straight line through the channels' means, from first to last frame.

    Least squares over the frames; the unit is that of `colour_drift`. A clip that wavers has a drift without a trend.

    Args:
        frames: (C, F, H, W).
    """
    means, deviation = _channel_means(frames)
    time = torch.arange(frames.shape[1], dtype=torch.float64)
    time -= time.mean()
    slope = (means * time).sum(dim=1) / time.square().sum()
    return _in_deviations(slope * (frames.shape[1] - 1), deviation)


def _channel_means(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's mean in each frame, (C, F), and its standard deviation within a frame, (C,), float64."""
    values = frames.double().cpu()
    return values.mean(dim=(2, 3)), values.var(dim=(2, 3), unbiased=False).mean(dim=1).sqrt()


def _in_deviations(difference: Tensor, deviation: Tensor) -> float:
    moved = difference != 0
    return (torch.where(moved, difference / deviation, 0.0)).square().mean().sqrt().item()


def _unrelated(frames: Tensor) -> float:
    """The mean squared distance of two frames with nothing in common: twice the variance about the channels' means."""
    if frames.ndim != 4 or frames.shape[1] < 4:
        raise ValueError(f"a clip is (C, F, H, W) with at least 4 frames, this one is {tuple(frames.shape)}")
    if not frames.isfinite().all():
        raise ValueError("the clip has values that are not finite")
    return 2 * frames.double().var(dim=(1, 2, 3), unbiased=False).mean().item()


def _frame_distances(frames: Tensor) -> Tensor:
    """The mean squared difference of each two frames: (F, F) float64 on the CPU. One channel at a time, for memory."""
    count = frames.shape[1]
    products = torch.zeros(count, count, dtype=torch.float64)
    for channel in frames:
        flat = channel.reshape(count, -1).double()
        products += (flat @ flat.T).cpu()
    squares = products.diagonal()
    return (squares[:, None] + squares[None] - 2 * products).clamp(min=0) / frames[:, 0].numel()
