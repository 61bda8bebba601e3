"""One training run, from a validated config to a folder with everything in it."""

from __future__ import annotations

import errno
import functools
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from safetensors import SafetensorError

from data.shards.manifest import Manifest
from radial.cli.ranks import Rank
from radial.errors import Mistake
from train.assemble import Watch, assemble, loader
from train.callbacks.parting import part, parting
from train.callbacks.progress import collected
from train.callbacks.stop import StopSignals
from train.callbacks.watchdog import Watchdog, patience
from train.config.schema import RunConfig
from train.errors import EXIT_CODES, WORDS, Asked, UserError
from train.export.run import export_run
from train.loggers.services import wandb_closed
from train.parallel.control_group import ControlGroup
from train.planning import Budget, without_kernel
from train.planning.full_memory import is_out_of_memory, out_of_memory
from train.preflight import check_shapes
from train.report.held_out_losses import write_report
from train.report.page import write_page
from train.shards import held_out, training_shards
from train.step.module import LengthExtensionModule
from train.storage.checkpoints import (
    Place,
    how_to_go_on,
    last_good_checkpoint,
    load_weights,
    place_of,
    remove_leftovers,
)
from train.storage.inputs import hold_inputs
from train.storage.run_folder import RunFolder, command, get_state, gpus_given, held, set_state
from train.storage.unfinished import Unfinished


def train(config: RunConfig, folder: RunFolder, *, extra_callbacks: Sequence[Callback] = ()) -> None:
    """Trains (or goes on from ``folder.checkpoint``), then exports, draws and reports into the run's folder.

    Args:
        extra_callbacks: act in every step after its row in the logs, and before its checkpoint.

    Raises:
        UserError: something that the user can mend, or another process runs in the folder.
        SystemExit: the run was asked to stop (`train.callbacks.stop`) and has saved a checkpoint; or, on a rank other
            than 0, something that the user can mend, which is printed once.
    """
    rank = Rank.here().index
    stop = StopSignals(folder.path, rank, ControlGroup())
    # A signal may come again: until the state says what the first one asked for it must not end the process.
    with (
        held(folder.path) if rank == 0 else nullcontext(),
        collected(folder.path, rank),
        wandb_closed(),
        stop.listening(),
    ):
        if rank == 0:
            set_state(folder.path, "running")
        try:
            with _room(folder.path):
                _train(config, folder, stop, extra_callbacks)
        except Mistake as error:
            if rank and _has_failed(folder.path, rank, str(error)):
                raise SystemExit(2) from None
            set_state(folder.path, "failed", str(error))
            if rank:
                print(f"error: rank {rank}: {error}".replace(f"rank {rank}: rank", "rank"), file=sys.stderr, flush=True)
                raise SystemExit(2) from None
            raise
        except Exception as error:
            if get_state(folder.path)[0] not in ("died", "failed"):  # the watchdog or another rank has stored why
                set_state(folder.path, "died", f"rank {rank}: {' '.join(str(error).split()) or type(error).__name__}")
            raise
        if rank:
            return
        if stop.agreed:
            why = how_to_go_on(folder.path)
            set_state(folder.path, WORDS[stop.agreed], why)
            print(f"\nstopped; {why}")
            raise SystemExit(EXIT_CODES[stop.agreed])
        set_state(folder.path, "done")
        with _room(folder.path):
            write_page(folder.path)  # which shows how the run stands
        print(f"\nEverything is in {folder.path}")


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Turns the error of a full disk into a readable message; checkpoints and logs handle theirs themselves."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = (
            error.errno in (errno.ENOSPC, errno.EDQUOT) if isinstance(error, OSError) else "os error 28" in str(error)
        )
        if not full:
            raise
        raise UserError(
            f"the disk is full ({error}): make room, then {command('train resume=', folder)} goes on"
        ) from error


def _has_failed(folder: Path, rank: int, why: str = "") -> bool:
    """Whether a lower rank has stored, with this reason if it is given, that the run has failed; waits for it."""
    time.sleep(1 + 0.1 * min(rank, 20))
    word, said = get_state(folder)
    return word == "failed" and why.strip() in ("", said)


