"""``python -m train`` on whose rank 1 memory is full at ``FULL_AT``: while it loads, in a step, or in the report.

Lightning's observer of the ranks, which looks every five seconds, is in a hurry here: it must have nothing to see.
"""

from __future__ import annotations

import os
from typing import NoReturn

import lightning.fabric.strategies.launchers.subprocess_script as launcher
import torch

import train.assemble
import train.run
from train.__main__ import main
from train.step.module import LengthExtensionModule


def full(*_: object, **__: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.99 GiB. GPU 0 has ...")


def full_in_step_3(module: LengthExtensionModule, batch: object, index: int) -> torch.Tensor:
    return full() if module.trainer.global_step == 2 else training_step(module, batch, index)  # type: ignore[arg-type]


launcher._ChildProcessObserver.__init__.__defaults__ = (1.3,)
training_step = LengthExtensionModule.training_step
if os.environ.get("LOCAL_RANK") == "1":
    if os.environ["FULL_AT"] == "load":
        train.assemble.load_adapter = full
    elif os.environ["FULL_AT"] == "report":
        train.run.write_report = full
    else:
        LengthExtensionModule.training_step = full_in_step_3  # type: ignore[method-assign]
main.run()
