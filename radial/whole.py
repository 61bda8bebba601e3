"""Files that are written whole or not at all. `data.io.files` does more, and this library stands without it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A hidden name beside ``path``, with its ending: what is written under it becomes ``path`` when all goes well.

    An OSError on the way there is one of ``path``, which a full disk's names no file and a rename's the hidden one.
    """
    fresh = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield fresh
        fresh.replace(path)
    except OSError as error:
        if error.errno is not None:  # without, its text is all that it says
            error.filename = str(path)
        raise
    finally:
        fresh.unlink(missing_ok=True)
