"""Where the time of a search went, and how near its steps came to the machine's matrix products."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from gputune.engine.plan import Plan
from gputune.engine.train import Spent
from gputune.text import count

PREPARING = "reading and preparing rows"
"""The name of a clock that is used in several places."""

_SIZE, _REPEATS = 1024, 8  # of the square matrices whose product is the measure


class Profile:
    """Seconds of a search by what they were spent on, and the arithmetic of its steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spent = Spent()
        self.plan: Plan | None = None
        self.device = torch.device("cpu")
        self.begin = time.perf_counter()

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Count the time inside under a name; what is counted inside of it by another clock is not counted twice."""
        self.seconds.setdefault(name, 0.0)  # in the order in which they begin
        begin, others = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - others
            self.seconds[name] += time.perf_counter() - begin - inside

    def trained(self, spent: Spent) -> None:
        """Count a chunk's training, which may have run in another process."""
        self.spent += spent

    def report(self, *, dtype: torch.dtype, device: torch.device) -> str:
        """Return the table; it measures the product of large matrices on the device, for a fraction of a second."""
        total = time.perf_counter() - self.begin
        rest = max(0.0, total - sum(self.seconds.values()))
        lines = ["Where the time went:", ""]
        for name, seconds in [*self.seconds.items(), ("the rest", rest)]:
            lines.append(f"  {name:<30} {seconds:8.2f} s  {seconds / total:4.0%}")
            if name == "training" and self.spent.steps:  # a descent and a solver are not told apart
                lines += self._inside(seconds)
        return "\n".join([*lines, *self._share(dtype, device)])

    def _inside(self, seconds: float) -> list[str]:
        """What the cores did while the search trained."""
        at_once = 1 if self.plan is None else self.plan.workers
        whole = seconds * at_once
        parts = [("steps", self.spent.steps), ("scores", self.spent.scores)]
        parts.append(("starting, waiting, telling", max(0.0, whole - sum(part for _, part in parts))))
        return [f"    {name:<32} {part / whole:9.0%} of it" for name, part in parts if whole]

    def _share(self, dtype: torch.dtype, device: torch.device) -> list[str]:
        if not self.spent.steps or not self.spent.operations > 0:
            return []
        workers, threads = (1, 1) if self.plan is None else (self.plan.workers, self.plan.threads)
        cores = workers * threads
        place = "a GPU" if device.type == "cuda" else count(cores, "core")
        peak = product_speed(cores, dtype, device)
        # Seconds of steps are added up over processes, of which each one has its threads.
        reached = self.spent.operations / (self.spent.steps / workers)
        return [
            "",
            f"Steps reached {reached / 1e9:.1f} GFLOP/s, {reached / peak:.0%} of the {peak / 1e9:.1f} that the product "
            f"of two {_SIZE} x {_SIZE} matrices reaches here on {place} "
            f"({str(dtype).removeprefix('torch.')}).",
        ]


def product_speed(cores: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return floating-point operations a second of the product of large matrices: one on each core, or on a GPU."""
    a, b = (torch.rand(_SIZE, _SIZE, dtype=dtype, device=device) for _ in range(2))

    def multiply(_: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread alone
        try:
            for _ in range(_REPEATS):
                a @ b
        finally:
            torch.set_num_threads(before)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    at_once = cores if device.type == "cpu" else 1
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(multiply, range(at_once)))  # the first products make room and start threads
        begin = time.perf_counter()
        list(pool.map(multiply, range(at_once)))
        seconds = time.perf_counter() - begin
    return 2.0 * _SIZE**3 * _REPEATS * at_once / seconds
