"""What a user or caller can mend, as opposed to a bug: commands print it and exit with code 2."""


class Mistake(ValueError):
    """Something that a user can mend.

    The message names the key or file, what was found, what was expected and what to do. Commands print it and exit with
    code 2 (`radial.cli.command`).
    """


class RadialError(Mistake):
    """A value that the caller gave cannot be served."""
