"""Signals: a run that is asked to stop ends after its micro-batch, saves a checkpoint and reports whether it goes on.

    SIGINT                  stop: checkpoint and exit; a second one, half a second later or more, exits at once
    SIGTERM, SIGUSR1        requeue: checkpoint and exit, to be started again (SLURM's signals); rank 0 notes SIGUSR1
                            in the run's folder, as the job does not start again what had no time for a checkpoint
    SIGHUP                  the same: the terminal has closed; nohup and its like, which ignore it, are let be

Signals reach ranks at different moments, so all ranks agree at the end of every micro-batch whether this one was the
last, and at every forward pass of what takes long beside the steps: a validation, the prompts' clips, and after
training the held-out clips and what is made of them. These are then left. So are the gradients of a step that lacks
micro-batches: its checkpoint is of the step before, and the resumed run computes them anew, the same, since data and
noise are functions of seed, place in the data and sample.
They are taken by a thread: Python's own handlers wait for the main thread, which may wait for another rank in C.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from train.errors import EXIT_CODES, REQUEUE, STOP, WORDS, Asked
from train.parallel.control_group import ControlGroup
from train.parallel.processes import end_now
from train.storage.checkpoints import how_to_go_on
from train.storage.run_folder import TIME_UP, get_state, set_state

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_ONE_WISH = 0.5
"""Seconds within which a SIGINT that comes again is the same wish: a terminal sends it to torchrun and to its ranks, to
whom torchrun passes it on; SLURM sends it to a job's step twice."""


class StopSignals(Callback):
    """Turns signals into an orderly end of training.

    Attributes:
        asked: what this process was asked, 0 for nothing.
        agreed: what the ranks have agreed to do after the last micro-batch, the same on all; 0 for going on.
    """

    def __init__(self, folder: Path, rank: int, control: ControlGroup) -> None:
        self.folder, self.rank, self.control = folder, rank, control
        self.asked = self.agreed = 0
        self._interrupted = 0.0
        self._taken = tuple(n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over, and gives them back."""
        if self.rank == 0:
            with suppress(OSError):
                (self.folder / TIME_UP).unlink(missing_ok=True)  # of an earlier start
        before = {number: signal.getsignal(number) for number in self._taken}
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        number_before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._hear, args=(ear,), name="signals", daemon=True)
        thread.start()
        self._take_over()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(number_before)
            mouth.shutdown(socket.SHUT_WR)  # a forked process may hold it open
            thread.join()
            mouth.close()
            ear.close()

    def _hear(self, ear: socket.socket) -> None:
        while numbers := ear.recv(64):
            for number in numbers:
                if number in self._taken:
                    self._heard(number)

    def _heard(self, number: int) -> None:
        if number == signal.SIGINT:
            if self.asked == STOP and time.monotonic() - self._interrupted > _ONE_WISH:
                self._exit_now()
            self._interrupted = time.monotonic()
        if self.asked == 0 and self.rank == 0:
            again = "; again: at once" if number == signal.SIGINT else ""
            with suppress(OSError):  # the terminal may be what is gone
                os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint and stopping{again}\n".encode())
        if number == signal.SIGUSR1 and self.rank == 0:
            with suppress(OSError):
                (self.folder / TIME_UP).touch()
        # who asks to stop does not want it started again
        self.asked = STOP if number == signal.SIGINT or self.asked == STOP else REQUEUE

    def _exit_now(self) -> None:
        if self.rank == 0 and get_state(self.folder)[0] == "running":
            set_state(self.folder, WORDS[STOP], f"interrupted twice; {how_to_go_on(self.folder)}")
        end_now(EXIT_CODES[STOP])

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._take_over()  # Lightning has put its own SIGTERM handler there, which starts a collective at any moment
        self.control.open(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.agree(trainer)

    def agree(self, trainer: L.Trainer) -> bool:
        """Whether this micro-batch is the last, as a rank was asked to stop until now. Every rank must call it."""
        if self.agree_in(self.control):
            trainer.should_stop = True
        return self.agreed != 0

    def check(self) -> None:
        """For what one rank does alone.

        Raises:
            Asked: it was asked to stop.
        """
        if self.asked:
            raise Asked

    def agree_in(self, group: ControlGroup) -> bool:
        """Whether a rank of the group was asked to stop until now. Every rank of it must call it."""
        stop, requeue = group.any([self.asked == STOP, self.asked == REQUEUE])
        self.agreed = STOP if stop else REQUEUE if requeue else 0  # of two wishes the user's, to stop, wins
        return self.agreed != 0

    def _take_over(self) -> None:
        """Keeps the signals from doing what they do to a process by themselves; Python wakes the thread for them."""
        for number in self._taken:
            signal.signal(number, lambda *_: None)
