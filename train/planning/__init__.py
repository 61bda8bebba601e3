"""The plan of a run before a GPU is touched: memory, time, and the settings that fit.

budget = Budget.of(config, Machine(GPUS["h200"], gpus=8, nodes=1, cpu_memory=1024 * GIB))
budget.gpu_parts, budget.misfit, Duration(budget).hours
best(budget, clips_a_step=8)

    budget.py            how much memory a run takes, part by part
    choose_policies.py   which layers keep their activations and which compute them again
    duration.py          seconds a step, hours of a run
    kernels.py           the backend that attention has on a GPU
    hardware.py          GPUs and machines
    advice.py, table.py  settings that fit; the plan as text
"""

from train.planning.advice import Setting, best, fewest, remedies
from train.planning.budget import GIB, Budget, chosen_policies
from train.planning.duration import Duration
from train.planning.hardware import GPUS, Gpu, Machine, cpu_memory, resolve_precision, this_machine
from train.planning.kernels import training_backend, training_call, without_kernel
from train.planning.table import plan_table, setting_lines

__all__ = [
    "GIB",
    "GPUS",
    "Budget",
    "Duration",
    "Gpu",
    "Machine",
    "Setting",
    "best",
    "chosen_policies",
    "cpu_memory",
    "fewest",
    "plan_table",
    "remedies",
    "resolve_precision",
    "setting_lines",
    "this_machine",
    "training_backend",
    "training_call",
    "without_kernel",
]
