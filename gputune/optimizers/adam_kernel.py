"""The update of adam and adamw in two launches: ``adam.cu``, compiled where a GPU is, for steps that are recorded."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gputune.optimizers.blocks import Blocks
from gputune.optimizers.rules import BETA1, EPS

_SOURCE = Path(__file__).with_name("adam.cu")
_THREADS, _MOST_BLOCKS = 256, 1 << 16

Kernel = Callable[..., None]
"""Called with ``grid``, ``block`` and the tensors ``args``, it launches on the current stream."""


def source(dtype: torch.dtype) -> str:
    """Return the source for parameters of a dtype."""
    return f"typedef {'float' if dtype == torch.float32 else 'double'} real;\n{_SOURCE.read_text()}"


@cache
def kernels(device: torch.device, dtype: torch.dtype) -> tuple[Kernel, Kernel] | None:
    """Return the kernels for a GPU, compiled once in a process; None, with a warning, where that fails."""
    try:
        with torch.cuda.device(device):
            names = ("adam_rates", "adam_step")
            rates, step = (torch.cuda._compile_kernel(source(dtype), name) for name in names)
    except Exception as error:  # of NVRTC, of the driver, of a library that is not there
        warnings.warn(
            f"the update of adam and adamw cannot be compiled for {device}, and takes some forty launches a step: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return rates, step


class AdamKernel:
    """The update of one chunk by these kernels.

    ``hyperparameters`` (4, F, C), double: learning rate, decoupled weight decay, other weight decay, beta2.
    """

    def __init__(
        self, compiled: tuple[Kernel, Kernel], blocks: Blocks, hyperparameters: Tensor, dtype: torch.dtype
    ) -> None:
        self.compiled, self.hyperparameters = compiled, hyperparameters
        _, folds, trials = hyperparameters.shape
        self.members, self.entries, device = folds * trials, blocks.size, hyperparameters.device
        sizes = [self.members, trials, self.entries, len(blocks.blocks), *_layout(blocks)]
        self.sizes = torch.tensor(sizes, dtype=torch.int64).to(device)
        self.numbers = torch.tensor([BETA1, EPS], dtype=torch.float64).to(device)
        self.ones = torch.ones_like(hyperparameters[0])
        self.all = torch.ones_like(self.ones, dtype=torch.bool)
        self.rates = torch.empty((7, folds, trials), dtype=dtype, device=device)

    def step(
        self,
        theta: Tensor,
        grad: Tensor,
        moments: Sequence[Tensor],
        done: Tensor,
        *,
        factors: Sequence[Tensor | None],
        active: Tensor | None,
    ) -> None:
        """Take a step of the members that are ``active`` (F, C), None: of all, and count it in ``done`` (F, C).

        ``factors`` are those of the rate and of the weight decay, (F, C) in double precision, None where all are 1.
        """
        tables = [self.ones if factor is None else factor for factor in factors]
        who = self.all if active is None else active
        first = [self.sizes, self.numbers, self.hyperparameters, *tables, who, done, self.rates]
        _launch(self.compiled[0], self.members, first)
        _launch(self.compiled[1], self.entries, [self.sizes, self.numbers, self.rates, grad, *moments, theta])


def _launch(kernel: Kernel, threads: int, args: Sequence[Tensor]) -> None:
    blocks = min(_MOST_BLOCKS, -(-threads // _THREADS))
    kernel(grid=(blocks, 1, 1), block=(_THREADS, 1, 1), args=list(args))


def _layout(blocks: Blocks) -> list[int]:
    """Return for each block where it begins, the entries of a fold, and how many neighbours belong to one trial."""
    layout, begin = [], 0
    for block, size in zip(blocks.blocks, blocks.sizes):
        inner = 1
        for axis in block.shape[block.trial_axis + 1 :]:
            inner *= axis
        layout += [begin, size // block.shape[0], inner]
        begin += size
    return layout
