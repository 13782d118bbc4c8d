"""What a person sees of a search: one bar over trials x epochs while it runs, and where its time
went."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, cast

import numpy as np
import torch
from tqdm.auto import tqdm

from gputune.engine.plan import Plan
from gputune.engine.train import Spent
from gputune.memory import synchronize
from gputune.text import count, measure_of
from gputune.types import Json, first_metric

_LINE_SECONDS = 30  # between plain lines, where nobody watches a bar

_LOOK_SECONDS = 1.0  # between two words to other processes

_SHARE = 0.01  # of the work: before it is done the pace says nothing

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}, {remaining} left{postfix}]"


# What standard error raises where there is none, where it is full or has no reader, where it is
# closed.
_NO_SCREEN = AttributeError, OSError, ValueError


class _Screen:
    """Standard error, as it is at each call. What it does not take is lost: a bar must not end a
    search."""

    def __getattr__(self, name: str) -> object:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with suppress(*_NO_SCREEN):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(*_NO_SCREEN):
            sys.stderr.flush()

    def isatty(self) -> bool:
        with suppress(*_NO_SCREEN):
            return sys.stderr.isatty()
        return False


def reading_bar(numbers: Sequence[int], *, verbose: int) -> Iterable[int]:
    """Go through numbers of items that are read, behind a bar where somebody watches."""
    return cast(
        Iterable[int], Progress(verbose).new_bar(iterable=numbers, desc="reading X", unit="row")
    )


class Progress:
    """A bar that counts trial-epochs, or plain lines where standard error is no terminal; silent
    with ``verbose=0``.

    ``words`` puts what is said in the words of the door that the search came through.
    """

    def __init__(
        self,
        verbose: int,
        on_epoch: Callable[[np.ndarray], None] | None = None,
        words: Callable[[str], str] = str,
    ) -> None:
        self.verbose = verbose
        self.on_epoch = on_epoch
        self.words_of = words
        self.scoring = "score"
        self.bar: Any = None
        self.screen = _Screen()
        notebook = "ipykernel" in sys.modules
        self.plain = not self.screen.isatty() and not notebook
        # tqdm knows itself where a notebook's goes
        self.bar_file = None if notebook else self.screen
        self.begin = time.monotonic()
        self.next_line = self.begin + _LINE_SECONDS
        self.next_look = 0.0
        # Called now and then with what the bar shows, for those who look from another process.
        self.on_look: Callable[[Json], object] | None = None
        self.best = -math.inf
        self.trials_done = 0
        self.trials = 0
        self.pruned = 0
        self.said: set[str] = set()
        self.epochs_done = 0
        self.epochs = 0
        self.unit = "trial-epochs"
        self.members = 0
        self.processes = 1
        self.batches = 0

    def say(self, text: str, *, once: bool = False) -> None:
        """Print a line unless ``verbose`` is 0; with ``once`` not again in this search."""
        if self.verbose >= 1 and not (once and text in self.said):
            self.said.add(text)
            tqdm.write(self.words_of(text), file=self.screen)

    def plan(self, plan: Plan, *, aloud: bool = True) -> None:
        """Take note of the plan of what trains next, and say it; of batches that of the first."""
        self.processes = plan.workers
        if aloud and not self.batches:
            self.say(f"plan: {plan}", once=True)

    def new_bar(self, **options: Any) -> Any:
        """Return a bar of tqdm's with some options, silent where nobody watches."""
        is_silent = self.verbose < 1 or self.plain
        return tqdm(
            file=self.bar_file, disable=is_silent, dynamic_ncols=True, leave=False, **options
        )

    @contextmanager
    def bar_over(self, trials: int, epochs: int) -> Iterator[None]:
        """Show the bar inside, for so many trials more; inside of another bar, for a batch of its
        trials, that one."""
        if self.bar is not None:
            yield
            self.batches += 1
            return
        if not self.epochs:
            self.begin = time.monotonic()
        self.unit = "trials" if epochs == 1 else "trial-epochs"
        self.trials = self.trials_done + trials
        self.epochs = self.epochs_done + trials * epochs
        self.bar = self.new_bar(
            total=self.epochs, initial=self.epochs_done, bar_format=_FORMAT, unit=self.unit
        )
        self._show()
        try:
            yield
        finally:
            self.bar.close()
            self.bar = None

    def advance(self, trial_epochs: int, curves: np.ndarray) -> None:
        """So many more trial-epochs are done; their scores are ``curves`` (C, epochs, F)."""
        curves = first_metric(curves, axes=3)
        self.epochs_done += trial_epochs
        self.bar.update(trial_epochs)
        # A member that has diverged is no longer one.
        self.members = int(np.isfinite(curves[:, -1:]).sum())
        mean = curves.mean(-1)
        if np.isfinite(mean).any():
            self.best = max(self.best, float(np.nanmax(mean)))
        self._show()
        if self.on_epoch is not None:
            self.on_epoch(curves)

    def finished(self, trials: int, *, pruned: int = 0) -> None:
        """So many more trials are done, some of them because a rung pruned them."""
        self.trials_done += trials
        self.pruned += pruned
        self._show()

    def spare(self, trial_epochs: int, *, trials: int = 0) -> None:
        """So many trial-epochs, and trials, will not be trained: they left early, or never
        began."""
        self.trials -= trials
        self.epochs -= trial_epochs
        self.bar.total = self.epochs
        self._show()

    @property
    def words(self) -> str:
        """What the bar says beside its counts."""
        measure = measure_of(self.scoring, self.best)
        n = self.processes
        best = f"{measure.name} {measure.text(self.best)}" if self.best > -math.inf else "-"
        members = f", {self.members} members{'' if n == 1 else f' in each of {n} processes'}"
        pruned = f", {self.pruned} pruned" if self.pruned else ""
        return (
            f"trials {self.trials_done}/{self.trials}, best "
            f"{best}{members if self.members > 1 else ''}{pruned}"
        )

    @property
    def seconds_left(self) -> float | None:
        """An estimate by the pace so far; None before there is one."""
        if self.epochs_done < max(1.0, _SHARE * self.epochs):
            return None
        pace = (time.monotonic() - self.begin) / self.epochs_done
        return pace * max(0, self.epochs - self.epochs_done)

    def _show(self) -> None:
        self.bar.set_postfix_str(self.words, refresh=False)
        if self.on_look is not None and time.monotonic() > self.next_look:
            self.next_look = time.monotonic() + _LOOK_SECONDS
            best = self.best if math.isfinite(self.best) else None
            counts = {"done": self.epochs_done, "of": self.epochs, "unit": self.unit}
            self.on_look({**counts, "best": best, "left": self.seconds_left})
        if self.plain and time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + _LINE_SECONDS
            ending = "" if (left := self.seconds_left) is None else f", {left:.0f} s left"
            self.say(f"{self.words}, {self.epochs_done}/{self.epochs} {self.unit}{ending}")


