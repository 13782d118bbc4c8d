"""The recorder of CUDA graphs makes the calls that PyTorch's documentation requires; this test
needs no GPU.
"""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from gputune.ground.device import is_out_of_memory, synchronize
from gputune.modules import recorder
from gputune.modules.recorder import RECORDERS, CudaRecorder, Replays


class Stream:
    """A stream that records the streams for which it waits."""

    def __init__(self, name, log):
        self.name = name
        self.log = log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as a log of its calls; the last capture ends as ``cuda.end`` says."""
    log = []
    fake = SimpleNamespace(log=log, end=lambda: None)
    current = Stream("current", log)
    streams = []

    @contextmanager
    def inside(text):
        log.append(f"in {text}")
        yield
        log.append(f"out of {text}")

    @contextmanager
    def graph(cuda_graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        log.append(f"capture on {stream.name} into {pool}")
        try:
            yield
        finally:
            fake.end()
            log.append("captured")

    def make_stream(device):
        streams.append(Stream(f"side {device}", log))
        return streams[-1]

    parts = {
        "graph_pool_handle": lambda: "pool",
        "Stream": make_stream,
        "current_stream": lambda device: current,
        "stream": lambda stream: inside(stream.name),
        "set_stream": lambda stream: log.append(f"back to {stream.name}"),
        "synchronize": lambda device: log.append("wait"),
        "device": lambda device: inside(str(device)),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        "graph": graph,
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    recorder._side_stream.cache_clear()
    yield fake
    recorder._side_stream.cache_clear()


@pytest.mark.cpu
def test_warm_up_and_capture_are_on_one_side_stream(cuda):
    assert RECORDERS["cuda"] is CudaRecorder
    one = CudaRecorder(torch.device("cuda", 1))
    one.warm_up(lambda: cuda.log.append("step"))
    one.capture(lambda: cuda.log.append("step"))()
    assert cuda.log == [
        "side cuda:1 waits for current",
        "in side cuda:1",
        "step",
        "out of side cuda:1",
        "current waits for side cuda:1",
        "in cuda:1",
        "capture on side cuda:1 into pool",
        "step",
        "captured",
        "out of cuda:1",
        "replay",
    ]
    assert CudaRecorder(torch.device("cuda", 1)).stream is one.stream


def test_captures_of_threads_are_on_streams_of_their_own_and_end_before_anything_waits_for_the_device(
    cuda,
):
    device = torch.device("cuda", 0)
    both = threading.Barrier(2)

    def record(_):
        one = CudaRecorder(device)
        both.wait()
        one.capture(lambda: pool.submit(synchronize, device) and time.sleep(0.02))
        return id(one.stream)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(record, range(2)))) == 2
    order = [line.split()[0] for line in cuda.log if line.startswith(("capture", "wait"))]
    assert sorted(order) == ["capture"] * 2 + ["captured"] * 2 + ["wait"] * 2
    assert all(order[i + 1] == "captured" for i, word in enumerate(order) if word == "capture")


@pytest.mark.cpu
def test_a_capture_that_runs_out_of_memory_says_so(cuda):
    def end():
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def step():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    cuda.end = end
    with pytest.raises(RuntimeError, match="previous error during capture") as failed:
        CudaRecorder(torch.device("cuda", 0)).capture(step)
    assert is_out_of_memory(failed.value)


def test_a_capture_that_fails_is_the_last_one(cuda, monkeypatch):
    monkeypatch.setattr(CudaRecorder, "failure", "")
    expected = Counter({"shape": 9, "other": 9})
    steps = []
    replays = Replays(CudaRecorder(torch.device("cuda", 0)), expected, list, 0.0)

    def end():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    cuda.end = end
    with pytest.warns(
        RuntimeWarning,
        match="recording a step on cuda:0 failed: .* when stream is capturing. Nothing",
    ):
        for shape in ["shape"] * 5 + ["other"] * 5:
            replays.take(shape, lambda: steps.append(1))
    assert len(steps) == 10 + 1  # one was captured, and so not taken
    assert sum(text.startswith("capture on") for text in cuda.log) == 1
    assert cuda.log.count("back to current") == 1
