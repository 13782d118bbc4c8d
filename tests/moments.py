"""Events at an exact moment: an action at a call of a function, in this process or in one that a
test starts.
"""

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gputune.engine.stop import Stop

HERE = Path(__file__).parent


def at_call(
    owner: Any,
    name: str,
    number: int,
    do: Callable[[], object],
    *,
    before: bool = False,
    patch: Any = setattr,
) -> None:
    """Let something happen right after the n-th call of ``owner.name``, or right before it."""
    original = getattr(owner, name)
    calls = itertools.count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        now = next(calls) == number
        if now and before:
            do()
        result = original(*arguments, **options)
        if now and not before:
            do()
        return result

    patch(owner, name, call)


def time_is_over(patch: Any, looks: int) -> None:
    """Let a deadline have passed from the n-th time on that training looks at it, which it does
    after every epoch."""
    is_over = Stop.is_over
    made = itertools.count(1)

    def looked(stop: Stop) -> bool:
        if stop.deadline is not None and next(made) >= looks:
            stop.deadline = -math.inf
        return is_over(stop)

    patch.setattr(Stop, "is_over", looked)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that finds this file."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def at_finish(number: int, do: str, *, before: bool = False) -> str:
    """Return code for the start of a process: it does something after a search keeps its n-th
    chunk's results.

    ``before``: or before it does.
    """
    return (
        "import os, signal, shutil; from gputune.study.ledger import Ledger; from moments import "
        f"at_call\nat_call(Ledger, 'finish', {number}, lambda: {do}, before={before})\n"
    )
