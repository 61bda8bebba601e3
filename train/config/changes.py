"""The config of a run that goes on: what may change, and what would change its results."""

from __future__ import annotations

import math

from train.config.compose import assign, finish
from train.config.global_batch import clips_a_step
from train.config.keys import value_of
from train.config.schema import KEYS, RunConfig, structured
from train.errors import UserError


def change_config(config: RunConfig, settings: dict[str, str], *, override: bool = False) -> RunConfig:
    """The config of a run that goes on with other settings.

    Args:
        settings: what changes.
        override: lets keys in that change the results, and another number of clips a step.

    Raises:
        UserError: keys that change the results, or the number of clips in a step, without ``override``, naming
            the differences; or the name of the run file.
    """
    typed = structured(config)
    for key, text in settings.items():
        assign(typed, key, text)
    changed = finish(typed)
    found = differences(config, changed)
    if "conf" in found:
        raise UserError(f"{found['conf']}: a run keeps its run file; start a new run with conf={changed.conf}")
    if override:
        return changed
    matter = [line for key, line in found.items() if not KEYS[key].resume]
    if matter:
        raise UserError(
            f"{'; '.join(matter)}: this changes what the run computes. Add override=true to go on with it, "
            "or start a new run"
        )
    ranks = changed.trainer.nodes * changed.trainer.devices
    if ranks % changed.parallel.sequence or not changed.clips_at_once().is_integer():
        return changed  # preflight says what is wrong
    before, now = int(clips_a_step(config)), int(clips_a_step(changed))
    if now != before:
        raise UserError(
            f"a step would have {now} clips over all GPUs, it had {before}: {_as_many(before, changed)}add "
            f"override=true to go on with {now}"
        )
    return changed


def differences(before: RunConfig, after: RunConfig) -> dict[str, str]:
    """Each key that differs, and how, in words."""
    values = {key: (value_of(before, key), value_of(after, key)) for key in KEYS}
    return {key: f"{key} was {one}, now {other}" for key, (one, other) in values.items() if one != other}


def _as_many(clips: int, config: RunConfig) -> str:
    """What makes a step of so many clips with the layout of ``config``, in words; empty where nothing does."""
    share, rest = divmod(clips, int(config.clips_at_once()) // config.data.batch_size)
    if rest:
        return ""
    batch = math.gcd(config.data.batch_size, share)
    size = "" if batch == config.data.batch_size else f"data.batch_size={batch} "
    return f"set {size}optim.accumulate={share // batch} to keep them, or "