PREPARING = "reading and preparing rows"
"""The name of a clock that is used in several places."""

# of the square matrices whose product is the measure
_SIZE = 1024
_REPEATS = 8


class Profile:
    """Seconds of a search by what they were spent on, the arithmetic of its steps, and why it
    ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spent = Spent()
        self.plan: Plan | None = None
        self.ended = ""  # why the search ended before its last trial, where it was good enough
        self.device = torch.device("cpu")
        self.begin = time.perf_counter()

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Count the time inside under a name; what is counted inside of it by another clock is not
        counted twice."""
        self.seconds.setdefault(name, 0.0)  # in the order in which they begin
        begin = time.perf_counter()
        others = sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - others
            self.seconds[name] += time.perf_counter() - begin - inside

    def report(self, *, dtype: torch.dtype, device: torch.device) -> str:
        """Return the table; it measures the product of large matrices on the device, for a fraction
        of a second."""
        total = time.perf_counter() - self.begin
        rest = max(0.0, total - sum(self.seconds.values()))
        workers, threads = (1, 1) if self.plan is None else (self.plan.workers, self.plan.threads)
        steps = self.spent.steps
        scores = self.spent.scores
        lines = ["Where the time went:", ""]
        for name, seconds in [*self.seconds.items(), ("the rest", rest)]:
            lines.append(f"  {name:<30} {seconds:8.2f} s  {seconds / total:4.0%}")
            whole = seconds * workers
            if name == "training" and steps and whole:  # a descent and a solver are not told apart
                waiting = max(0.0, whole - (steps + scores))
                parts = {"steps": steps, "scores": scores, "starting, waiting, telling": waiting}
                lines += [
                    f"    {part:<32} {spent / whole:9.0%} of it" for part, spent in parts.items()
                ]
        if steps and self.spent.operations > 0:
            place = "a GPU" if device.type == "cuda" else count(workers * threads, "core")
            peak = product_speed(workers * threads, dtype, device)
            # Seconds of steps are added up over processes, of which each one has its threads.
            reached = self.spent.operations / (steps / workers)
            lines += [
                f"\nSteps reached {reached / 1e9:.1f} GFLOP/s, {reached / peak:.0%} of the "
                f"{peak / 1e9:.1f} that the product of two {_SIZE} x {_SIZE} matrices reaches "
                f"here on {place} ({str(dtype).removeprefix('torch.')})."
            ]
        return "\n".join(lines)


def product_speed(cores: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return floating-point operations a second of the product of large matrices: one on each core,
    or on a GPU."""
    a, b = (torch.rand(_SIZE, _SIZE, dtype=dtype, device=device) for _ in range(2))

    def multiply(_: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread alone
        try:
            for _ in range(_REPEATS):
                a @ b
        finally:
            torch.set_num_threads(before)
        synchronize(device)

    at_once = cores if device.type == "cpu" else 1
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(multiply, range(at_once)))  # the first products make room and start threads
        begin = time.perf_counter()
        list(pool.map(multiply, range(at_once)))
        seconds = time.perf_counter() - begin
    return 2.0 * _SIZE**3 * _REPEATS * at_once / seconds
