"""What 10, 100 and 1,000 workers would do, from chunk times and scheduling costs measured here on a
small Ray cluster.

    python scripts/simulate_cluster.py [--trials 60] [--epochs 20] [--bandwidth 125e6]
    python scripts/simulate_cluster.py --speedup 3     # one worker against two, so many times in turn

A search on digits is run on a Ray cluster of this machine's cores. Measured are the seconds of each
chunk, the seconds of this process for each, and what a round trip costs a worker beside training.
The simulation then lets so many workers draw from those chunks: this process serves them one after
the other, and each worker first waits for the data, which one network link of the given bandwidth
(assumed, not measured) sends to all. A GPU's chunk times are not known here.
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
from gputune.executors import ray_cluster
from gputune.executors.ray_cluster import RayTasks
from gputune.study.store import Store

SIZES = (1, 2, 10, 100, 1000)
PER_WORKER = 20  # chunks


@dataclass(frozen=True)
class Measured:
    """What a search cost: ``chunks`` seconds of training each, ``driver`` seconds of this process
    for a chunk, ``trip`` seconds between a worker's chunks that it did not train, ``start`` of a
    worker; bytes of the data, of a result."""

    chunks: tuple[float, ...]
    driver: float
    trip: float
    start: float
    data_bytes: int
    result_bytes: int

    @property
    def most_workers(self) -> float:
        """Workers that this process can keep busy."""
        return statistics.mean(self.chunks) / self.driver

    @property
    def scheduling(self) -> float:
        """Share of a worker's time between its first chunk and its last that goes into
        scheduling."""
        return self.trip / (self.trip + statistics.mean(self.chunks))


class Watch:
    """Notes inside of a block when chunks leave and come back, and how long this process only
    waited."""

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
        to_arrays = ray_cluster.to_arrays

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
            patch.object(ray_cluster, "to_arrays", counted),
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
    """Return seconds of a search of ``PER_WORKER`` chunks a worker, and the share of all workers'
    time in training."""
    drawn = np.random.default_rng(seed).choice(measured.chunks, workers * PER_WORKER)
    link = measured.data_bytes / bandwidth
    # When each worker asks for a chunk, first after its start and after the data of those before
    # it. sorted, so that it is a heap
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
    """Time the same search on one worker and on two, in turn; print the seconds of each, return the
    median ratio."""
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
    """Be connected to a Ray cluster of so many CPUs inside."""
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
