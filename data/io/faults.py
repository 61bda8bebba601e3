"""Which failures of reading may pass, and which stay: a wrong address ends at once, a busy server is tried again."""

from __future__ import annotations

import contextlib
import errno
import ftplib
import http
import http.client
import socket
import ssl
from collections.abc import Iterator

from data.errors import DataError

AGAIN = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)
NO_COMMAND = (126, 127)  # a shell's: it may not be run, there is none
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ssl.SSLCertVerificationError,
            ftplib.error_perm)  # fmt: skip
_LASTING_NUMBERS = frozenset(
    (errno.EMFILE, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EFBIG,
     errno.ENOSPC, errno.EROFS)
)  # fmt: skip
_MISTAKES = (TypeError, ValueError, LookupError, AttributeError, NameError, ImportError, AssertionError,
             ArithmeticError, NotImplementedError)  # fmt: skip
# Of botocore, google.auth and azure.identity: what a client says before it has asked anybody.
_UNCONFIGURED = frozenset(
    ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError", "ParamValidationError",
     "DefaultCredentialsError", "CredentialUnavailableError")
)  # fmt: skip


class CommandError(OSError):
    """A `pipe:` command that failed.

    Args:
        status: its exit code.
        said: the last line that it wrote to stderr.
        began: whether it had given a byte by then.
    """

    def __init__(self, status: int, said: str, began: bool) -> None:
        super().__init__(f"the command exited with {status}{': ' if said else ''}{said}")
        self.status, self.began = status, began


class ClientError(OSError):
    """What a client of fsspec's raised that is no OSError; it is the cause."""


@contextlib.contextmanager
def client_errors() -> Iterator[None]:
    """What the clients of fsspec's file systems raise of their own comes out as a `ClientError`.

    Errors of Python's own kinds that no network raises, a TypeError for example, are somebody's bug and come out as
    they are.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, http.client.HTTPException, DataError)) or type(error).__module__ == "builtins":
            raise
        raise ClientError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def code_of(error: BaseException) -> int | None:
    """The HTTP status that a server answered with, of whatever client's error; None where there is none."""
    for each in _chain(error):
        answer = getattr(each, "response", None)
        about = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else {}  # botocore's
        for found in (*(getattr(each, name, None) for name in ("code", "status", "status_code")),
                      about.get("HTTPStatusCode")):  # fmt: skip
            if isinstance(found, int) and 100 <= found < 600 and not isinstance(each, CommandError):
                return found
    return None


def reason_of(error: BaseException) -> str:
    """What to say of it, in one line."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    code = getattr(error, "code", None)
    words = " ".join(str(reason).split()) or type(error).__name__
    return words if code is None else f"HTTP {code} {words}"


def is_lasting(error: BaseException) -> bool:
    """Whether time does not mend it: nothing is there, it may not be read, or what asks is set up wrongly."""
    code = code_of(error)
    if code is not None:
        # S3 has a time-out among its 400s, which s3fs makes a TimeoutError.
        lasting = (300 <= code < 500 and code not in AGAIN) or code == http.HTTPStatus.NOT_IMPLEMENTED
        return lasting and not isinstance(error, TimeoutError)
    for each in _chain(error):
        if isinstance(each, CommandError):
            return each.status in NO_COMMAND
        if isinstance(each, (*_LASTING, http.client.InvalidURL, http.client.UnknownProtocol)):
            return True
        if isinstance(each, OSError) and each.errno in _LASTING_NUMBERS:
            return True
        if not isinstance(each, OSError) and (isinstance(each, _MISTAKES) or type(each).__name__ in _UNCONFIGURED):
            return True
    return False


def is_nobody(error: BaseException, before: BaseException | None) -> bool:
    """Whether it looks as if nothing were there: a port that refuses, a name that nobody has, or a command that fails
    with its first byte, in the same words as `before`. Where something has answered before it may come back."""
    if isinstance(error, CommandError):
        return not error.began and isinstance(before, CommandError) and str(error) == str(before)
    return any(
        isinstance(each, ConnectionRefusedError)
        or (isinstance(each, OSError) and each.errno == errno.ECONNREFUSED)
        or (isinstance(each, socket.gaierror) and each.errno == socket.EAI_NONAME)
        or type(each).__name__ == "EndpointConnectionError"  # botocore's
        for each in _chain(error)
    )


def is_too_many_files(error: BaseException) -> bool:
    """Whether this process has as many files open as it may."""
    return any(isinstance(each, OSError) and each.errno == errno.EMFILE for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was made from."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        each = waiting.pop(0)
        if isinstance(each, BaseException) and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [getattr(each, "reason", None), each.__cause__]
