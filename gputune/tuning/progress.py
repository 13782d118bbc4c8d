"""The progress bar of a running search, and the table of the times of its parts.

A trial-epoch is one epoch of one trial.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import numpy as np
import torch
from tqdm.auto import tqdm

from gputune.engine.backend import torch_threads
from gputune.engine.plan import Plan
from gputune.engine.train import Spent
from gputune.ground.device import synchronize
from gputune.ground.errors import PYTHON, Interface
from gputune.ground.text import count, measure_of
from gputune.ground.types import Json, first_metric
from gputune.ground.within_epoch import Running, reported_to, running_in_workers

_LINE_SECONDS = 30  # between plain lines, if no bar is shown

# Seconds after the last complete epoch from which the share of the running epoch is shown, and
# between two such shares.
_LONG_EPOCH = 3.0
_SHARE_SECONDS = 0.5

_LOOK_SECONDS = 1.0  # between two messages to other processes

_SHARE = 0.01  # before this share of the work is done, the remaining time is not estimated

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}, {remaining} left{postfix}]"


# The errors of a standard error that is missing, full, without a reader, or closed.
_NO_SCREEN = AttributeError, OSError, ValueError


class _Screen:
    """A text stream that writes to the current standard error.

    It drops text that standard error cannot show, so that a progress bar never ends a search.
    """

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
    """Iterate over item numbers, and show a progress bar for reading rows in a terminal or
    notebook."""
    return cast(
        Iterable[int], Progress(verbose).new_bar(iterable=numbers, desc="reading X", unit="row")
    )


class Progress:
    """The progress bar of a search, which counts trial-epochs (one epoch of one trial).

    If standard error is no terminal, the class prints plain lines instead. With ``verbose=0`` it
    prints nothing. Messages name arguments as the ``interface`` does, such as command line flags.
    """

    def __init__(
        self,
        verbose: int,
        on_epoch: Callable[[np.ndarray], None] | None = None,
        interface: Interface = PYTHON,
    ) -> None:
        self.verbose = verbose
        self.on_epoch = on_epoch
        self.interface = interface
        self.scoring = "score"
        self.bar: Any = None
        self.screen = _Screen()
        notebook = "ipykernel" in sys.modules
        self.plain = not self.screen.isatty() and not notebook
        # In a notebook, tqdm chooses the output itself.
        self.bar_file = None if notebook else self.screen
        self.begin = time.monotonic()
        self.next_line = self.begin + _LINE_SECONDS
        self.next_look = 0.0
        # Called at times with the content of the bar, so that other processes can show it.
        self.on_look: Callable[[Json], object] | None = None
        self.best = -math.inf
        self.trials_done = 0
        self.trials = 0
        self.pruned = 0
        self.said: set[str] = set()
        # Training of this process and of its workers that no call of ``advance`` has counted yet.
        self.here = Running()
        self.in_workers = Running()
        self.is_long_epoch = False  # whether no epoch has ended for a few seconds
        self.is_planned = False  # before the plan, only single steps are timed
        self.next_share = self.begin + _LONG_EPOCH
        self.epochs_done = 0
        self.epochs_before = 0  # of epochs_done, those that an earlier call has trained
        self.resumed: set[int] = set()  # numbers of the trials that continue from a checkpoint
        self.epochs = 0
        self.unit = "trial-epochs"
        self.batches = 0

    def say(self, text: str, *, once: bool = False) -> None:
        """Print a message for the user, unless ``verbose`` is 0.

        With ``once=True``, print the same text only once per search.
        """
        if self.verbose >= 1 and not (once and text in self.said):
            self.said.add(text)
            tqdm.write(self.interface.render(text), file=self.screen)

    def plan(self, plan: Plan, *, show: bool = True) -> None:
        """Print the plan of the next training.

        If the search trains batch by batch, only the first plan is printed.
        """
        self.is_planned = True
        self.next_share = time.monotonic() + _LONG_EPOCH
        if show and not self.batches:
            self.say(f"plan: {plan}", once=True)

    def new_bar(self, **options: Any) -> Any:
        """Return a tqdm progress bar with some options.

        The bar is silent without a terminal or notebook, and with ``verbose=0``.
        """
        is_silent = self.verbose < 1 or self.plain
        return tqdm(
            file=self.bar_file, disable=is_silent, dynamic_ncols=True, leave=False, **options
        )

    @contextmanager
    def bar_over(self, trials: int, epochs: int, *, trained: int = 0) -> Iterator[None]:
        """Show the progress bar for ``trials`` more trials during a ``with`` block.

        If a bar is already shown, the trials are a batch of that bar, and no new bar appears. An
        earlier call has already trained ``trained`` trial-epochs of the trials.
        """
        self._add_trained(trained)
        if self.bar is not None:
            self.bar.update(trained)
            yield
            self.batches += 1
            return
        if not self.epochs:
            self.begin = time.monotonic()
        self.unit = "trials" if epochs == 1 else "trial-epochs"
        self.trials = self.trials_done + trials
        self.epochs = self.epochs_done - trained + trials * epochs
        self.bar = self.new_bar(
            total=self.epochs, initial=self.epochs_done, bar_format=_FORMAT, unit=self.unit
        )
        self._show()
        try:
            with reported_to(self.within_epoch):
                yield
        finally:
            self.bar.close()
            self.bar = None

    def resume(self, trials: Sequence[int], epochs: int) -> None:
        """Count the ``epochs`` epochs that an earlier call has trained trials for, by trial number.

        The same trials count only once.
        """
        if self.resumed.isdisjoint(trials):
            self.resumed.update(trials)
            self._add_trained(len(trials) * epochs)
            self._show()

    def _add_trained(self, trial_epochs: int) -> None:
        """Count trial-epochs that an earlier call has trained."""
        self.epochs_done += trial_epochs
        self.epochs_before += trial_epochs

    def advance(self, trial_epochs: int, curves: np.ndarray) -> None:
        """Add completed trial-epochs to the progress bar.

        ``curves`` (C, epochs, F) are the scores of these epochs.
        """
        curves = first_metric(curves, axes=3)
        self.here = Running()
        self.is_long_epoch = False
        self.next_share = time.monotonic() + _LONG_EPOCH
        self.epochs_done += trial_epochs
        # (C, epochs, F) -> (C, epochs)
        mean = curves.mean(-1)
        if np.isfinite(mean).any():
            self.best = max(self.best, float(np.nanmax(mean)))
        self._show()
        if self.on_epoch is not None:
            self.on_epoch(curves)

    def within_epoch(self, share: float, trials: int) -> None:
        """Show the finished share of the running epochs, if they take longer than a few seconds.

        ``share`` is the finished share of the epoch that ``trials`` trials train in this process. It
        is 0 of 0 trials while this process waits for its workers.
        """
        now = time.monotonic()
        if self.is_planned and now > self.next_share:
            self.next_share = now + _SHARE_SECONDS
            self.here = Running(part=share * trials, trials=trials)
            self.is_long_epoch = True
            self._show()
            self.bar.refresh()

    def finished(self, trials: int, *, pruned: int = 0) -> None:
        """Add ended trials to the progress bar.

        ``pruned`` of these trials ended early because other trials were better.
        """
        self.trials_done += trials
        self.pruned += pruned
        self._show()

    def skip(self, trial_epochs: int, *, trials: int = 0) -> None:
        """Reduce the bar's total by trial-epochs and trials that will not train.

        Such trials stopped early or never began.
        """
        self.trials -= trials
        self.epochs -= trial_epochs
        self.bar.total = self.epochs
        self._show()

    @property
    def status(self) -> str:
        """The text next to the counts in the progress bar, such as the best score."""
        measure = measure_of(self.scoring, self.best)
        best = f"{measure.name} {measure.text(self.best)}" if self.best > -math.inf else "-"
        status = f"trials {self.trials_done}/{self.trials}, best {best}"
        if self.pruned:
            status += f", {self.pruned} pruned"
        running = self.here + self.in_workers
        if self.is_long_epoch and running.part:
            epochs = "epochs" if self.in_workers.trials else "epoch"
            status += f", {running.share:.0%} of the running {epochs}"
        return status

    @property
    def epochs_shown(self) -> int:
        """The number of finished trial-epochs, including chunks that workers still train."""
        return self.epochs_done + int(self.in_workers.epochs)

    @property
    def seconds_left(self) -> float | None:
        """The estimated remaining time of the search in seconds, from the speed so far.

        None before there is an estimate.
        """
        running = self.here + self.in_workers
        n_running = running.epochs + running.part
        n_trained = self.epochs_done - self.epochs_before + n_running
        if n_trained < max(1.0, _SHARE * self.epochs):
            return None
        pace = (time.monotonic() - self.begin) / n_trained
        return pace * max(0, self.epochs - self.epochs_done - n_running)

    def _show(self) -> None:
        """Update the progress bar, the progress for other processes, and the plain lines."""
        self.in_workers = running_in_workers()
        self.bar.set_postfix_str(self.status, refresh=False)
        self.bar.update(self.epochs_shown - self.bar.n)
        if self.on_look is not None and time.monotonic() > self.next_look:
            self.next_look = time.monotonic() + _LOOK_SECONDS
            best = self.best if math.isfinite(self.best) else None
            counts = {"done": self.epochs_shown, "of": self.epochs, "unit": self.unit}
            self.on_look({**counts, "best": best, "left": self.seconds_left})
        if self.plain and time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + _LINE_SECONDS
            seconds = self.seconds_left
            left = "" if seconds is None else f", {seconds:.0f} s left"
            self.say(f"{self.status}, {self.epochs_shown}/{self.epochs} {self.unit}{left}")


PREPARING = "reading and preparing rows"
"""The name of a timer that several parts of the code share."""

# Size of the square matrices in the speed measurement, and number of products.
_SIZE = 1024
_REPEATS = 8


class Profile:
    """The times of the parts of a search, its floating-point operations, and the reason for its
    end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.spent = Spent()
        self.plan: Plan | None = None
        self.at_once = 1  # chunks that train at the same time, in processes or threads
        self.ended = ""  # the reason if target_score or patience_trials ended the search early
        self.device = torch.device("cpu")
        self.begin = time.perf_counter()

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the time of a ``with`` block to the part of the search with the given name.

        If another clock runs inside the block, its time counts only for the inner part.
        """
        # at the beginning: the table has the order of the beginnings
        self.seconds.setdefault(name, 0.0)
        begin = time.perf_counter()
        others = sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - others
            self.seconds[name] += time.perf_counter() - begin - inside

    def report(self, *, dtype: torch.dtype, device: torch.device) -> str:
        """Return a table of the times, as text.

        For comparison, the method also measures the product of large matrices on the device, which
        takes a fraction of a second.
        """
        total = time.perf_counter() - self.begin
        rest = max(0.0, total - sum(self.seconds.values()))
        workers = 1 if self.plan is None else self.plan.workers
        threads = 1 if self.plan is None else self.plan.threads
        steps = self.spent.steps
        scores = self.spent.scores
        lines = ["Where the time went:", ""]
        for name, seconds in [*self.seconds.items(), ("the rest", rest)]:
            lines.append(f"  {name:<30} {seconds:8.2f} s  {seconds / total:4.0%}")
            # Steps and scores are summed over chunks that train at the same time.
            summed = seconds * self.at_once
            # Hypergradients and the solver do not measure steps, so they have no such parts.
            if name == "training" and steps and summed:
                waiting = max(0.0, summed - (steps + scores))
                parts = {"steps": steps, "scores": scores, "starting, waiting, telling": waiting}
                for part, spent in parts.items():
                    lines.append(f"    {part:<32} {spent / summed:9.0%} of it")
        if steps and self.spent.operations > 0:
            place = "a GPU" if device.type == "cuda" else count(workers * threads, "core")
            peak = product_speed(workers * threads, dtype, device)
            # The seconds of steps are a sum over processes, and each process has its own threads.
            reached = self.spent.operations / (steps / workers)
            lines += [
                f"\nSteps reached {reached / 1e9:.1f} GFLOP/s, {reached / peak:.0%} of the "
                f"{peak / 1e9:.1f} that the product of two {_SIZE} x {_SIZE} matrices reaches "
                f"here on {place} ({str(dtype).removeprefix('torch.')})."
            ]
        return "\n".join(lines)


def product_speed(cores: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the floating-point operations per second that products of large matrices reach.

    On a CPU, ``cores`` cores compute each product.
    """
    a = torch.rand(_SIZE, _SIZE, dtype=dtype, device=device)
    b = torch.rand(_SIZE, _SIZE, dtype=dtype, device=device)
    with torch_threads(cores if device.type == "cpu" else 1):
        a @ b  # warm-up: allocates memory and starts threads
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(_REPEATS):
            a @ b
        synchronize(device)
    seconds = time.perf_counter() - begin
    # The product of two n x n matrices takes 2 * n**3 operations.
    return 2.0 * _SIZE**3 * _REPEATS / seconds
