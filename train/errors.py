"""The error that stops a command with one line and exit code 2."""


class UserError(ValueError):
    """A mistake of the user's: the message names the key or file, what was found, what was expected, what to do."""
