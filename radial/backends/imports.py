"""Whether the libraries that bring kernels can be imported."""

from __future__ import annotations

import importlib
from functools import cache


@cache
def import_problem(name: str, module: str) -> str | None:
    """None where a library can be imported, else what is wrong and what to do.

    Args:
        name: the library's own.
        module: what is imported of it, or of this project, which then imports it.
    """
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything, also from its own import-time checks
        return f'{name} does not import ({type(error).__name__}: {error}): pip install -e ".[gpu]"'
    return None
