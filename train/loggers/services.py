"""The logs of a run: which there are, and what goes into them once."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from data.io.files import write_utf8
from train.config.schema import RunConfig
from train.errors import EXIT_CODES
from train.loggers.csv_file import MetricsCsv
from train.loggers.environment import environment
from train.loggers.forgiving import Forgiving
from train.planning import Budget, plan_table
from train.storage.run_folder import CONFIG, PLAN
from train.storage.stored_plan import store_plan, stored_plan

WANDB_ID, ENVIRONMENT, MASK = "wandb_id", "environment.json", "mask.png"
PATIENCE = 60  # seconds for W&B's service to answer at the start


def loggers_of(config: RunConfig, folder: Path, resumed_step: int, rank: int) -> list[Logger]:
    """metrics.csv, and what ``log`` asks for beside it; ranks other than 0 have none of them."""
    if rank:
        return []
    later = "training goes on, and the rows are kept until there is room"
    loggers: list[Logger] = [Forgiving(MetricsCsv(folder, resumed_step), "metrics.csv", later)]
    if config.log.tensorboard:
        inner = TensorBoardLogger(folder, name="", version="tensorboard", purge_step=resumed_step)
        loggers.append(Forgiving(inner, "TensorBoard", "training goes on, metrics.csv has them"))
    if config.log.wandb != "disabled":
        loggers += _wandb(config, folder)
    return loggers


@contextmanager
def wandb_closed() -> Iterator[None]:
    """Ends W&B's run with the training, while its last lines still go to log.txt."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as stop:
        code = 0 if stop.code in EXIT_CODES.values() else 1  # asked to stop, which is no failure
        raise
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            try:
                wandb.finish(exit_code=code)
            except Exception as error:  # its service is gone: a warning came when figures were lost
                logging.getLogger(__name__).info("Weights & Biases did not end its run: %s", error)
                with suppress(Exception):
                    wandb.teardown()  # so that this process can start it anew


def _wandb(config: RunConfig, folder: Path) -> list[Logger]:
    """W&B's log of this folder's run, the same one after every resume; offline where its service does not answer, and
    none where it does not even run on this machine."""
    import wandb

    file = folder / WANDB_ID
    number = file.read_text(encoding="utf-8").strip() if file.exists() else uuid.uuid4().hex[:12]
    write_utf8(file, number + "\n")
    options: dict[str, Any] = {
        "project": config.log.project,
        "name": f"{config.conf}/{folder.name}",
        "id": number,
        "resume": "allow",
        "dir": str(folder),
        "config": asdict(config),
        "settings": wandb.Settings(init_timeout=PATIENCE, console="off", silent=True),
    }
    sync = f"afterwards: wandb sync {shlex.quote(str(folder))}/wandb/*"
    mode: Any = config.log.wandb
    try:
        run = wandb.init(mode=mode, **options)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"warning: Weights & Biases does not answer ({reason}); this run is logged offline, {sync}", flush=True)
        wandb.teardown()  # of what has failed: it still holds the run's id
        try:
            run = wandb.init(mode="offline", **options)
        except Exception as again:
            reason = " ".join(str(again).split()) or type(again).__name__
            print(
                f"warning: nor offline ({reason}); training goes on without it, metrics.csv has the figures", flush=True
            )
            return []
    inner = WandbLogger(experiment=run)
    return [Forgiving(inner, "Weights & Biases", f"training goes on, metrics.csv has them; {sync}")]


def note_once(config: RunConfig, folder: Path, loggers: list[Logger]) -> None:
    """Environment and plan, in their files and in the logs, and the mask's picture in the logs. The config is there
    already, and the plan where launch has made it."""
    if not (folder / PLAN).exists():
        budget = Budget.here(config)
        if budget is not None:
            store_plan(folder, budget, plan_table(budget))
    plan = stored_plan(folder)
    about = environment()
    write_utf8(folder / ENVIRONMENT, json.dumps(about, indent=1) + "\n")
    text = json.dumps(about, indent=1)
    for logger in loggers:
        if not isinstance(logger, Forgiving):
            continue
        if isinstance(logger.inner, WandbLogger):
            logger.attempt(_to_wandb, logger.inner.experiment, about, plan, folder / MASK)
        elif isinstance(logger.inner, TensorBoardLogger):
            words = {"config": (folder / CONFIG).read_text(encoding="utf-8"), "environment": text}
            if plan is not None:
                words["plan"] = plan["table"]
            logger.attempt(_to_tensorboard, logger.inner.experiment, words, folder / MASK)


def _to_wandb(run: Any, about: dict[str, Any], plan: dict[str, Any] | None, mask: Path) -> None:
    import wandb

    run.config.update({"environment": about, "plan": plan}, allow_val_change=True)
    run.summary["mask"] = wandb.Image(str(mask))


def _to_tensorboard(writer: Any, words: dict[str, str], mask: Path) -> None:
    import numpy
    from PIL import Image

    for name, text in words.items():
        writer.add_text(name, f"```\n{text}\n```")
    writer.add_image("mask", numpy.asarray(Image.open(mask).convert("RGB")), dataformats="HWC")
