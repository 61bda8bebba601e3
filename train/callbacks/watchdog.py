"""No rank waits for ever: one that makes no step for too long ends the run, which names each rank's place.

A thread of every rank writes into a store where its rank is. The rank that hangs is the one whose thread is silent (a
frozen process, a dead node), or else the one that is furthest behind: the others wait for it in a collective. While a
rank moves on, such as one that encodes prompts or decodes a clip alone, those that wait for it do not hang. The first
rank's thread also looks after the processes that it started, from before they load until the run ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from radial.cli.ranks import Rank
from radial.errors import Mistake
from train.config.schema import RunConfig
from train.parallel.control_group import ControlGroup
from train.parallel.processes import end_now
from train.planning import Budget, Duration
from train.planning.full_memory import is_out_of_memory
from train.storage.checkpoints import how_to_go_on
from train.storage.run_folder import get_state, set_state

PLACES = ("reading data", "the forward pass", "the backward pass", "the optimizer step or what follows it")
EXIT_CODE = 1
_LATER = 10**9  # beats counted from here on are of a rank that looks for who hangs
_LOST = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "remote process exited")
_TOLD = ("failed", "stopped", "requeue")  # states of a run whose reason to end is known


def patience(config: RunConfig) -> float:
    """Seconds at one place after which a run stands still: ``trainer.timeout``, or three times what the plan gives the
    longest micro-batch where that is more."""
    budget = Budget.here(config)
    planned = None if budget is None else Duration(budget).slowest_micro_step
    return max(config.trainer.timeout, 3 * (planned or 0.0))


@dataclass(frozen=True)
class Beat:
    """A rank and its place in a step, as it reports them."""

    rank: int
    host: str
    pid: int
    step: int  # finished
    place: int  # in the one after that, of PLACES
    count: int  # beats so far
    still: float  # seconds at that place

    def words(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Watchdog(Callback):
    """Ends the run when it stands still.

    Args:
        folder: the run's; each rank's stack goes there as ``stack-rank-<n>.txt``.
        timeout: seconds without a step forward.
    """

    def __init__(self, folder: Path, timeout: float, control: ControlGroup) -> None:
        self.folder, self.timeout, self.control = folder, timeout, control
        self.rank = Rank.here().index
        self._step, self._place, self._moved = 0, 0, time.monotonic()
        self._store: dist.Store | None = None
        self._training = self._trained = False
        self._done = threading.Event()
        self._launcher: Any = None
        self._parent = os.getppid()
        self._mine: Beat | None = None

    @contextmanager
    def over(self, trainer: L.Trainer) -> Iterator[None]:
        """Watches meanwhile: the processes that ``trainer`` starts all the time, the steps while there are some."""
        self._launcher = trainer.strategy.launcher
        # of the ranks that are about to be started: torch prints stacks of its own for a lost connection
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        threading.Thread(target=self.watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._done.set()

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # the first samples are read before on_train_start
        self.control.open(trainer)
        if self.control.world > 1:
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            patience = timedelta(seconds=min(60.0, self.timeout))
            if self.rank == 0:
                self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            port = self.control.from_first(getattr(self._store, "port", None))
            if self._store is None:
                self._store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
        self._at(trainer, 0)
        self._beat(0)
        self.control.gather(None)  # all have reported their places
        self._training = True

    def _at(self, trainer: L.Trainer, place: int) -> None:
        self._step, self._place, self._moved = trainer.global_step, place, time.monotonic()

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, 0)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, 1)

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, 2)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, 3)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._at(trainer, 0)  # the other callbacks have had the batch: this one is the last

    def on_train_end(self, *_: Any) -> None:
        self._training, self._trained = False, True

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        # the reason is printed elsewhere, which may take a while; one process alone waits for no other
        if self.control.world == 1 or isinstance(exception, Mistake) or is_out_of_memory(exception):
            self._done.set()

    def progress(self) -> None:
        """What takes long beside the steps, such as a validation, is not standing still."""
        self._moved = time.monotonic()

    def explain(self, error: BaseException) -> None:
        """Ends the run with the reason, when ``error`` is of what joins the ranks, such as one that is gone."""
        text = str(error)
        lost = any(word in text for word in _LOST)
        if not lost and not isinstance(error, dist.DistError):
            return
        for _ in range(30):  # a killed process takes a moment to be seen as such
            self.look_at_family()
            time.sleep(0.1)
        what = "has lost another rank" if lost else "cannot reach the others"
        self.end(f"rank {self.rank} {what}: {text.splitlines()[0]}", speak=True)

    def look_at_family(self) -> None:
        """Ends this rank when the one that started it, or one that it started, has ended otherwise than well."""
        # one that has trained may be left by a rank 0 that has nothing more to do
        if self.rank and not self._trained and os.getppid() != self._parent:
            self.end("rank 0 was killed", speak=self.rank == 1)
        for rank, child in enumerate(getattr(self._launcher, "procs", ()), 1):
            if child.poll():
                self.end(f"rank {rank} (process {child.pid}) {_how_it_ended(child.returncode)}", speak=True)

    def watch(self) -> None:
        """The body of the watchdog's thread, until the run ends; a fault of its own ends the run in words."""
        try:
            self._keep_watch()
        except Exception as error:  # without this thread the run might wait for ever
            self.end(f"the watchdog of rank {self.rank} broke: {error!r}", speak=True)

    def _keep_watch(self) -> None:
        count = 0
        while not self._done.wait(1.0):
            count += 1
            relieve_observer()
            self.look_at_family()
            if not self._training:
                continue
            self._beat(count)
            if time.monotonic() - self._moved > self.timeout:
                self._stuck()

    def _beat(self, count: int) -> None:
        host, pid = socket.gethostname(), os.getpid()
        self._mine = mine = Beat(self.rank, host, pid, self._step, self._place, count, time.monotonic() - self._moved)
        if self._store is None:
            return
        try:
            self._store.set(f"beat-{mine.rank}", json.dumps(asdict(mine)))
        except RuntimeError:  # rank 0, which holds the store, does not answer
            return

    def _stuck(self) -> None:
        """Collects where everybody is, for long enough to distinguish silent ranks from slow ones, and ends the run."""
        # before anything else: where this rank is, for who asks why
        with (
            contextlib.suppress(OSError),
            (self.folder / f"stack-rank-{self.rank}.txt").open("w", encoding="utf-8") as file,
        ):
            faulthandler.dump_traceback(file)
        first = second = self._ask_all()
        if not first:  # the store itself is silent, which rank 0 holds
            silent = [0]
            self._kill_parent()
        else:
            for count in range(_LATER, _LATER + 4):
                time.sleep(1)
                self._beat(count)
            if self._done.is_set() or not self._training or time.monotonic() - self._moved < self.timeout:
                return
            second = self._ask_all()
            silent = [rank for rank in range(self.control.world) if not _alive(first.get(rank), second.get(rank))]
            if not silent and min(beat.still for beat in second.values()) < self.timeout:
                return  # somebody moves, whom the others wait for
        alive = (rank for rank in range(self.control.world) if rank not in silent)
        speaker = min(alive, default=self.rank)
        if silent:
            seen = [second.get(rank) or first.get(rank) for rank in silent]
            names = [beat.words() if beat else f"rank {rank}" for rank, beat in zip(silent, seen, strict=True)]
            step = min((beat.step for beat in seen if beat), default=self._step)
            why = f"{', '.join(names)} gives no sign of life; its last finished step is {step}"
        else:
            last = min(second.values(), key=lambda beat: (beat.step, beat.place))
            behind = [beat for beat in second.values() if (beat.step, beat.place) == (last.step, last.place)]
            names = [beat.words() for beat in behind] if len(behind) < len(second) else ["every rank"]
            why = f"{', '.join(names)} hangs in {PLACES[last.place]} after step {last.step}"
            if self.control.world == 1:
                why = f"the run hangs in {PLACES[last.place]} after step {last.step}"
        stacks = f"stacks: {self.folder}/stack-rank-*.txt"
        # a store that has just gone may have gone with a first rank that has said why
        speak = self._is_first() if second else self.rank == speaker and get_state(self.folder)[0] != "died"
        self.end(f"no step for {self.timeout:g} s (trainer.timeout): {why}; {stacks}", speak)

    def _ask_all(self) -> dict[int, Beat]:
        """The ranks' last reports; empty when the store does not answer, for which its own time-outs cannot be used:
        a frozen store keeps its clients waiting for the answer to their giving up."""
        if self._store is None:
            return {} if self._mine is None else {self.rank: self._mine}
        found: dict[int, Beat] = {}
        store = self._store

        def ask() -> None:
            for rank in range(self.control.world):
                found[rank] = Beat(**json.loads(store.get(f"beat-{rank}")))  # every rank beats from its start

        _for_a_moment(ask)
        return dict(found)

    def _is_first(self) -> bool:
        """Whether no rank has come to its end before: the others came later to where they wait, and would be ended
        with this one before they speak."""
        if self._store is None:
            return True
        count, store = [0], self._store
        _for_a_moment(lambda: count.append(store.add("ended", 1)))
        return count[-1] == 1

    def _kill_parent(self) -> None:
        """A frozen rank 0 that started this rank would stay for ever."""
        if self.rank and Rank.here().started_by == "lightning":
            os.kill(self._parent, signal.SIGKILL)

    def end(self, why: str, speak: bool) -> None:
        """Ends this process, the ranks that it started, and a rank 0 on this machine that started it.

        Where a rank has ended for a reason of its own, the run's state holds it already: the others follow it. Of what
        ranks die of, the state keeps the first.
        """
        word = get_state(self.folder)[0]
        if speak and word not in _TOLD:
            if word != "died":
                set_state(self.folder, "died", why)
            print(f"\nerror: {why}\n{how_to_go_on(self.folder)}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # the one that prints comes first
        end_now(2 if word in _TOLD else EXIT_CODE)


def _for_a_moment(ask: Callable[[], Any]) -> None:
    """Asks a store, and waits no longer than for a few seconds."""

    def asked() -> None:
        with contextlib.suppress(RuntimeError):
            ask()

    thread = threading.Thread(target=asked, daemon=True)
    thread.start()
    thread.join(5)


def relieve_observer() -> None:
    """Ends Lightning's own watch over the ranks that it started: five seconds after one has ended it kills this one,
    with whatever that is doing, and prints nothing."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]  # of none at all, it has nothing to wait for


def _alive(first: Beat | None, second: Beat | None) -> bool:
    return first is not None and second is not None and second.count != first.count


def _how_it_ended(code: int) -> str:
    if code == -9:
        return "was killed (signal 9: by somebody, or by the system when memory ran out)"
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
