"""Where one shot ends and the next begins, found while a video is decoded.

PySceneDetect judges: its AdaptiveDetector compares how much the content changes (hue, saturation and brightness) with
the frames before and behind, so that a fast camera is no cut, and its ThresholdDetector finds where a picture comes
back after a fade to black. Two frames that show the same in another light, as after a flash or when a lamp goes on, are
no cut, and neither are two that are nearly black, whose hue is noise. Slow dissolves are not found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ThresholdDetector

T = TypeVar("T")
Look = np.ndarray
"""A small picture of a frame, (H, W, 3) uint8 in the order blue, green, red."""

_WINDOW = 2  # frames before and behind with which a change is compared
_ALIKE = 0.85  # correlation of the brightness of two pictures from which they show the same in another light
_FAINT = 4.0  # levels of 255: pictures that differ by less on average are one, whatever their hues; cuts differ by 30
_RATE = 1000.0  # frames a second: any, as the detectors only count frames here


class Cuts:
    """Marks the frames of one video that begin a shot.

    Args:
        threshold: by how many levels of 255 hue, saturation and brightness have to change on average for a cut; lower
            finds more. It is AdaptiveDetector's `min_content_val`.
    """

    def __init__(self, threshold: float) -> None:
        self._content = AdaptiveDetector(min_scene_len=0, window_width=_WINDOW, min_content_val=threshold)
        self._fades = ThresholdDetector(min_scene_len=0, fade_bias=1.0)
        self._looks: deque[Look] = deque(maxlen=2 * _WINDOW + 2)  # the last ones, those around a cut among them
        self._count = 0
        self._cuts: set[int] = set()

    def __call__(self, frames: Iterable[tuple[T, Look]]) -> Iterator[tuple[T, Look, bool]]:
        """Each frame with its small picture and whether it begins a shot, `_WINDOW` frames later.

        What `frames` raises is raised behind the frames before it.
        """
        held: deque[tuple[T, Look]] = deque()
        source, failure = iter(frames), None
        while failure is None:
            try:
                item, look = next(source)
            except Exception as error:  # StopIteration among them
                failure = error
                break
            if not self._count:
                for _ in range(_WINDOW):  # the picture stood still before, so that the first frames are judged too
                    self._add(look)
            held.append((item, look))
            self._add(look)
            if len(held) > _WINDOW:
                yield *held.popleft(), self._count - 1 - _WINDOW in self._cuts
        if held:
            for _ in range(_WINDOW):  # the picture stands still at the end, so that the last frames are judged too
                self._add(held[-1][1])
        first = self._count - _WINDOW - len(held)
        for number, (item, look) in enumerate(held, first):
            yield item, look, number in self._cuts
        if not isinstance(failure, StopIteration):
            raise failure

    def _add(self, look: Look) -> None:
        """Show the detectors the next picture."""
        number = FrameTimecode(self._count, fps=_RATE)
        self._looks.append(look)
        self._count += 1
        self._cuts.update(cut.frame_num for cut in self._fades.process_frame(number, look))
        for cut in self._content.process_frame(number, look):
            place = len(self._looks) + cut.frame_num - self._count
            looks = list(self._looks)
            before, behind = looks[:place], looks[place:]
            if not any(_alike(one, other) for one in before for other in behind):  # a flash returns to what was there
                self._cuts.add(cut.frame_num)
        self._cuts = {cut for cut in self._cuts if cut >= self._count - 1 - 2 * _WINDOW}


def _alike(one: Look, other: Look) -> bool:
    """Whether two pictures show the same, brighter or darker."""
    if float(np.abs(one.astype(np.int16) - other).mean()) < _FAINT:
        return True
    first, second = (look.mean(axis=2).ravel() for look in (one, other))
    spread = float(first.std() * second.std())
    if spread < 1e-6:
        return False
    return float(((first - first.mean()) * (second - second.mean())).mean()) / spread > _ALIKE
