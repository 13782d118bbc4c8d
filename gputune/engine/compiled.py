"""Train the built-in models on a CPU in compiled code, one member (one trial on one fold) after
another.

A chunk holds trials of one tensor shape that train together. Each core trains one member for a
whole epoch, then the next member. A small network with its moments fits into a core's cache. The
compiled code takes all steps of an epoch there, without calls of PyTorch in between. Members need
no common batch size, and no member idles while others take more steps. The results of a member are
the same, bit for bit, for any number of threads and with any other members.

Shape letters: F folds, C configurations (trials), m validation rows, K outputs, H width.
"""

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from gputune.engine.backends.cost import member_seconds
from gputune.engine.mlp import StackedMLP
from gputune.ground.seeding import stream_seed
from gputune.ground.types import Config
from gputune.ground.within_epoch import REPORT_SECONDS, report_steps
from gputune.native.library import (
    ACTIVATIONS,
    NUMBER_LOSSES,
    OPTIMIZERS,
    ROW_SCORES,
    MemberWork,
    fill_streams,
    library,
    make_work,
)
from gputune.optimizers.rules import SCHEDULES, n_moments
from gputune.population.batches import row_order
from gputune.population.kinds import dropout_rates, hidden_widths, highest_dropout
from gputune.population.state import State, selected_configs
from gputune.scoring.scores import ROW_MEANS
from gputune.scoring.validation import Validation

WorkArrays: TypeAlias = dict[str, Tensor | None]
"""Arguments of the compiled code by name, with None for an array that the code does not need."""

_MEMBER_VALUES = {
    "lr": "lr",
    "momentum": "momentum",
    "decay": "weight_decay",
    "ema": "ema",
}
"""Hyperparameters with one value per trial, keyed by their names in the compiled code."""


