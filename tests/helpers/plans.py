"""Plans of runs on machines that are not here."""

from __future__ import annotations

from train.config.compose import compose_run, finish
from train.planning import GIB, GPUS, Budget, Machine


def planned(
    gpu: str = "h200", gpus: int = 1, nodes: int = 1, cpu_gib: float = 128, layers: int | None = None, **words: object
) -> Budget:
    """The plan of wan_4x with activations=full, uncompiled, on some GPUs; ``words``: keys with ``__`` for the dot."""
    given = {"conf": "wan_4x", "parallel__activations": "full", "trainer__compile": False, **words}
    config = finish(compose_run({k.replace("__", "."): str(v) for k, v in given.items()}))
    budget = Budget.of(config, Machine(GPUS[gpu], gpus, nodes, cpu_gib * GIB), layers)
    assert budget is not None
    return budget
