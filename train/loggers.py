"""The logs of a run: which there are, and what goes into them once."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from train.config import RunConfig
from train.environment import environment
from train.metrics import Forgiving, MetricsCsv

WANDB_ID, ENVIRONMENT, MASK = "wandb_id", "environment.json", "mask.png"
_PATIENCE = 60  # seconds for W&B's service to answer at the start


def loggers_of(config: RunConfig, folder: Path, resumed_step: int, rank: int) -> list[Logger]:
    """metrics.csv, and what ``log`` asks for beside it; ranks other than 0 have none of them."""
    if rank:
        return []
    later = "training goes on, and the rows are kept until there is room"
    loggers: list[Logger] = [Forgiving(MetricsCsv(folder, resumed_step), "metrics.csv", later)]
    if config.log.tensorboard:
        inner = TensorBoardLogger(folder, name="", version="tensorboard")
        loggers.append(Forgiving(inner, "TensorBoard", "training goes on, metrics.csv has them"))
    if config.log.wandb != "disabled":
        loggers.append(_wandb(config, folder))
    return loggers


def _wandb(config: RunConfig, folder: Path) -> Logger:
    """W&B's log of this folder's run, the same one after every resume; offline where its service does not answer."""
    import wandb

    file = folder / WANDB_ID
    number = file.read_text().strip() if file.exists() else uuid.uuid4().hex[:12]
    file.write_text(number + "\n")
    options: dict[str, Any] = {
        "project": config.log.project,
        "name": f"{config.conf}/{folder.name}",
        "id": number,
        "resume": "allow",
        "dir": str(folder),
        "config": asdict(config),
        "settings": wandb.Settings(init_timeout=_PATIENCE, console="off", silent=True),
    }
    sync = f"afterwards: wandb sync {folder}/wandb/*"
    mode: Any = config.log.wandb
    try:
        run = wandb.init(mode=mode, **options)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"warning: Weights & Biases does not answer ({reason}); this run is logged offline, {sync}", flush=True)
        wandb.teardown()  # of what has failed: it still holds the run's id
        run = wandb.init(mode="offline", **options)
    inner = WandbLogger(experiment=run)
    return Forgiving(inner, "Weights & Biases", f"training goes on, metrics.csv has them; {sync}")


def note_once(folder: Path, loggers: list[Logger]) -> None:
    """The environment, in its file and in the logs, and the mask's picture in the logs. The config is there already."""
    about = environment()
    (folder / ENVIRONMENT).write_text(json.dumps(about, indent=1) + "\n")
    text = json.dumps(about, indent=1)
    for logger in loggers:
        if not isinstance(logger, Forgiving):
            continue
        if isinstance(logger.inner, WandbLogger):
            logger.attempt(_to_wandb, logger.inner.experiment, about, folder / MASK)
        elif isinstance(logger.inner, TensorBoardLogger):
            config = (folder / "config.yaml").read_text()
            logger.attempt(_to_tensorboard, logger.inner.experiment, config, text, folder / MASK)


def _to_wandb(run: Any, about: dict[str, Any], mask: Path) -> None:
    import wandb

    run.config.update({"environment": about}, allow_val_change=True)
    run.summary["mask"] = wandb.Image(str(mask))


def _to_tensorboard(writer: Any, config: str, about: str, mask: Path) -> None:
    import numpy
    from PIL import Image

    writer.add_text("config", f"```\n{config}\n```")
    writer.add_text("environment", f"```\n{about}\n```")
    writer.add_image("mask", numpy.asarray(Image.open(mask).convert("RGB")), dataformats="HWC")
