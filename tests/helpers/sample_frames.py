"""``python -m train.sample`` that also writes the frames as they were before H.264, to ``frames.npy`` beside the video.

Of a tiny model's noise, H.264 makes something else at every change of the last digit.
"""

import sys
from pathlib import Path

import numpy as np

from train.sample.__main__ import main
from train.sample.video import VideoWriter

frames: list[np.ndarray] = []
add = VideoWriter.add


def add_and_keep(writer: VideoWriter, some: np.ndarray) -> None:
    frames.append(some)
    add(writer, some)


VideoWriter.add = add_and_keep  # type: ignore[method-assign]
(out,) = (Path(word.removeprefix("out=")) for word in sys.argv if word.startswith("out="))
main(sys.argv[1:])
if frames:  # on the rank that writes
    np.save(out.with_name("frames.npy"), np.concatenate(frames))
