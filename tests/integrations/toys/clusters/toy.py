"""A cluster in one file: each of its tasks trains one chunk of trials in this process."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from gputune.engine.job import run_in_parts
from gputune.executors.cluster import Cluster, Connection
from gputune.executors.executor import Executor
from gputune.ground.errors import InputError

TRAINED = []  # the numbers of the trials of each chunk


@dataclass(frozen=True)
class Toy(Cluster):
    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toy"
    addresses: ClassVar[tuple[str, ...]] = ("local", "toy://HOST:PORT")
    address: str = "local"
    size: int = 1

    @property
    def is_elsewhere(self):
        return self.address != "local"

    def check(self, device):
        if device == "cuda":
            raise InputError("device", "must be 'cpu' on the toy cluster", got=device)

    @contextmanager
    def connect(self, device):
        yield ToyConnection(self)


class ToyConnection(Connection):
    device = "cpu"
    threads = 1
    free = None

    def __init__(self, cluster):
        self.cluster = cluster
        self.tasks = cluster.size

    def bytes_of_a_task(self):
        return 2**30

    def executor(self, job, data, plan):
        return ToyTasks(job, data, self.tasks)


class ToyTasks(Executor):
    worker = "a toy worker"

    def __init__(self, job, data, capacity):
        self.job = job
        self.data = data
        self.tasks = capacity

    @property
    def capacity(self):
        return self.tasks

    def submit(self, chunk, ended):
        TRAINED.append(chunk.index)
        ended(chunk, run_in_parts(self.job, self.data, chunk))
        return True


CLUSTER = Toy
