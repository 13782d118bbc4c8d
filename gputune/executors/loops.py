"""Who calls the objective of a user's own loop: this process, or worker processes with a GPU or some cores each."""

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import torch
from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

from gputune.engine.plan import cores
from gputune.errors import InputError
from gputune.executors.executor import LOSSES
from gputune.executors.objective import Ending, Task, call_in_worker
from gputune.executors.pools import dumped, one_worker, submit, why_lost
from gputune.types import Config

_LOOK = 0.5
"""Seconds between two looks at the clock while workers train."""

Claim = Callable[[int], bool]
Trials = Sequence[tuple[int, Config]]


class ThisProcess:
    """Calls the objective here, one trial after another."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def train(self, trials: Trials, claim: Claim) -> Iterator[tuple[int, Ending]]:
        """Yield what came of the trials that ``claim`` grants, by number, until time is over."""
        for number, params in trials:
            if self.task.stop.is_over():
                return
            if claim(number):
                yield number, self.task(number, params)

    def close(self) -> None:
        """There is nothing to end."""


class Workers:
    """Worker processes, each with environment variables of its own, that call the objective, a trial at a time each."""

    def __init__(self, task: Task, environments: Sequence[Mapping[str, str]], folder: Path) -> None:
        self.stop, self.path = task.stop, folder / "task.pkl"
        try:
            self.path.write_bytes(dumped(task, [task.objective]))
        except Exception as error:  # whatever pickling it raises
            raise InputError(
                f"objective cannot be sent to worker processes ({type(error).__name__}: {error}). Make what it uses "
                "inside of it, or choose workers=1, which calls it in this process."
            ) from error
        self.environments = {one_worker(environment): environment for environment in environments}
        self.free = list(self.environments)

    def train(self, trials: Trials, claim: Claim) -> Iterator[tuple[int, Ending]]:
        """Yield what came of the trials that ``claim`` grants, by number, until time is over."""
        waiting, losses = deque(trials), Counter[int]()
        running: dict[Future[Ending], tuple[ProcessPoolExecutor, int, Config]] = {}
        while True:
            while self.free and waiting and not self.stop.is_over():
                number, params = waiting.popleft()
                if losses[number] or claim(number):
                    pool = self.free.pop()
                    future = submit(pool, call_in_worker, str(self.path), number, params)
                    running[future] = pool, number, params
            if not running:
                return
            for future in wait(running, _LOOK, FIRST_COMPLETED).done:
                pool, number, params = running.pop(future)
                error = future.exception()
                self.free.append(self._instead_of(pool) if isinstance(error, BrokenProcessPool) else pool)
                if error is None:
                    yield number, future.result()
                    continue
                if not isinstance(error, BrokenProcessPool):
                    raise error
                losses[number] += 1
                if losses[number] < LOSSES:
                    waiting.appendleft((number, params))
                else:
                    why = why_lost(error).removesuffix(".")
                    reason = f"it has lost {LOSSES} worker processes, the last because {why}"
                    yield number, Ending("failed", math.nan, (), math.nan, reason)

    def _instead_of(self, lost: ProcessPoolExecutor) -> ProcessPoolExecutor:
        pool = one_worker(environment := self.environments.pop(lost))
        self.environments[pool] = environment
        return pool

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for pool in self.environments:
            pool.shutdown(wait=False, kill_workers=True)


def environments(workers: int | None, n_trials: int) -> list[dict[str, str]]:
    """Return the environment of each worker: one GPU each where there are some, else its part of the cores.

    ``workers`` None: one a GPU, or one a core. A GPU is chosen by CUDA_VISIBLE_DEVICES, so that "cuda" is it.
    """
    gpus = _gpus()
    number = workers or max(1, min(len(gpus) or cores(), n_trials))
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores() // number))}
    devices = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {} for i in range(number)]
    return [{**threads, **device} for device in devices]


def _gpus() -> list[str]:
    """Return the names of the GPUs that this process may use."""
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (names or list(map(str, range(number))))[:number]
