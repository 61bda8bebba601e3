"""``python -m train``: the command line of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from radial.cli.command import Command
from radial.cli.ranks import Rank
from radial.cli.settings import setting
from train.config.changes import change_config, differences
from train.config.compose import DEFAULT_RUN, compose_run, finish, read_config
from train.config.help import overview, topic
from train.config.schema import structured


@dataclass
class Options:
    """What the command line sets beside the run's keys."""

    resume: Path | None = setting("a run folder whose run goes on from its newest checkpoint", None)
    override: bool = setting("with resume: change keys that change the results too", False)
    multirun: bool = setting(
        "-m or --multirun: a run for each combination of the values that have several, such as lora.rank=32,64 "
        "seed=range(3); with resume=<its folder> what is missing of such a sweep", False, short="m"
    )  # fmt: skip
    cfg: str | None = setting(
        "--cfg job prints the composed config and stops; with -m that of every run", None, ("job",)
    )


def run(options: Options, settings: dict[str, str]) -> None:
    """Composes, checks, then trains."""
    show = options.cfg is not None
    if options.multirun:
        from train.sweep import command as sweep

        given = settings if options.resume is None else {"resume": str(options.resume), **settings}
        sweep.show(given) if show else sweep.main(given)
        return
    if options.resume is not None:
        _resume(options.resume, settings, options.override, show)
        return
    composed = compose_run(settings)
    if show:
        print(OmegaConf.to_yaml(composed), end="")
        return
    config = finish(composed)
    # after the config is known to be right: torch and lightning take seconds to import
    from train.preflight import preflight
    from train.run import train
    from train.storage.run_folder import RunFolder

    preflight(config)
    train(config, RunFolder.create(config))


def _resume(folder: Path, settings: dict[str, str], override: bool, show: bool) -> None:
    before = read_config(folder)
    changed = change_config(before, settings, override=override)
    if show:
        print(OmegaConf.to_yaml(structured(changed)), end="")
        return
    from train.preflight import preflight_resume
    from train.run import resume
    from train.storage.run_folder import PLAN, held, write_config

    config = preflight_resume(changed, folder, override=override)
    changes = differences(before, changed)
    if changes and Rank.here().index == 0:
        with held(folder):
            write_config(changed, folder)
            (folder / PLAN).unlink(missing_ok=True)  # of the old settings: the run makes one of its own
        print("\n".join(["changed since the run was started:", *(f"  {line}" for line in changes.values())]))
    resume(folder, config)


def explained(words: Sequence[str]) -> Iterator[str]:
    """The runs, groups and sections; with words after --help, what each stands for.

    Raises:
        UserError: there is no such section, key or group.
    """
    if not words:
        yield from overview()
    for word in words:
        yield from topic(word)
        yield ""


main = Command(
    "python -m train",
    "Trains a LoRA that extends a video model to longer clips with radial attention. Without arguments it runs "
    f"conf={DEFAULT_RUN}.\n\n--help SECTION, --help KEY or --help GROUP explains what a run is made of.",
    Options,
    run,
    [
        "python -m train",
        "python -m train conf=wan_4x model.path=weights/wan_14b data.shards=shards/openvid_4x",
        "python -m train conf=shapes_4x attention=dense trainer.steps=100",
        "python -m train -m attention=radial,dense seed=0,1,2",
        "python -m train resume=runs/shapes_4x/<time>",
        "python -m train --help optim",
        "python -m train.export run=runs/shapes_4x/<time>",
    ],
    others="a run file (conf=), groups and keys, below; values are taken as typed, null unsets",
    more_help=explained,
)

if __name__ == "__main__":
    main.run()
