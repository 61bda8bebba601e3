"""How a command ends early: a mistake of the user's, or the wish that a run stops."""

from radial.errors import Mistake


class UserError(Mistake):
    """A mistake of the user's: the message names the key or file, what was found, what was expected, what to do."""


class Asked(Exception):
    """The run was asked to stop, in the middle of what can be left."""


STOP, REQUEUE = 1, 2
"""What a signal asks for: to stop, or to stop and be started again (`train.callbacks.stop`)."""
WORDS = {STOP: "stopped", REQUEUE: "requeue"}
"""The run's state after each request (`train.storage.run_folder.set_state`)."""
EXIT_CODES = {STOP: 130, REQUEUE: 75}
"""Of rank 0: as after Ctrl-C, and EX_TEMPFAIL."""