class CompiledChunk:
    """Trials that train together in compiled code on a CPU. Their parameters and optimizer moments
    are in flat buffers."""

    faults: Mapping[str, None] = {}
    holds_only_state = True

    def __init__(
        self, network: StackedMLP, validation: Validation, *, seed: int, horizon: int
    ) -> None:
        self.network = network
        self.validation = validation
        self.seed = seed
        self.horizon = horizon
        data = self.data = validation.data
        scoring = self.scoring = validation.scoring
        # The score as a function of a mean over rows that compiled code computes. It is None if the
        # score is computed from outputs.
        self.row_mean = None
        scores_members = data.replicas == 1 and not data.transforms
        if scoring and scoring.score and not scoring.others and scores_members:
            self.row_mean = ROW_MEANS.get(scoring.score)
        configs = self.configs = list(network.configs)
        self.epoch = 0  # epochs that the members have trained
        self.nanoseconds = torch.zeros(2, dtype=torch.int64)
        self.draw_buffer = torch.empty(0)  # random numbers of dropout, kept for the next epoch
        self.flat = network.start()
        moments = n_moments(configs[0]["optimizer"], (config["momentum"] for config in configs))
        self.averages = any(config["ema"] for config in configs)
        # Moments of the optimizer; the last one is the average of the parameters, if there is one.
        self.moments = tuple(torch.zeros_like(self.flat) for _ in range(moments + self.averages))
        self.targets = [data.target[fold.valid] for fold in data.folds]
        self.lengths = np.array(data.train_lengths, dtype=np.int64)
        # (F + 1,): first validation row of each fold.
        self.starts = np.cumsum([0, *map(len, self.targets)], dtype=np.int64)
        self.row_arrays = self._row_arrays()
        self._rebuild()
        self._set_lag(np.zeros_like(self.steps))

    def _row_arrays(self) -> WorkArrays:
        """Return the arguments of the compiled code that never change: the rows, targets and folds
        of the dataset."""
        data = self.data
        present = data.present
        if present is None:
            present = torch.ones((data.n_folds, data.n_outputs), dtype=torch.bool)
        arrays: WorkArrays = {
            "x": data.x.contiguous(),
            "y": data.y.contiguous(),
            "copies": torch.tensor(data.copies).to(data.device),
            "present": present.to(data.dtype).contiguous(),
            "valid": torch.cat([fold.valid for fold in data.folds]),
            "lengths": self.place(self.lengths),
            "valid_start": self.place(self.starts),
        }
        (scaling,) = data.scaling
        if scaling is not None:
            arrays["center"] = scaling.center
            arrays["scale"] = scaling.scale
        if data.task == "regression":
            arrays["target"] = data.target.double().contiguous()
            arrays["target_center"] = data.center.to(data.device).contiguous()
            arrays["target_scale"] = data.scale.to(data.device).contiguous()
        if data.weights is not None:
            arrays["weights"] = data.weights.double().contiguous()
        return arrays

    def place(self, values: np.ndarray | Sequence[float] | Sequence[tuple[int, ...]]) -> Tensor:
        """Return a tensor with 64-bit values on the device that holds the dataset's rows."""
        return torch.from_numpy(np.asarray(values)).to(self.data.device)

    def _rebuild(self) -> None:
        """Build the arguments of the compiled code. The arguments stay valid until the trials
        change."""
        data = self.data
        self.numbers = {
            "folds": data.n_folds,
            "trials": len(self.configs),
            "inputs": data.n_features,
            "width": self.network.hidden,
            "outputs": data.n_outputs,
            "layers": self.network.depth + 1,
            "optimizer": OPTIMIZERS.index(self.configs[0]["optimizer"]),
            "classes": int(data.task != "regression"),
            "rows": data.n_rows,
            "longest": int(self.lengths.max()),
            "horizon": self.horizon,
            "loss": NUMBER_LOSSES.index(self.network.loss),
            "row_score": 0 if self.row_mean is None else ROW_SCORES.index(self.row_mean.of_row),
        }
        sizes = [min(config["batch_size"], self.numbers["longest"]) for config in self.configs]
        self.sizes = np.array(sizes, dtype=np.int64)
        # steps of an epoch (F, C)
        self.steps = -(-self.lengths[:, None] // np.minimum(self.sizes, self.lengths[:, None]))
        self.epoch_seconds = self._epoch_seconds()
        schedules = list(SCHEDULES)
        self.arrays: WorkArrays = {
            **self.row_arrays,
            "widths": self.place(list(map(hidden_widths, self.configs))),
            "activations": self.place(list(map(ACTIVATIONS.index, self.network.activations))),
            "loss_number": self.place([self.network.loss_number]),
            "sizes": self.place(self.sizes),
            "schedule": self.place([schedules.index(c["schedule"]) for c in self.configs]),
            "theta": self.flat,
            # The members with the longest epochs come first, so that all threads end at about the
            # same time. Among equals, fold after fold: its rows are then in the cache.
            "queue": self.place(np.argsort(-self.epoch_seconds.flatten(), kind="stable")),
            "nanoseconds": self.nanoseconds,
            **self.make_buffers(),
        }
        for name, key in _MEMBER_VALUES.items():
            self.arrays[name] = self.place([float(config[key]) for config in self.configs])
        # (C, layers)
        rates = np.array(list(map(dropout_rates, self.configs)), dtype=np.float64)
        self.arrays["dropout"] = self.place(rates)
        moments = list(self.moments)
        if self.averages:
            self.arrays["average"] = moments.pop()
        self.arrays |= zip(("first", "second"), moments)

    def _epoch_seconds(self) -> np.ndarray:
        """Return the estimated seconds of an epoch of each member, (F, C)."""
        hidden = np.array(list(map(hidden_widths, self.configs)), dtype=np.int64)
        hidden = hidden.reshape(len(self.configs), -1)  # (C, 0) without hidden layers
        inputs = np.full((len(hidden), 1), self.data.n_features)
        outputs = np.full((len(hidden), 1), self.data.n_outputs)
        layers = np.concatenate([inputs, hidden, outputs], axis=1)
        parameters = ((layers[:, :-1] + 1) * layers[:, 1:]).sum(axis=1)
        units = hidden.sum(axis=1)
        drops = np.array([highest_dropout(config) > 0 for config in self.configs])
        return member_seconds(self.steps, self.sizes, parameters, units, drops)

    def _set_lag(self, lag: np.ndarray) -> None:
        """Set how many steps each member would have taken more at its present batch size,
        (F, C)."""
        self.lag = lag
        self.arrays["lag"] = self.place(np.ascontiguousarray(lag))

    def make_buffers(self) -> WorkArrays:
        """Allocate the buffers into which the compiled code writes the scores and outputs of an
        epoch.

        ``means`` receives the mean scores over the validation rows. ``scored`` receives the outputs
        on these rows. A buffer is None if the scoring does not need it.
        """
        data = self.data
        trials = len(self.configs)
        buffers = WorkArrays(scored=None, means=None)
        if self.row_mean is not None:
            shape = data.n_folds, trials
            buffers["means"] = torch.empty(shape, dtype=torch.float64, device=data.device)
        if self.scoring is not None and (self.row_mean is None or self.scoring.kept_bytes):
            scored = int(self.starts[-1]) * trials * data.n_outputs
            buffers["scored"] = torch.empty(scored, dtype=data.dtype, device=data.device)
        return buffers

    @property
    def scored(self) -> Tensor:
        """Flat buffer with the weights that gputune scores and saves: the parameters or their
        moving average."""
        return self.moments[-1] if self.averages else self.flat

    @property
    def steps_taken(self) -> np.ndarray:
        """Number of optimizer steps that each member has taken, (C, F)."""
        return np.ascontiguousarray((self.epoch * self.steps - self.lag).T)

    @property
    def state(self) -> State:
        """A copy of the training state, from which ``resume`` continues."""
        return State.of(self.network, self.flat, self.moments, self.epoch, self.steps_taken)

    def resume(self, state: State) -> None:
        """Continue from the state of the same trials."""
        blocks = self.network.blocks
        for buffer, rows in zip((self.flat, *self.moments), state.buffers, strict=True):
            # Without a flat copy in between: new memory costs more than the values themselves.
            blocks.put_rows(buffer, rows.to(buffer.device))
        self.epoch = state.epoch
        self._set_lag(state.lag(self.steps))

    @property
    def scoring_share(self) -> float:
        """Fraction of the training time of ``advance`` that computing the outputs on the validation
        rows took."""
        training, scoring = self.nanoseconds.tolist()
        return float(scoring / max(1, training + scoring))

    def release(self) -> None:
        """Free memory that the next training of these trials allocates again."""
        self.validation.release()

    def advance(self, epoch: int) -> None:
        """Train all members for one epoch. If a scoring is set, also compute the outputs on the
        validation rows."""
        self.epoch = epoch + 1
        arrays = {**self.arrays, "order": row_order(self.data, self.seed, epoch).contiguous()}
        if self.network.rates is not None:
            arrays |= self._draws(epoch)
        steps_done = torch.zeros(self.steps.shape, dtype=torch.int64)  # (F, C)
        arrays["steps_done"] = steps_done

        def report() -> None:
            seconds_done = (self.epoch_seconds * (steps_done.numpy() / self.steps)).sum()
            report_steps(float(seconds_done), float(self.epoch_seconds.sum()), len(self.configs))

        numbers = {**self.numbers, "epoch": epoch}
        _run(library(self.data.dtype), numbers, arrays, report)

    def _draws(self, epoch: int) -> WorkArrays:
        """Return the uniform random numbers of dropout for an epoch, and where each step's begin.

        Each step and layer has its own random stream, (rows, H), where rows is the longest
        minibatch of the step. Each thread draws a range of steps.
        """
        depth = self.network.depth
        rows = self.draw_rows()
        counts = rows * self.network.hidden  # of one layer
        starts = np.append(0, np.cumsum(depth * counts))
        if self.draw_buffer.numel() < starts[-1]:
            self.draw_buffer = torch.empty(int(starts[-1]), dtype=torch.float32)

        def fill(begin: int, end: int) -> None:
            seeds = [
                stream_seed(self.seed, "dropout", epoch, step, layer)
                for step in range(begin, end)
                for layer in range(depth)
            ]
            drawn = self.draw_buffer[int(starts[begin]) : int(starts[end])]
            fill_streams(seeds, np.repeat(counts[begin:end], depth).tolist(), drawn)

        threads = torch.get_num_threads()
        # The threads draw about equally many numbers.
        shares = starts[-1] * np.arange(threads + 1) // threads
        bounds = np.searchsorted(starts, shares).tolist()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, bounds[:-1], bounds[1:]))
        return {
            "draws": self.draw_buffer,
            "draw_start": self.place(starts[:-1]),
            "draw_rows": self.place(rows),
        }

    def draw_rows(self) -> np.ndarray:
        """Return the number of rows for which dropout needs random numbers in each step, (steps,).
        This is the largest minibatch size in the step."""
        last = self.steps.max(0)  # (C,): steps of a trial in its longest fold
        steps = range(int(last.max()))
        return np.array([self.sizes[last > step].max() for step in steps], dtype=np.int64)

    def scores(self) -> np.ndarray:
        """Return the scores (C, F) of all members. Each member is scored on the validation rows of
        its fold."""
        row_means = self.arrays["means"]
        written = self.arrays["scored"]
        trials = len(self.configs)
        outputs = []  # (C, m, K) of each fold
        if written is not None:
            ends = self.starts[1:-1] * trials * self.data.n_outputs
            parts = torch.tensor_split(written, ends.tolist())
            outputs = [y.view(trials, len(rows), -1) for y, rows in zip(parts, self.targets)]
        if row_means is None or self.row_mean is None:
            params = self.network.blocks.views(self.scored)
            return self.validation.scores(self.network, params, trials, outputs)
        self.validation.outputs = outputs
        pairs = zip(row_means, self.targets)
        scores = torch.stack([self.row_mean.score(*pair) for pair in pairs], -1)  # (C, F)
        return torch.where(scores.isfinite(), scores, torch.nan).cpu().numpy()

    def _move(self, places: Sequence[int]) -> None:
        """Give trial i the parameters and moments of the trial ``places[i]``."""
        blocks = self.network.blocks
        if len(places) == len(self.configs):
            # Only a part of the trials changes: the others stay where they are.
            moved = [i for i, place in enumerate(places) if i != place]
            if moved:
                to = self.place(moved)
                source = self.place([places[i] for i in moved])
                for buffer in (self.flat, *self.moments):
                    blocks.copy_trials_(buffer, to, source)
            return
        on_device = self.place(places)
        self.flat = blocks.select(self.flat, on_device)
        self.moments = tuple(blocks.select(moment, on_device) for moment in self.moments)

    def select(self, slots: Sequence[int], configs: Sequence[Config | None] | None = None) -> None:
        """Replace the trials: the new trial i continues from the state of the trial ``slots[i]``,
        with a new configuration unless ``configs`` or its entry is None."""
        places = list(slots)
        new_configs = selected_configs(self.network, places, configs)
        if new_configs == self.configs and places == list(range(len(places))):
            return
        taken = self.steps_taken[places].T  # (F, C)
        self._move(places)
        self.configs = new_configs
        self.network = self.network.with_configs(new_configs)
        self._rebuild()
        self._set_lag(self.epoch * self.steps - taken)


