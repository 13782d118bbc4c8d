"""Python's garbage collector, held back where many objects are made and few of them are garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_MANY = 10_000
"""New objects from which on the collector does not look at them soon."""


@contextmanager
def without_collector() -> Iterator[None]:
    """Hold the collector back: of a million new objects none is garbage, and it took a third of the
    time.

    An import that makes so many goes through all that torch has made before, which takes as long as
    the import itself.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if gc.get_count()[0] > _MANY and not gc.get_freeze_count():
                # They count as old ones, unseen; else the next small collection would go through
                # all of them.
                gc.freeze()
                gc.unfreeze()
            gc.enable()
