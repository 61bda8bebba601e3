"""``python -m train.decay``: the command line."""

from __future__ import annotations

from radial.cli.command import Command
from train.decay.settings import Job, Settings


def measure(settings: Settings, others: dict[str, str]) -> None:
    """Measures and prints the advice."""
    job = Job.made_of(settings, others)
    from train.decay.run import run_decay  # takes seconds to import

    for sentence in run_decay(job):
        print(f"* {sentence}")
    print(f"\nEverything is in {job.out}")


main = Command(
    "python -m train.decay",
    "Measures a model's attention on real clips at several noise levels: how it falls off with distance in every head, "
    "what the patterns of attention= keep of it, and what they change in the model's velocity. Writes decay.json, "
    "decay.safetensors and a page. Without any key: the repository's tiny model on synthetic clips. A command that was "
    "stopped goes on.",
    Settings,
    measure,
    [
        "python -m train.decay",
        "python -m train.decay model=wan_14b model.path=weights/wan_14b data.shards=shards/openvid_4x",
        "python -m train.decay model=wan_14b model.path=weights/wan_14b data.shards=shards/openvid_4x frames=4x "
        "rope=interpolate attention=radial,paper tile=8x16",
    ],
    others="those of a training run",
)

if __name__ == "__main__":
    main.run()
