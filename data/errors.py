"""The error that a user's mistake in the data raises."""

from __future__ import annotations


class DataError(ValueError):
    """A mistake in the data or in what was asked of it, told in one line.

    The message names the file or key, what was found, what was expected and what to do. Command lines print it to
    stderr and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.strip().splitlines()))


class BadSampleError(DataError):
    """A sample whose bytes arrived, but are not what the manifest lists; the others of its shard may be good."""
