"""Threads that train chunks take turns, and share the cores while compiled code runs."""

import signal
import threading
import time
from contextlib import closing
from functools import partial

import pytest
import torch

from gputune.engine.stop import Stop
from gputune.engine.turns import Cancelled, Turns, run_together, turn_given_up
from gputune.executors.executor import Queue
from gputune.executors.threads import chunk_threads
from gputune.ground.within_epoch import running_in_workers
from gputune.population.population import Population


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


def is_denormal_kept():
    return bool(torch.tensor(1e-39, dtype=torch.float32) * 1 != 0)


def test_all_threads_round_denormal_numbers_to_zero():
    kept = []

    def train():
        with turn_given_up():
            time.sleep(0.05)
        kept.append(is_denormal_kept())

    run_together([train, train], at_once=2, threads=1)
    assert kept == [False, False]


def test_ctrl_c_while_the_first_thread_waits_cancels_the_other_chunks():
    begun = threading.Event()
    cancelled = []

    def train():
        if threading.current_thread() is threading.main_thread():
            with turn_given_up():
                begun.wait(5)
            return
        begun.set()
        end = time.monotonic() + 10
        killed = time.monotonic() + 0.1
        try:
            while time.monotonic() < end:
                with turn_given_up():
                    time.sleep(0.001)
                if time.monotonic() > killed:
                    killed = end
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        except Cancelled:
            cancelled.append(True)
            raise

    with pytest.raises(KeyboardInterrupt):
        run_together([train, train], at_once=2, threads=2)
    assert cancelled == [True]


def test_a_turn_ends_only_in_the_thread_that_has_it():
    turns = Turns(1)
    with turns.taken():
        other = threading.Thread(target=turns.end)
        other.start()
        other.join()
        assert turns.turn.locked()
    assert not turns.turn.locked()
    turns.end()


def chunks_of(number):
    return [Population("mlp", (i,), ({},)) for i in range(number)]


def always(_chunk):
    return True


def unseen(*_):
    pass


def test_no_chunk_begins_after_an_error_of_the_caller():
    begun = []

    def train(chunk, after_epoch=None):
        begun.append(chunk.index[0])
        for _ in range(20):
            with turn_given_up():
                time.sleep(0.002)
        return [chunk.index[0]]

    with pytest.raises(OSError, match="disk"), chunk_threads(train, 1, 1, 8) as executor:
        queue = Queue(chunks_of(8), executor, Stop(), always)

        def train_here(chunk):
            with executor.turn():
                return train(chunk)

        with closing(queue.run(train_here, unseen)) as results:
            for _ in results:
                raise OSError("the disk is full")
    assert len(begun) <= 3


def test_the_progress_of_a_thread_is_seen_before_its_chunk_ends():
    seen = []
    begun = threading.Event()

    def train(chunk, after_epoch):
        after_epoch(3, None)
        begun.set()
        with turn_given_up():
            time.sleep(0.2)
        return []

    def train_here(chunk):
        assert begun.wait(5)
        seen.append(running_in_workers().epochs)
        return []

    with chunk_threads(train, 1, 1, 2) as executor:
        list(Queue(chunks_of(2), executor, Stop(), always).run(train_here, unseen))
    assert seen == [3.0]


def test_the_queue_trains_alone_if_no_thread_can_start(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with chunk_threads(pytest.fail, 1, 1, 3) as executor:
        queue = Queue(chunks_of(3), executor, Stop(), always)
        assert sorted(queue.run(lambda chunk: [chunk.index[0]], unseen)) == [0, 1, 2]


def test_an_error_while_a_thread_hands_out_the_next_chunk_ends_the_search(monkeypatch):
    def train(chunk, after_epoch):
        return []

    with chunk_threads(train, 1, 1, 3) as executor:
        submit = executor.submit
        n_submitted = []

        def broken(chunk, ended):
            n_submitted.append(1)
            if len(n_submitted) > 1:
                raise OSError("no process can start")
            return submit(chunk, ended)

        monkeypatch.setattr(executor, "submit", broken)
        with pytest.raises(OSError, match="no process can start"):
            list(Queue(chunks_of(3), executor, Stop(), always).run(None, unseen))
