"""The error that means the caller asked for something impossible, as opposed to a bug in this library."""


class RadialError(ValueError):
    """A value that the caller gave cannot be served; the one-line message says what to change."""