def _run(
    library: ctypes.CDLL,
    numbers: Mapping[str, int],
    arrays: WorkArrays,
    report: Callable[[], object],
) -> None:
    """Train all members in worker threads. The number of threads is torch's setting. All threads
    take members from one queue. This thread meanwhile calls ``report`` at regular intervals.

    Even a single worker is a separate thread, so that the calling thread receives signals
    meanwhile.
    """
    taken = ctypes.c_int64(0)
    stop = ctypes.c_int32(0)
    failed = list[bool]()

    def train(work: MemberWork, _arrays: WorkArrays, ended: threading.Event) -> None:
        torch.set_flush_denormal(True)  # each thread has its own setting
        try:
            if library.train_members(ctypes.byref(work), ctypes.byref(taken), ctypes.byref(stop)):
                failed.append(True)
        finally:
            ended.set()

    # Each thread holds the tensors that it computes on, and sets an event at its end. join() is not
    # enough: after a signal handler has raised inside it, join() takes the thread for ended.
    ends = [threading.Event() for _ in range(torch.get_num_threads())]
    work = make_work(numbers, arrays)
    threads = [threading.Thread(target=train, args=(work, arrays, end)) for end in ends]
    try:
        for thread in threads:
            thread.start()
        for end in ends:
            while not end.wait(REPORT_SECONDS):
                report()
    except BaseException:
        stop.value = 1
        for thread, end in zip(threads, ends):
            if thread.ident is not None:
                end.wait()
        raise
    if failed:
        raise MemoryError("not enough memory for the activations of one member")
