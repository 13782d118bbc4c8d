"""The processes of torture.py: begun as forks of it, and killed from outside while they work."""

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable


def begin(work: Callable[..., object], *arguments: object) -> int:
    """Begin some work in a process of its own; return its id. It ends with 0, or with 1 and a traceback."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has threads, all of them asleep
        child = os.fork()
    if child == 0:
        code = 1
        try:
            work(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def end(child: int) -> int:
    """Wait for a process and return its exit code, minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(
    work: Callable[..., object],
    *arguments: object,
    method: tuple[type, str],
    least: int,
    most: int,
    pause: float,
) -> None:
    """Begin some work, and kill it so many seconds after the call of a method that makes ``least``.

    It waits for that before it makes more than ``most`` calls, so that the kill comes in time however slow we are.
    """
    told, telling = os.pipe()
    child = begin(_tell, telling, method, least, most, work, *arguments)
    os.close(telling)
    os.read(told, 1)
    os.close(told)
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    code = end(child)
    assert code == -signal.SIGKILL, code


def _tell(
    telling: int,
    method: tuple[type, str],
    least: int,
    most: int,
    work: Callable[..., object],
    *arguments: object,
) -> None:
    """Work, and write to a pipe when ``least`` calls are made."""
    calls, original = 0, getattr(*method)

    def call(*its: object, **options: object) -> object:
        nonlocal calls
        if calls == most:
            signal.pause()
        result = original(*its, **options)
        calls += 1
        if calls == least:
            os.write(telling, b"x")
        return result

    setattr(*method, call)
    work(*arguments)
