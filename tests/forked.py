"""Processes that are forks of one which has imported everything: they begin at once, where a new
one takes seconds."""

import atexit
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from types import ModuleType
from unittest import mock

# In the process that is forked, by its import of this file: all that a search may import.
IMPORTS = [
    "gputune.cli.main",
    "gputune.cli.tune",
    "gputune.tuning.pipeline",
    "sklearn.datasets",
    "scipy.stats",
]
FORKS = multiprocessing.get_context("forkserver")
HERE = os.path.dirname(__file__)


class Fork:
    """A process that runs code like ``python -P -c`` in a separate session; used like a
    ``subprocess.Popen``.
    """

    def __init__(
        self, code: str, *arguments: object, cwd: object = None, **environment: str
    ) -> None:
        begun_with = {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE, "PYTHONSAFEPATH": "1"}
        with mock.patch.dict(os.environ, begun_with):
            FORKS.set_forkserver_preload(IMPORTS)
            forkserver.ensure_running()
        (out, out_end), (err, err_end) = FORKS.Pipe(duplex=False), FORKS.Pipe(duplex=False)
        told = (
            code,
            [*map(str, arguments)],
            str(cwd or os.getcwd()),
            {**os.environ, **environment},
        )
        self.process = FORKS.Process(target=_run, args=(*told, out_end, err_end))
        # The program that runs the tests is not imported anew.
        with mock.patch.dict(sys.modules, {"__main__": ModuleType("__main__")}):
            self.process.start()
        out_end.close()
        err_end.close()
        self.pid = self.process.pid
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end in (out, err))

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """Return ``returncode``."""
        return self.process.exitcode

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.kill()

    def wait(self) -> int | None:
        """Wait for the end, and return the exit code; the output is no longer read."""
        self.process.join()
        self.stdout.close()
        self.stderr.close()
        return self.process.exitcode

    def communicate(self) -> tuple[str, str]:
        """Return the output until the end."""
        with ThreadPoolExecutor(1) as pool:
            err = pool.submit(self.stderr.read)
            out = self.stdout.read()
        self.wait()
        return out, err.result()


def _run(
    code: str,
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    out: Connection,
    err: Connection,
) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, end in ((1, out), (2, err)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.argv = ["-c", *arguments]
    sys.modules["__main__"] = main = ModuleType("__main__")
    try:
        exec(code, vars(main))
    finally:
        # first, as an interpreter that ends does: or idle workers are waited for
        threading._shutdown()
        atexit._run_exitfuncs()
