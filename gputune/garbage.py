"""A pause of Python's garbage collector, for code that makes many objects and little garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_MANY = 10_000
"""Above this number of new objects, the next garbage collections skip the new objects."""


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause Python's garbage collector inside the block, to create many objects faster.

    Among a million new objects there was no garbage, and the collector took a third of the time. In
    a large import the collector also visits all objects that torch has created before. That takes
    as long as the import itself.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if gc.get_count()[0] > _MANY and not gc.get_freeze_count():
                # Freezing and unfreezing marks the new objects as old without visiting them.
                # Otherwise the next small collection would visit all of them.
                gc.freeze()
                gc.unfreeze()
            gc.enable()
