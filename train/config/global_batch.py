"""Clips a step: how many GPUs and accumulated micro-batches share the work on them.

    clips a step = clips at once x micro-batches      clips at once = data.batch_size x GPUs / parallel.sequence

A run file sets the clips a step (``optim.global_batch``), and the micro-batches follow from the GPUs that there are,
unless ``optim.accumulate`` says otherwise.
"""

from __future__ import annotations

from train.config.schema import RunConfig
from train.errors import UserError


def micro_batches(config: RunConfig) -> int:
    """Micro-batches in an optimizer step.

    Raises:
        UserError: ``optim.global_batch`` is not a whole number of times what the GPUs take at once.
    """
    if config.optim.accumulate is not None:
        return config.optim.accumulate
    wanted = config.optim.global_batch
    if wanted is None:
        return 1
    at_once = config.clips_at_once()
    if wanted % at_once:
        raise UserError(_misfit(config, wanted, at_once))
    return int(wanted / at_once)


def clips_a_step(config: RunConfig) -> float:
    """Clips in an optimizer step of all GPUs; raises as `micro_batches` does."""
    return config.clips_at_once() * micro_batches(config)


def clips_in_words(config: RunConfig) -> str:
    """Such as ``8 a step: 1 x 8 GPUs / 4 a clip, 4 micro-batches``, with the run file's number where it differs."""
    from train.config.compose import composed_default  # which needs the number of clips itself

    count, times = clips_a_step(config), micro_batches(config)
    world, sequence = config.trainer.nodes * config.trainer.devices, config.parallel.sequence
    text = f"{count:g} a step: {config.data.batch_size} x {world} process{'es' if world > 1 else ''}"
    text += f" / {sequence} a clip" if sequence > 1 else ""
    text += f", {times} micro-batch{'es' if times > 1 else ''}"
    own = composed_default(config.conf, "optim.global_batch")
    if own not in (None, count):
        text += f"; conf/{config.conf}.yaml has {own} a step"
    return text


def _misfit(config: RunConfig, wanted: int, at_once: float) -> str:
    devices, batch = config.trainer.devices, config.data.batch_size
    world = config.trainer.nodes * devices
    heads = (config.model.dimensions or {}).get("num_attention_heads", 0)  # those who share a clip share its heads
    sizes = [size for size in range(1, devices + 1) if devices % size == 0 and heads % size == 0]
    per_clip = [size for size in sizes if wanted % (batch * world / size) == 0]
    remedies = [f"parallel.sequence={' or '.join(map(str, per_clip))} (GPUs that share a clip)"] * bool(per_clip)
    remedies.append(f"optim.global_batch to a multiple of {at_once:g}")
    return (
        f"optim.global_batch is {wanted} clips a step over all GPUs, but data.batch_size={batch} on {world} GPUs with "
        f"parallel.sequence={config.parallel.sequence} takes {at_once:g} at once, expected a divisor of {wanted}: set "
        f"{', or '.join(remedies)}"
    )
