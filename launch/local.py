"""``python -m launch local``: a run on this machine."""

from __future__ import annotations

import os
import sys

from launch.plan import show_plan
from launch.prepare import RunOptions, layout, prepare
from launch.records import record
from radial.cli.command import Command
from train.errors import UserError
from train.planning import this_machine


def start(options: RunOptions, settings: dict[str, str]) -> None:
    """Prepares the folder, then becomes ``python -m train``."""
    nodes, devices = layout(options.nodes, "nodes", settings), layout(options.gpus, "gpus", settings)
    if nodes not in (None, 1):
        raise UserError(f"nodes is {nodes}, expected 1: launch local is for this machine, launch slurm for several")
    if options.resume is None:
        devices = devices or 1
    folder, config = prepare(options, settings, 1 if devices else nodes, devices, elsewhere=False)
    show_plan(folder.path, config, this_machine(config.trainer.devices, config.trainer.nodes))
    record(folder.path, how="local")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "train", f"resume={folder.path}"])


main = Command(
    "python -m launch local",
    "Makes the run's folder, stores its plan there, and trains with as many processes as gpus= names, 1 by default; on "
    "a machine without GPUs, on its CPU. Ctrl-C once: a checkpoint is saved, and the same with resume= goes on; twice: "
    "at once.",
    RunOptions,
    start,
    ["python -m launch local conf=wan_4x gpus=2 model.path=weights/wan_14b data.shards=shards/openvid_4x"],
    others="those of the run, as for python -m train; python -m train -m runs a sweep on this machine",
)
