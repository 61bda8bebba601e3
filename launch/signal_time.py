"""How long before the end of its time a job needs SLURM's signal, so that its run can save a checkpoint."""

from __future__ import annotations

import math

from train.planning import Budget, Duration

_LEAST_GRACE, _TO_SAVE = 600, 300  # seconds


def seconds_before_end(given: int | None, limit: int | None, budget: Budget | None) -> int:
    """Seconds from SLURM's signal to the end of the time; says so where the plan needs more."""
    slowest = (Duration(budget).slowest_micro_step if budget is not None else None) or 0.0
    needed = math.ceil(2 * slowest + _TO_SAVE)
    grace = max(_LEAST_GRACE, needed) if given is None else given
    if limit is not None:
        grace = min(grace, max(1, limit // 4))
    if grace < needed and slowest:
        print(
            f"warning: the signal comes {grace} s before the end of the time, and the plan gives a micro-batch "
            f"{slowest:,.0f} s: {needed} s are needed to end one and save; set a longer time=, or grace={needed}"
        )
    return grace
