"""The masks that are fitted to the base's own attention.

    <out>/masks-<digest>/decay/                 attention of the base at the study's length (`train.decay`)
    <out>/masks-<digest>/<name>.safetensors     masks of a share of the released mask's blocks (`radial.fit`)

The digest is that of the base's weights, of the clip's grid and of what the released mask follows from: another base,
or another share, gets masks of its own. They are fitted to other clips than those that rows are trained or measured on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from data.io.locks import take
from radial import Released, build_layout
from radial.fit import fit
from train.storage.inputs import fingerprints
from train.study.fits import Fit
from train.study.settings import Job

_CLIPS, _SIGMAS, _SEED = 6, "0.3,0.6,0.9", 1000


def released_share(job: Job) -> float:
    """The share of all blocks that the released mask keeps at the study's length."""
    attention = job.config.attention
    pattern = Released(decay=attention.decay, rule=job.config.rule())
    return 1 - build_layout(pattern, job.config.grid(), attention.block).sparsity


def masks_file(job: Job, one: Fit) -> Path:
    """Where a mask lies, or will."""
    if job.base is None:
        return job.out / f"{one.name}.safetensors"
    config, attention = job.config, job.config.attention
    weights = fingerprints(config, None)["weights"]
    mask = (config.grid(), attention.block, config.rule(), attention.decay)
    digest = hashlib.sha256(f"{weights} {mask}".encode()).hexdigest()[:8]
    return job.out / f"masks-{digest}" / f"{one.name}.safetensors"


def fit_mask(job: Job, one: Fit, check: Callable[[], None]) -> None:
    """Fits a mask, unless it is there; the first process that wants one measures the base's attention, others wait.

    Args:
        check: called before each part of the work; what it raises ends it, and finished parts stay.

    Raises:
        UserError: the attention cannot be measured.
        RadialError: the mask cannot be fitted.
    """
    file = masks_file(job, one)
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / ".lock").open("w", encoding="utf-8") as lock:
        take(lock, wait=True)
        if not file.is_file():
            _measure_attention(job, file.parent / "decay", check)
            check()
            print(f"fitting {file}", flush=True)
            share = one.share * released_share(job)
            fit(file.parent / "decay" / "decay.safetensors", file, share=share, coverage=one.coverage, dense_layers=0)


def _measure_attention(job: Job, decay: Path, check: Callable[[], None]) -> None:
    """The base's attention, unless it is there."""
    if not (decay / "decay.safetensors").is_file():
        from train.decay.run import run_decay  # takes seconds to import
        from train.decay.settings import Job as DecayJob
        from train.decay.settings import Settings as DecaySettings

        print("\nthe base's own attention, to which masks are fitted", flush=True)
        own = DecaySettings(
            clips=_CLIPS, sigmas=_SIGMAS, frames=job.given.length, decays="1", dense_layers="0", out=decay
        )
        run_decay(DecayJob.made_of(own, {**job.words, "seed": str(_SEED)}), check)