def _train(config: RunConfig, folder: RunFolder, stop: StopSignals, extra_callbacks: Sequence[Callback]) -> None:
    """Trains and finishes, or stops where ``stop.agreed`` says so."""
    if gpus_given(folder.path) and not torch.cuda.is_available():
        raise UserError(
            f"SLURM gave this job {gpus_given(folder.path)} GPUs a node, but torch sees none on "
            f"{socket.gethostname()}: python -m launch doctor there says why, sbatch's --exclude leaves the node out"
        )
    rank = stop.rank
    watchdog = Watchdog(folder.path, patience(config), stop.control)
    watch = Watch(control=stop.control, stop=stop, watchdog=watchdog)
    if rank == 0:
        warn_where_attention_is_slow(config)
    with _in_words(config, folder.path, watchdog, rank):
        L.seed_everything(config.seed, workers=True, verbose=False)
        shards = training_shards(config)
        check_shapes(config, shards)
        start = Place() if folder.checkpoint is None else place_of(folder.checkpoint)
        unfinished = start.step < config.trainer.steps
        trainer, module = assemble(config, folder, shards, start.step, watch, extra_callbacks)
        hold_inputs(config, folder.path, shards, write=rank == 0)  # by now weights of the hub are here
        with watchdog.over(trainer):
            if unfinished:
                trainer.fit(module, loader(config, shards, trainer, start), ckpt_path=folder.checkpoint)
            else:
                assert folder.checkpoint is not None
                module.load_trained_weights(load_weights(folder.checkpoint))  # what the export takes, average or not
                module.position = start.position
            with parting(folder.path, stop):
                if not stop.agreed:
                    _finish(config, folder.path, trainer, module, shards, stop, together=unfinished)


def warn_where_attention_is_slow(config: RunConfig) -> None:
    """A line where it trains without a kernel: the plan has no times there, from which the watchdog's would follow."""
    budget = Budget.here(config)
    slow = None if budget is None else without_kernel(budget)
    if slow is not None:
        print(
            f"warning: {slow}; trainer.timeout={config.trainer.timeout:g} has to be longer than a forward and than a "
            "backward, in seconds",
            flush=True,
        )


@contextmanager
def _in_words(config: RunConfig, folder: Path, watchdog: Watchdog, rank: int) -> Iterator[None]:
    """Puts into words what ends a run from outside of it: lost ranks, memory that is full."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            watchdog.explain(error)
            raise
        if rank and _has_failed(folder, rank):
            raise SystemExit(2) from None
        set_state(folder, "failed", f"rank {rank}: out of memory")  # finding remedies takes seconds
        raise UserError(out_of_memory(config, error, rank)) from error


def _finish(
    config: RunConfig,
    folder: Path,
    trainer: L.Trainer,
    module: LengthExtensionModule,
    shards: Manifest,
    stop: StopSignals,
    *,
    together: bool,
) -> None:
    """The export, and what the run shows on held-out clips; both are left when the run is asked to stop.

    Args:
        together: the ranks have trained, so that they have their groups; otherwise rank 0 does all of it.
    """
    # all ranks of the first group share the report's clips; under stage 3 all ranks hold a part of every weight
    sharing = trainer.world_size if config.parallel.strategy == "zero3" else config.parallel.sequence
    count = sharing if together else 1
    group = stop.control.first(count)
    if count == 1:
        part(folder, stop)
    if trainer.is_global_zero:
        with suppress(Asked):
            export_run(folder, check=stop.check)
    if trainer.global_rank >= count or stop.agree_in(group):
        return
    context = trainer.precision_plugin.forward_context
    parts = Unfinished(folder, config, module.position, functools.partial(stop.agree_in, group), group)
    with _report_folder(folder, trainer.global_rank) as out, suppress(Asked):
        write_report(config, module, out, shards, functools.partial(held_out, config), context, parts)
        parts.done()


def resume(folder: Path, config: RunConfig, *, extra_callbacks: Sequence[Callback] = ()) -> None:
    """Goes on from the newest checkpoint of a run folder that can be read; at the beginning where there is none yet.

    Args:
        extra_callbacks: as in `train`.
    """
    if Rank.here().index == 0:
        with held(folder):
            remove_leftovers(folder / "checkpoints")
    checkpoint, damaged = last_good_checkpoint(folder)
    if damaged and Rank.here().index == 0:
        assert checkpoint is not None
        print(f"warning: {'; '.join(damaged)}: going on from {checkpoint.name}", flush=True)
    train(config, RunFolder(folder, checkpoint), extra_callbacks=extra_callbacks)


@contextmanager
def _report_folder(folder: Path, rank: int) -> Iterator[Path]:
    """Where a rank's report goes: rank 0's to the run's folder; another rank computes its part and prints nothing."""
    if rank == 0:
        yield folder
        return
    with (
        tempfile.TemporaryDirectory() as nowhere,
        Path(os.devnull).open("w", encoding="utf-8") as silence,
        redirect_stdout(silence),
        redirect_stderr(silence),
    ):
        yield Path(nowhere)
