"""``python -m train``: the command line of a training run."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import OmegaConf

from train.cli import flag, guarded
from train.config.compose import (
    CONF,
    DEFAULT_RUN,
    change_config,
    compose_run,
    differences,
    finish,
    group_options,
    read_config,
    run_names,
    split_arguments,
)
from train.config.schema import structured
from train.errors import UserError


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if not line.startswith("# @package")).lstrip("# ")


def usage() -> str:
    """The text of --help, made of the files in conf/."""
    lines = [
        "python -m train [conf=RUN] [group=option ...] [key=value ...]",
        "python -m train resume=<run folder> [key=value ...]",
        "python -m train -m [conf=RUN] [key=value,value ...]",
        "",
        "Trains a LoRA that extends a video model to longer clips with radial attention.",
        f"Without arguments it runs conf={DEFAULT_RUN}.",
        "",
        "runs (conf=...):",
        *(f"  {name:<14} {_first_comment(CONF / f'{name}.yaml')}" for name in run_names()),
        "",
        "groups:",
    ]
    for group, options in group_options().items():
        lines += [f"  {group}=", *(f"    {o:<14} {_first_comment(CONF / group / f'{o}.yaml')}" for o in options)]
    lines += [
        "",
        "any key of the config, as --cfg job prints it, can be set: optim.lr=5e-5 data.shards=shards/openvid",
        "values are taken as typed: no quoting beyond the shell's own; null unsets",
        "",
        "  -m, --multirun a run for each combination of the values that have several: lora.rank=32,64 seed=range(3);",
        "                 with resume=<its folder> what is missing of such a sweep",
        "  --cfg job      print the composed config and stop; with -m that of every run",
        "  --help         this text",
        "",
        "examples:",
        "  python -m train",
        "  python -m train conf=wan_4x model.path=weights/wan_14b data.shards=shards/openvid_4x",
        "  python -m train conf=shapes_4x attention=dense trainer.steps=100",
        "  python -m train -m attention=radial,dense seed=0,1,2",
        "  python -m train.export run=runs/shapes_4x/<time>",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Composes, checks, then trains."""
    show = "--cfg" in arguments
    if show:
        at = arguments.index("--cfg")
        if arguments[at + 1 : at + 2] not in (["job"], []):
            raise UserError(f"--cfg is {arguments[at + 1]!r}, expected --cfg job")
        arguments = arguments[:at] + arguments[at + 2 :]
    if {"-m", "--multirun"} & set(arguments):
        from train.sweep import command as sweep

        words = [word for word in arguments if word not in ("-m", "--multirun")]
        sweep.show(words) if show else sweep.main(words)
        return
    settings = split_arguments(arguments)
    if "resume" in settings:
        _resume(Path(settings.pop("resume")), settings, show)
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


def _resume(folder: Path, settings: dict[str, str], show: bool) -> None:
    before = read_config(folder)
    changed = change_config(before, settings)
    override = flag("override", settings.get("override", "false"))
    if show:
        print(OmegaConf.to_yaml(structured(changed)), end="")
        return
    from train.preflight import preflight_resume
    from train.ranks import global_rank
    from train.run import resume
    from train.storage.run_folder import held, write_config

    config = preflight_resume(changed, folder, override=override)
    changes = differences(before, changed)
    if changes and global_rank() == 0:
        with held(folder):
            write_config(changed, folder)
        print("\n".join(["changed since the run was started:", *(f"  {line}" for line in changes.values())]))
    resume(folder, config)


if __name__ == "__main__":
    guarded(main, sys.argv[1:], usage())
