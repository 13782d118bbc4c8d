"""Threads that train chunks take turns, and share the cores while compiled code runs."""

import threading
import time
from functools import partial

import pytest
import torch

from gputune.engine.turns import Cancelled, run_together, turn_given_up


class Chunks:
    """Chunks that note how many of them are in their turn, and how many use a core."""

    def __init__(self):
        self.in_turn = 0
        self.on_core = 0
        self.most_on_core = 0
        self.lock = threading.Lock()
        self.order = []

    def train(self, number, seconds=0.02):
        for _ in range(3):
            self.in_turn += 1
            assert self.in_turn == 1
            time.sleep(0.001)
            self.in_turn -= 1
            with turn_given_up() as core, core():
                with self.lock:
                    self.on_core += 1
                    self.most_on_core = max(self.most_on_core, self.on_core)
                time.sleep(seconds)
                with self.lock:
                    self.on_core -= 1
        self.order.append((number, torch.get_num_threads()))


@pytest.mark.parametrize("at_once, threads, most", [(1, 2, 1), (2, 2, 2), (3, 2, 2), (3, 1, 1)])
def test_chunks_take_turns_and_share_the_cores(at_once, threads, most):
    chunks = Chunks()
    tasks = [partial(chunks.train, number) for number in range(5)]
    before = torch.get_num_threads()
    run_together(tasks, at_once=at_once, threads=threads)
    assert chunks.most_on_core == most
    assert sorted(number for number, _ in chunks.order) == [0, 1, 2, 3, 4]
    if at_once == 1:
        assert [number for number, _ in chunks.order] == [0, 1, 2, 3, 4]
    else:
        assert {n_threads for _, n_threads in chunks.order} == {threads}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_cancels_the_other_chunks(fails):
    cancelled = []
    others = threading.Event()

    def fail():
        with turn_given_up():
            others.wait(5)
        raise ValueError("diverged")

    def train():
        try:
            while True:
                with turn_given_up():
                    others.set()
                    time.sleep(0.001)
        except Cancelled:
            cancelled.append(True)
            raise

    tasks = [fail, train] if fails == 0 else [train, fail]
    with pytest.raises(ValueError, match="diverged"):
        run_together([*tasks, pytest.fail], at_once=2, threads=2)
    assert cancelled == [True]


def test_a_chunk_without_turns_uses_every_core():
    with turn_given_up() as core, core(), core():
        pass
