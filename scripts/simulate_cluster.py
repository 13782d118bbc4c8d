"""Simulate 10, 100 and 1,000 workers, from measurements on a small Ray cluster.

    python scripts/simulate_cluster.py [--trials 60] [--epochs 20] [--bandwidth 125e6]
    python scripts/simulate_cluster.py --speedup 3     # one worker against two, 3 times in turn

A search on digits runs on a Ray cluster of this machine's cores. The script measures the seconds of
each chunk, the seconds that this process needs for each chunk, and the overhead of a round trip for
a worker. The simulation then lets many workers draw from these chunks. This process serves them one
after the other. Each worker first waits for the data, which one network link of the given bandwidth
(assumed, not measured) sends to all. The chunk times of a GPU are not known here.
"""

import argparse
import heapq
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import ray
from sklearn.datasets import load_digits

import gputune
from gputune.integrations import ray_tasks
from gputune.integrations.ray_tasks import RayTasks
from gputune.study.store import Store

SIZES = (1, 2, 10, 100, 1000)
PER_WORKER = 20  # chunks


@dataclass(frozen=True)
class Measured:
    """The measured costs of a search.

    ``chunks`` are the seconds of training of each chunk. ``driver`` is the number of seconds that
    this process needs for a chunk. ``trip`` is the number of seconds between two chunks of a worker
    in which it did not train. ``start`` is the start time of a worker, in seconds. The sizes of the
    data and of a result are in bytes.
    """

    chunks: tuple[float, ...]
    driver: float
    trip: float
    start: float
    data_bytes: int
    result_bytes: int

    @property
    def most_workers(self) -> float:
        """The number of workers that this process can keep busy."""
        return statistics.mean(self.chunks) / self.driver

    @property
    def scheduling(self) -> float:
        """The share of scheduling in a worker's time between its first chunk and its last one."""
        return self.trip / (self.trip + statistics.mean(self.chunks))


