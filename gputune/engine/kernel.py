"""Train the built-in models on a GPU with one CUDA kernel, in which a thread block trains a member.

A chunk holds trials of one tensor shape that train together. A member is one trial on one fold. It
trains through whole epochs in one thread block. The kernel is ``native/member.cu``. ``KernelChunk``
is a ``CompiledChunk`` with its arrays on the GPU, and with kernel launches instead of threads.
Blocks take members from one queue, the longest member first. A launch is so short that Ctrl-C and a
display on the GPU still respond.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from gputune.data.dataset import Dataset
from gputune.engine.compiled import CompiledChunk, WorkArrays
from gputune.engine.dropout import MlpDraws
from gputune.ground.device import synchronize
from gputune.ground.errors import InputError, option
from gputune.ground.types import Config, Say
from gputune.native.cuda import (
    Kernel,
    MemberKernel,
    attempt,
    compile_kernel,
    launch,
    tile_of,
    without_nvrtc,
)
from gputune.native.library import ACTIVATIONS, OPTIMIZERS, NotBuiltError, make_work
from gputune.optimizers.rules import n_moments
from gputune.population.batches import row_order
from gputune.population.kinds import (
    ModelKind,
    hidden_activations,
    hidden_layers,
    highest_dropout,
    padded_width,
)
from gputune.population.population import is_plain

# Intended seconds of a launch: half of the time that a display can wait, because the speed of the
# next launch is a guess.
_SECONDS = 0.25
_FIRST_TURNS = 16  # turns in the first launch of a chunk, when its speed is not known
_OLDEST = (8, 0)  # oldest compute capability

# Shared memory that the system reserves for each block in addition to its code's request, and the
# most threads of a multiprocessor.
# Source: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities
_RESERVED_BYTES = 1024
_THREADS = 2048


class KernelChunk(CompiledChunk):
    """Trials that train together in a CUDA kernel. The flat buffers are the same as in a
    ``CompiledChunk``.

    Raises NotBuiltError if the kernel cannot be built.
    """

    # why this process no longer trains with the kernel, as a sentence
    failure: ClassVar[str] = ""
    draws: MlpDraws | None = None
    # Turns per second. In one turn, each block takes a step of one member.
    pace: float = math.inf

    def _rebuild(self) -> None:
        """Build the arguments of the kernel and its scratch memory, and count the turns of an
        epoch. In a turn, each thread block takes a training step of one member."""
        super()._rebuild()
        device = self.data.device
        steps = int(self.steps.max())
        self.arrays["nanoseconds"] = None
        self.kernel = kernel_of(self.configs, self.network.kind, self.data)
        self.compiled = compiled(self.kernel, device)
        self.blocks = min(self.steps.size, _blocks(self.kernel, device))
        self.scratch = self.flat.new_empty(self.blocks * self.kernel.scratch)
        self.next = torch.zeros(1, dtype=torch.int32, device=device)
        # (steps,): members that take each step, and turns from the first step to the end of each
        # step.
        ends = np.sort(self.steps, axis=None)
        active = ends.size - np.searchsorted(ends, np.arange(steps), side="right")
        self.turns = np.cumsum(-(-active // self.blocks))

    def make_buffers(self) -> WorkArrays:
        """Allocate the buffers for the scores of an epoch and for the random numbers of dropout."""
        buffers = super().make_buffers()
        if self.network.rates is None:
            return buffers
        rows = self.draw_rows()
        self.draws = MlpDraws(
            rows.tolist(),
            layers=self.network.depth,
            width=self.network.hidden,
            seed=self.seed,
            device=self.data.device,
        )
        # (steps,): position of a step's draws in the buffer
        starts = np.zeros(self.numbers["longest"], dtype=np.int64)
        slots = np.arange(len(rows)) % self.draws.ahead
        starts[: len(rows)] = slots * self.draws.buffer[0].numel()
        buffers["draws"] = self.draws.buffer
        buffers["draw_start"] = self.place(starts)
        buffers["draw_rows"] = self.place(np.full_like(rows, rows.max()))
        return buffers

    def advance(self, epoch: int) -> None:
        """Train all members for one epoch. If a scoring is set, also compute the scores."""
        self.epoch = epoch + 1
        order = row_order(self.data, self.seed, epoch).contiguous()
        struct = make_work({**self.numbers, "epoch": epoch}, {**self.arrays, "order": order})
        work = torch.frombuffer(bytearray(struct), dtype=torch.int64).to(self.data.device)
        begin = 0
        while begin < len(self.turns):
            end = self._end(begin)
            if self.draws is not None:
                self.draws.fill(epoch, begin)
            began = time.perf_counter()
            self.next.zero_()
            threads = self.kernel.threads
            launch(
                self.compiled,
                self.blocks * threads,
                [work, self.next, self.scratch, begin, end, 1],
                block=threads,
                shared=self.kernel.shared,
            )
            synchronize(self.data.device)
            # Later launches are quicker: the smallest minibatches make the most steps.
            if begin == 0:
                self.pace = self.turns[end - 1] / (time.perf_counter() - began)
            begin = end

    def _end(self, begin: int) -> int:
        """Return the index after the last step of a kernel launch that begins at step ``begin``.

        The launch is short, and the buffer has the random numbers of dropout for all of its steps.
        """
        turns = _FIRST_TURNS if self.pace == math.inf else self.pace * _SECONDS
        done = self.turns[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(self.turns, done + turns, side="right")))
        if self.draws is not None:
            end = min(end, (begin // self.draws.ahead + 1) * self.draws.ahead)
        return min(end, len(self.turns))


def kernel_of(configs: Sequence[Config], kind: ModelKind, data: Dataset) -> MemberKernel:
    """Return the description of the CUDA kernel that trains complete configurations of one tensor
    shape.

    ``MemberKernel.unsupported`` tells whether the kernel supports these configurations.
    """
    first = configs[0]
    data = data.of(configs[0])
    hidden = hidden_layers(first, kind)
    depth = len(hidden)
    batch = max(config["batch_size"] for config in configs)
    return MemberKernel(
        inputs=data.n_features,
        width=padded_width(max(hidden)) if hidden else 0,
        depth=depth,
        outputs=data.n_outputs,
        activations=tuple(map(ACTIVATIONS.index, hidden_activations(first))) if hidden else (),
        moments=n_moments(first["optimizer"], (config["momentum"] for config in configs)),
        classes=data.task != "regression",
        dropout=depth > 0 and any(map(highest_dropout, configs)),
        dtype=data.dtype,
        rows=tile_of(min(batch, max(data.train_lengths))),
        tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
    ).with_largest_tile(_shared_bytes(data.device))


_kernels: dict[tuple[MemberKernel, torch.device], Kernel] = {}


def compiled(kernel: MemberKernel, device: torch.device, say: Say = str) -> Kernel:
    """Return the compiled code of a CUDA kernel for a GPU.

    Compiling takes seconds, once on each machine. The function announces it through ``say``. Raises
    NotBuiltError if the kernel cannot be compiled, with a warning the first time. After a failure,
    the process makes no other attempt.
    """
    code = _kernels.get((kernel, device))
    if code is None:
        if not KernelChunk.failure:
            build = partial(compile_kernel, kernel, device, say)
            code, KernelChunk.failure = attempt("member.cu", device, build)
        if code is None:
            raise NotBuiltError(KernelChunk.failure)
        _kernels[kernel, device] = code
    return code


def _blocks(kernel: MemberKernel, device: torch.device) -> int:
    """Return the number of thread blocks of a kernel that a GPU runs at the same time.

    Further blocks would wait, and would then find no members in the queue.
    """
    card = torch.cuda.get_device_properties(device)
    by_memory = card.shared_memory_per_multiprocessor // (kernel.shared + _RESERVED_BYTES)
    by_threads = _THREADS // kernel.threads
    return int(card.multi_processor_count * max(1, min(by_memory, by_threads)))


def _shared_bytes(device: torch.device) -> int:
    """Return the largest number of bytes of shared memory that a thread block on this GPU may
    use."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def obstacle(device: torch.device) -> InputError | None:
    """Return the error for ``backend="kernel"`` on a device where the CUDA kernel cannot train.

    The result is None if the kernel can train on the device.
    """
    if device.type != "cuda":
        rule = f"trains on a GPU, but the device is {str(device)!r}"
        remedy = f"Choose {option('device', 'cuda')} or {option('backend', 'auto')}."
    elif (capability := torch.cuda.get_device_capability(device)) < _OLDEST:
        card = f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
        rule = f"needs a GPU of compute capability 8.0 (Ampere) or newer, but {card}"
        remedy = f"Choose {option('backend', 'graph')} or {option('backend', 'auto')}."
    elif reason := without_nvrtc():
        rule = f"compiles its code when it is first used, which fails here: {reason}"
        remedy = f"Or choose {option('backend', 'graph')}."
    else:
        return None
    return InputError("backend='kernel'", rule, remedy=remedy)


def lacks(config: Config, kind: ModelKind, data: Dataset) -> str:
    """Return a phrase that names the option of a trial that the CUDA kernel does not support, or
    ""."""
    if config["optimizer"] not in OPTIMIZERS:
        return f"the optimizer {config['optimizer']!r} ({', '.join(OPTIMIZERS)})"
    if not is_plain(config):
        return "clip_norm, ema, beta2, or rates and schedules of single parameters"
    return kernel_of([config], kind, data).unsupported(_shared_bytes(data.device))
