"""A chunk whose members each train through a whole epoch in one thread block of a GPU: ``native/member.cu``.

It is the compiled chunk with its arrays on the GPU, and with launches in the place of threads. Blocks take members from
one queue, the longest first. A launch is so short that Ctrl-C and displays have their turn.
"""

import math
import time
from functools import cache, partial

import numpy as np
import torch

from gputune.data.dataset import Dataset
from gputune.engine.compiled import CompiledChunk
from gputune.engine.dropout import Draws
from gputune.memory import synchronize
from gputune.native.cuda import Kernel, attempt, launch, without_nvrtc
from gputune.native.library import OPTIMIZERS, NotBuiltError, make_work
from gputune.native.member_kernel import MemberKernel, choose_kernel, compile_kernel, unknown
from gputune.population.batches import row_order
from gputune.population.population import ModelKind, hidden_widths, is_plain, padded_width
from gputune.types import Config

_SECONDS = 0.25  # of a launch; half of what a display can wait, as the speed of the next is a guess
_FIRST_TURNS = 16  # of the first launch of a chunk, whose speed is not known
_OLDEST = (8, 0)  # compute capability

# What a block has beside what its code asks for, and the most threads of a multiprocessor.
# Source: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities
_RESERVED_BYTES, _THREADS = 1024, 2048


class KernelChunk(CompiledChunk):
    """Members on a GPU, in the flat buffers that compiled members have. Raises NotBuiltError without a kernel."""

    draws: Draws | None = None
    pace: float = math.inf
    """Turns a second: a step of as many members as there are blocks is one."""

    def _rebuild(self) -> None:
        super()._rebuild()
        device, steps = self.data.device, int(self.steps.max())
        if self.network.rates is not None:
            rows = self.draw_rows()
            layers, width = self.network.depth, self.network.hidden
            self.draws = Draws(rows.tolist(), layers=layers, width=width, seed=self.seed, device=device)
            start = np.arange(steps) % self.draws.ahead * self.draws.buffer[0].numel()
            self.arrays |= {
                "draws": self.draws.buffer,
                "draw_start": self.placed(start),
                "draw_rows": self.placed(np.full_like(rows, rows.max())),
            }
        self.arrays["nanoseconds"] = None
        self.kernel = choose_kernel(
            self.numbers,
            moments=len(self._moments),
            dropout=self.draws is not None,
            batch=int(self.sizes.max()),
            dtype=self.data.dtype,
            shared=shared_bytes(device),
        )
        compiled, why = _kernel(self.kernel, device)
        if compiled is None:
            raise NotBuiltError(why)
        self.compiled = compiled
        self.blocks = min(self.steps.size, _blocks(self.kernel, device))
        self.scratch = self.flat.new_empty(self.blocks * self.kernel.scratch)
        self.next = torch.zeros(1, dtype=torch.int32, device=device)
        ends = np.sort(self.steps, axis=None)
        active = ends.size - np.searchsorted(ends, np.arange(steps), side="right")  # members that take a step
        self.turns = np.cumsum(-(-active // self.blocks))

    def advance(self, epoch: int) -> None:
        """Train for one epoch, and compute the outputs on the validation rows where there is a scoring."""
        device = self.data.device
        order = row_order(self.data, self.seed, epoch).contiguous()
        told = make_work({**self.numbers, "epoch": epoch}, {**self.arrays, "order": order})
        work = torch.frombuffer(bytearray(told), dtype=torch.int64).to(device)
        begin, last = 0, len(self.turns)
        while begin < last:
            end, began = self._end(begin), time.perf_counter()
            if self.draws is not None:
                self.draws.fill(epoch, begin)
            self._launch(work, begin, end)
            if end < last:
                synchronize(device)
                if begin == 0:  # later ones are quicker: the smallest minibatches make the most steps
                    self.pace = self.turns[end - 1] / (time.perf_counter() - began)
            begin = end

    def _end(self, begin: int) -> int:
        """Return the step before which a launch ends: it is short, and the draws of its steps are there."""
        turns = _FIRST_TURNS if self.pace == math.inf else self.pace * _SECONDS
        done = self.turns[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(self.turns, done + turns, side="right")))
        if self.draws is not None:
            end = min(end, (begin // self.draws.ahead + 1) * self.draws.ahead)
        return min(end, len(self.turns))

    def _launch(self, work: torch.Tensor, begin: int, end: int) -> None:
        """Let every member take the steps from ``begin`` to before ``end`` of the epoch, without waiting for them."""
        self.next.zero_()
        threads = self.kernel.threads
        args: list[torch.Tensor | int] = [work, self.next, self.scratch, begin, end, 1]
        launch(self.compiled, self.blocks * threads, args, block=threads, shared=self.kernel.shared)


@cache
def _kernel(kernel: MemberKernel, device: torch.device) -> tuple[Kernel | None, str]:
    """Return the kernel for a GPU; None, with a warning, and why, where it cannot be compiled."""
    return attempt("member.cu", device, partial(compile_kernel, kernel, device))


def _blocks(kernel: MemberKernel, device: torch.device) -> int:
    """Return how many blocks a GPU holds at once; one that waits for its turn finds an empty queue."""
    card = torch.cuda.get_device_properties(device)
    by_memory = card.shared_memory_per_multiprocessor // (kernel.shared + _RESERVED_BYTES)
    each = max(1, min(by_memory, _THREADS // kernel.threads))
    blocks: int = card.multi_processor_count * each
    return blocks


def shared_bytes(device: torch.device) -> int:
    """Return the shared memory that a thread block may have."""
    card = torch.cuda.get_device_properties(device)
    size: int = card.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return size


def obstacle(device: torch.device) -> str:
    """Return why the kernel cannot train on a device, and what to do; "" where it can."""
    if device.type != "cuda":
        return (
            f"backend='kernel' trains on a GPU, and the device is {str(device)!r}; choose device='cuda', or "
            "backend='auto'."
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return (
            "backend='kernel' needs a GPU of compute capability 8.0 (Ampere) or newer, and "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}; choose backend='graph', or "
            "'auto'."
        )
    if why := without_nvrtc():
        return f"backend='kernel' compiles its code when it is first used: {why} Or choose backend='graph'."
    return ""


def lacks(config: Config, kind: ModelKind, data: Dataset) -> str:
    """Return the part of a trial that the kernel does not know, in words; "" where it trains it."""
    if config["optimizer"] in OPTIMIZERS and not is_plain(config):
        return "clip_norm, ema, beta2, or rates and schedules of their own for parameters"
    deep = kind == "mlp"
    return (
        unknown(
            inputs=data.n_features,
            width=padded_width(max(hidden_widths(config), default=1)) if deep else 0,
            depth=config["depth"] if deep else 0,
            outputs=data.n_outputs,
            activation=config["activation"],
            optimizer=config["optimizer"],
            dtype=data.dtype,
            shared=shared_bytes(data.device),
        )
        or ""
    )