class Watch:
    """Records, inside a block, when chunks leave and return, and this process's waiting time."""

    def __init__(self) -> None:
        self.left: dict[Any, float] = {}
        self.trips: list[float] = []
        self.waited = self.first = self.last = 0.0
        self.data_bytes = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the search in the block."""
        wait = ray.wait
        submit = RayTasks.submit
        result = RayTasks._result
        to_arrays = ray_tasks.to_arrays

        def timed_wait(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            done = wait(*arguments, **options)
            self.waited += time.perf_counter() - begin
            return done

        def timed_submit(tasks: RayTasks, *chunk: Any) -> bool:
            begin = time.perf_counter()
            self.first = self.first or begin
            submit(tasks, *chunk)
            self.left[next(reversed(tasks.running))] = begin
            return True

        def timed_result(tasks: RayTasks, reference: Any) -> Any:
            outcomes = result(tasks, reference)
            self.last = time.perf_counter()
            self.trips.append(
                self.last - self.left.pop(reference) - sum(part.seconds for part in outcomes)
            )
            return outcomes

        def counted(data: Any) -> Any:
            tensors = [*data.inputs, *vars(data).values()]
            self.data_bytes = sum(tensor.nbytes for tensor in tensors if hasattr(tensor, "nbytes"))
            return to_arrays(data)

        with (
            patch.object(ray, "wait", timed_wait),
            patch.object(ray_tasks, "to_arrays", counted),
            patch.multiple(RayTasks, submit=timed_submit, _result=timed_result),
        ):
            yield


def search(*, trials: int, epochs: int, study: Path | None = None) -> gputune.Study:
    X, y = load_digits(return_X_y=True)
    return gputune.tune(
        "mlp", X, y, n_trials=trials, max_epochs=epochs, cv=5, workers="ray", study=study, verbose=0
    )


def measure(*, trials: int, epochs: int) -> Measured:
    workers = int(ray.cluster_resources()["CPU"])
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder, watch.watching():
        path = Path(folder) / "study.db"
        study = search(trials=trials, epochs=epochs, study=path)
        with Store.open(path) as store:
            plan = store.plan()
    share = {trial.number: trial.seconds for trial in study.trials}
    chunks = tuple(sum(share[number] for number in chunk.trials) for chunk in plan)
    return Measured(
        chunks=chunks,
        driver=(watch.last - watch.first - watch.waited) / len(chunks),
        trip=statistics.mean(watch.trips[workers:]),
        # a worker's first chunk: its process, its imports, the data
        start=max(watch.trips[:workers]),
        data_bytes=watch.data_bytes,
        result_bytes=study.curves[0].nbytes,
    )


def simulate(
    measured: Measured, workers: int, *, bandwidth: float, seed: int = 0
) -> tuple[float, float]:
    """Return the seconds of a search with ``PER_WORKER`` chunks per worker, and the share of
    training.

    The share is relative to the time of all workers.
    """
    drawn = np.random.default_rng(seed).choice(measured.chunks, workers * PER_WORKER)
    link = measured.data_bytes / bandwidth
    # The time at which each worker asks for a chunk. The first time is after its start and after
    # the data of the workers before it. The list is sorted, so it is a heap.
    asking = [measured.start + (i + 1) * link for i in range(workers)]
    free = end = 0.0
    for seconds in sorted(drawn, reverse=True):
        begin = max(heapq.heappop(asking), free)
        free = begin + measured.driver  # this process serves one worker at a time
        back = free + measured.trip + seconds
        end = max(end, back)
        heapq.heappush(asking, back)
    return end, float(drawn.sum()) / (workers * end)


def report(measured: Measured, *, bandwidth: float) -> str:
    least = min(measured.chunks)
    most = max(measured.chunks)
    mean = statistics.mean(measured.chunks)
    busy = (
        f"{1e3 * measured.driver:.1f} ms a chunk, so that it keeps {measured.most_workers:.0f} "
        "workers busy"
    )
    lines = [
        f"measured on {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}:",
        f"  {len(measured.chunks)} chunks of {least:.2f} to {most:.2f} s, mean {mean:.2f} s",
        f"  this process: {busy}",
        f"  round trip: {1e3 * measured.trip:.1f} ms a chunk, {measured.scheduling:.1%} of a "
        "worker's time",
        f"  start of a worker: {measured.start:.1f} s",
        f"  data {measured.data_bytes / 1e6:.1f} MB once a node; result "
        f"{measured.result_bytes / 1e3:.1f} kB a trial",
        f"simulated, {PER_WORKER} chunks a worker, {bandwidth / 1e6:.0f} MB/s (assumed):",
        "  workers  seconds  in training  chunks/s",
    ]
    for workers in SIZES:
        seconds, share = simulate(measured, workers, bandwidth=bandwidth)
        lines.append(
            f"  {workers:7}  {seconds:7.1f}  {share:11.1%}  {workers * PER_WORKER / seconds:8.1f}"
        )
    return "\n".join(lines)


def speedup(repeats: int, *, trials: int, epochs: int) -> float:
    """Time the same search on one worker and on two, in turn; return the median ratio.

    The seconds of each search are printed.
    """
    found = []
    for _ in range(repeats):
        seconds = []
        for workers in (1, 2):
            with connected(workers):
                begin = time.perf_counter()
                search(trials=trials, epochs=epochs)
                seconds.append(time.perf_counter() - begin)
        found.append(seconds[0] / seconds[1])
        times = f"one worker {seconds[0]:.1f} s, two {seconds[1]:.1f} s: {found[-1]:.2f} times"
        print(f"{times} (load {os.getloadavg()[0]:.1f})", flush=True)
    return statistics.median(found)


@contextmanager
def connected(workers: int) -> Iterator[None]:
    """Connect to a Ray cluster with this number of CPUs inside the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        "local",
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        yield
    finally:
        ray.shutdown()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--bandwidth", type=float, default=125e6, help="bytes a second, assumed (125e6)"
    )
    parser.add_argument(
        "--speedup", type=int, metavar="N", help="time one worker and two, N times in turn"
    )
    arguments = parser.parse_args(argv)
    size = {"trials": arguments.trials, "epochs": arguments.epochs}
    if arguments.speedup:
        print(f"median {speedup(arguments.speedup, **size):.2f} times")
        return
    with connected(os.cpu_count() or 1):
        print(report(measure(**size), bandwidth=arguments.bandwidth))


if __name__ == "__main__":
    main()
