"""The part of torch.cuda that gputune uses, on top of the simulated device (``device.cpp``).

It is loaded before torch: ``SIMULATED_CUDA=DIR/device.so PYTHONPATH=tests pytest -p
simulated_cuda.torch_cuda``.

Numbers are those of the CPU's kernels. It finds tensors on the wrong device, waits and copies where
none may be, memory that is read before it is written, and what a graph cannot record; not races
between streams, nor how fast a GPU is.
"""

import ctypes
import functools
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if "torch" in sys.modules:
    raise RuntimeError(
        "load the simulated device before torch, which looks once for its CUDA hooks."
    )
_torch = importlib.util.find_spec("torch")
assert _torch is not None and _torch.origin is not None
ctypes.CDLL(str(Path(_torch.origin).parent / "lib/libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
_device = ctypes.CDLL(os.environ["SIMULATED_CUDA"], mode=ctypes.RTLD_GLOBAL)
_device.simulated_counts.restype = ctypes.c_char_p
for _name in ("allocated", "peak", "limit"):
    getattr(_device, f"simulated_{_name}").restype = ctypes.c_int64
_device.simulated_set_limit.argtypes = [ctypes.c_int64]

import torch  # noqa: E402
from torch.cuda import _utils  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402

from stand_in import NoReading, Operation, Recording, Tape  # noqa: E402

fail_next_capture: RuntimeError | None = None
"""How the next capture ends."""
INVALID = RuntimeError("CUDA error: operation failed due to a previous error during capture")
underway = False
"""Whether PyTorch's allocator believes in a capture, as that of torch < 2.13 does for ever after
one that failed."""


def counts(kind: str) -> dict[str, int]:
    """Return how often each operation did so: "launch", "to device" and "to host" (copies), "wait",
    "replay"."""
    lines = (line.split(" ", 1) for line in _device.simulated_counts().decode().splitlines())
    return {
        what.removeprefix(kind).strip(): int(times)
        for times, what in lines
        if what.startswith(kind)
    }


def begin_worker(parent: int) -> None:
    """The start of a worker process, which has loaded the simulated device by then."""
    from gputune.executors.worker import begin_worker

    begin_worker(parent)


def forget() -> None:
    """Count anew."""
    _device.simulated_forget()


@contextmanager
def memory_limit(size: int, device: Any = "cuda") -> Iterator[None]:
    """Limit the memory of a device inside the block, in addition to the memory in use."""
    gc.collect()
    before = _device.simulated_limit()
    _device.simulated_set_limit(_device.simulated_allocated(_index(device)) + size)
    try:
        yield
    finally:
        _device.simulated_set_limit(before)


def _devices() -> int:
    return int(_device.simulated_devices())


def _index(device: Any = None) -> int:
    device = (
        torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    )
    return int(_device.simulated_device() if device.index is None else device.index)


class Device:
    """``torch.cuda.device``."""

    def __init__(self, device: Any) -> None:
        self.index = _index(device)

    def __enter__(self) -> None:
        self.before = _index()
        _device.simulated_set_device(self.index)

    def __exit__(self, *error: object) -> None:
        _device.simulated_set_device(self.before)


class Stream:
    """``torch.cuda.Stream``: one of the names of the only queue."""

    def __init__(self, device: Any = None, *, default: bool = False) -> None:
        self.device = torch.device("cuda", _index(device))
        self.default = default

    def wait_stream(self, other: "Stream") -> None:
        pass


_defaults = [Stream(i, default=True) for i in range(_devices())]


class _Thread(threading.local):
    """The state that each thread has separately."""

    def __init__(self) -> None:
        self.current = list(_defaults)  # stream of each device
        self.recording: Recording | None = None  # what is being recorded


_thread = _Thread()


def _set_stream(stream: Stream) -> None:
    _device.simulated_set_device(stream.device.index)
    _thread.current[stream.device.index] = stream


@contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    before = _thread.current[stream.device.index]
    with Device(_index()):
        _set_stream(stream)
        try:
            yield
        finally:
            _thread.current[stream.device.index] = before


class Event:
    """``torch.cuda.Event``, on a device that takes a millisecond for an operation and has no other
    work."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing, "made to measure time"

    def record(self, stream: Stream | None = None) -> None:
        self.operations = sum(counts("launch").values())

    def synchronize(self) -> None:
        _refuse_in_capture()

    def elapsed_time(self, end: "Event") -> float:
        return float(end.operations - self.operations)


class Graph:
    """``torch.cuda.CUDAGraph``: the operations that were recorded, run again on the same memory."""

    tape: Tape | None = None

    def replay(self) -> None:
        assert self.tape is not None, "replayed without a capture"
        _refuse_in_capture()
        _device.simulated_count(b"replay")
        self.tape.replay()


@contextmanager
def _graph(
    graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = ""
) -> Iterator[None]:
    """``torch.cuda.graph``. A capture that fails leaves the side stream current, as PyTorch's
    does."""
    global fail_next_capture, underway
    _synchronize()
    _empty_cache()
    assert not stream.default, "graphs are captured on a side stream"
    before = _thread.current[stream.device.index]
    _set_stream(stream)
    _thread.recording = recording = Recording(stream.device)
    _device.simulated_set_capturing(1)
    try:
        with (
            recording.undone(),
            NoReading(),
            recording,
            torch.autograd.set_multithreading_enabled(False),
        ):
            yield
        if fail_next_capture is not None:
            raise fail_next_capture
        graph.tape = recording.close()
        _device.simulated_count(b"capture")
    except RuntimeError:
        underway = True
        raise
    finally:
        fail_next_capture = _thread.recording = None
        _device.simulated_set_capturing(0)
        if not underway:
            _thread.current[stream.device.index] = before


_CARD = SimpleNamespace(
    multi_processor_count=2,
    total_memory=1 << 30,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
)
"""The properties that gputune and torch ask for: those of an H100, with fewer multiprocessors and
less memory."""

_WITHOUT_ASKING = (48 << 10) - 1  # bytes of shared memory


@functools.cache
def _emulator() -> Any:
    """Return the emulator that launches kernels on the CPU; its builds are stored next to the
    device.
    """
    from native.emulated import Emulator

    return Emulator(Path(os.environ["SIMULATED_CUDA"]).parent)


class Kernel:
    """A kernel of CUDA C++, compiled for the CPU: its threads are fibers, its blocks come one after
    the other."""

    def __init__(self, source: str, name: str) -> None:
        self.source = source
        self.name = name
        self.shared = _WITHOUT_ASKING
        _emulator().kernel(source)

    def set_shared_memory_config(self, shared_mem_bytes: int) -> None:
        assert shared_mem_bytes <= _CARD.shared_memory_per_block_optin
        self.shared = max(self.shared, shared_mem_bytes)

    def __call__(
        self, grid: Any, block: Any, args: list[torch.Tensor | int], shared_mem: int = 0
    ) -> None:
        tensors = [arg for arg in args if not isinstance(arg, int)]
        assert len({tensor.device for tensor in tensors}) == 1 and tensors[0].is_cuda
        assert tensors[0].device.index == _index(), "the current stream is that of another device"
        assert shared_mem <= self.shared
        # What goes through its work with a stride does all of it in whatever number of threads.
        run = functools.partial(
            self.run, *(grid[0], block[0], shared_mem) if shared_mem else (2, 2, 0)
        )
        if (recording := _thread.recording) is not None:
            with _disable_current_modes():  # among them the recording
                for tensor in tensors:
                    recording._remember(tensor)
                encoded = tuple(map(recording._encode, args))
            recording.operations.append(Operation(run, encoded, {}, ()))
        run(*args)

    def run(self, grid: int, block: int, shared: int, *args: torch.Tensor | int) -> None:
        _device.simulated_count(b"launch kernel")
        words = [arg if isinstance(arg, int) else arg.data_ptr() for arg in args]
        size = {"blocks": grid, "threads": block, "shared": shared}
        assert _emulator().launch(self.source, self.name, words, **size), (
            "threads wait for others that have ended"
        )


def _refuse_in_capture() -> None:
    if _device.simulated_capturing():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def _refuse_while_captured() -> None:
    """A call that concerns the whole device ends the captures of all threads."""
    if _device.simulated_captures():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def _synchronize(device: Any = None) -> None:
    _refuse_while_captured()
    _device.simulated_count(b"wait synchronize")


def _empty_cache() -> None:
    _refuse_while_captured()
    if underway:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")


_WHOLE = int(_device.simulated_limit())  # bytes of a device

_generators = [torch.Generator().manual_seed(0) for _ in range(_devices())]

_FUNCTIONS: dict[str, Any] = {
    "_is_compiled": lambda: True,
    "_is_in_bad_fork": lambda: False,
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": _devices,
    "current_device": _index,
    "set_device": lambda device: _device.simulated_set_device(_index(device)),
    "device": Device,
    "get_device_name": lambda device=None: "a GPU that is not there",
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: _CARD,
    "is_bf16_supported": lambda including_emulation=True: True,
    "Stream": Stream,
    "stream": _stream,
    "set_stream": _set_stream,
    "current_stream": lambda device=None: _thread.current[_index(device)],
    "Event": Event,
    "_compile_kernel": Kernel,
    "is_current_stream_capturing": lambda: bool(_device.simulated_capturing()),
    "CUDAGraph": Graph,
    "graph": _graph,
    "graph_pool_handle": lambda: (0, 1),
    "synchronize": _synchronize,
    "empty_cache": _empty_cache,
    "mem_get_info": lambda device=None: (
        _device.simulated_limit() - _device.simulated_allocated(_index(device)),
        _device.simulated_limit(),
    ),
    "set_per_process_memory_fraction": lambda fraction, device=None: _device.simulated_set_limit(
        int(fraction * _WHOLE)
    ),
    "memory_allocated": lambda device=None: _device.simulated_allocated(_index(device)),
    "memory_reserved": lambda device=None: _device.simulated_allocated(_index(device)),
    "max_memory_allocated": lambda device=None: _device.simulated_peak(_index(device)),
    "reset_peak_memory_stats": lambda device=None: _device.simulated_reset_peak(_index(device)),
    "get_rng_state": lambda device="cuda": _state(device),
    "set_rng_state": lambda state, device="cuda": _generators[_index(device)].set_state(state),
    "manual_seed": lambda seed: _generators[_index()].manual_seed(seed),
    "manual_seed_all": lambda seed: [generator.manual_seed(seed) for generator in _generators],
}


def _state(device: Any) -> torch.Tensor:
    # a real GPU makes one where it has none yet
    _device.simulated_count(f"context {_index(device)}".encode())
    return _generators[_index(device)].get_state()


for _name, _function in _FUNCTIONS.items():
    setattr(torch.cuda, _name, _function)
_utils._get_gpu_rtc_library = lambda: None
# a binary is its source
_utils._nvrtc_compile = lambda source, name, *options, **more: (source.encode(), name)
_utils._cuda_load_module = lambda binary, names: {
    name: Kernel(binary.decode(), name) for name in names
}
torch._C._cuda_getCurrentRawStream = lambda device: 0  # what torch.compile imports
_clone_storage = torch.UntypedStorage.clone


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return a copy of a storage: torch makes those of its own devices only."""
    if storage.device.type == "cpu":
        return _clone_storage(storage)
    values = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return values.clone().untyped_storage()


torch.UntypedStorage.clone = _clone  # type: ignore[method-assign]
torch.cuda.random.manual_seed_all = _FUNCTIONS["manual_seed_all"]
