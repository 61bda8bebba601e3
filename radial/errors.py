"""What a user or caller can mend, as opposed to a bug: one line each, which commands print before they exit with 2."""


class Mistake(ValueError):
    """Something that a user can mend.

    The message is one line that names the key or file, what was found, what was expected and what to do; line breaks
    in it are taken out. Commands print it and exit with code 2 (`radial.cli.command`).
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.strip().splitlines()))


class RadialError(Mistake):
    """A value that the caller gave cannot be served."""
