"""What goes wrong with a cache on disk."""

from __future__ import annotations

from types import ModuleType


class CacheError(ValueError):
    """A cache that cannot be read as it is, or not be written as asked; the message names file and field."""


def arrow() -> ModuleType:
    """pyarrow, which only caches need: importing the package does not import it."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ImportError(
            f"a teacher cache needs pyarrow, which did not import ({error}): pip install pyarrow"
        ) from error
    return pyarrow
