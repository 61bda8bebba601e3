"""``python -m launch local``: a run on this machine."""

from __future__ import annotations

import os
import sys

from launch.plan import show_plan
from launch.prepare import layout, prepare
from launch.records import record
from train.config.compose import split_arguments
from train.errors import UserError
from train.planning import this_machine

USAGE = """python -m launch local [conf=RUN] [gpus=N] [key=value ...]
python -m launch local resume=<run folder> [gpus=N]

Makes the run's folder, stores its plan there, and trains with N processes, one a GPU.
Ctrl-C once: a checkpoint is saved, and the same with resume= goes on; twice: at once.

  gpus=N         1 by default; on a machine without GPUs, N processes on its CPU
  key=value      of the run, as for python -m train; python -m train -m runs a sweep on this machine

example:
  python -m launch local conf=wan_4x gpus=2 model.path=weights/wan_14b data.shards=shards/openvid_4x
"""


def main(arguments: list[str]) -> None:
    """Prepares the folder, then becomes ``python -m train``."""
    settings = split_arguments(arguments)
    nodes, devices = layout(settings, "nodes"), layout(settings, "gpus")
    if nodes not in (None, 1):
        raise UserError(f"nodes is {nodes}, expected 1: launch local is for this machine, launch slurm for several")
    if "resume" not in settings:
        devices = devices or 1
    folder, config = prepare(settings, 1 if devices else nodes, devices, elsewhere=False)
    show_plan(folder.path, config, this_machine(config.trainer.devices, config.trainer.nodes))
    record(folder.path, how="local")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "train", f"resume={folder.path}"])
