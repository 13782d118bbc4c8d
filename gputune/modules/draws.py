"""What a user's module draws in its steps, drawn ahead of them: the numbers that its own draws would have been.

A forward in training is tried once on rows of each number, to see what it draws; from then on every step finds these
draws in a buffer, and may be recorded.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gputune.modules.trace import DispatchMode, TraceError, tensors
from gputune.native.library import fill_uniform
from gputune.population.batches import Batch, Batches
from gputune.seeding import keyed_draws, start_stream, stream_seed

_DRAW_BYTES = 64 << 20  # of draws that are made ahead

_PLAIN = set(
    "rand randn randint randperm rand_like randn_like randint_like uniform uniform_ normal_ exponential_ geometric_ "
    "cauchy_ log_normal_ random_".split()
)
"""Operations that read the shape of what they are given, and none of its numbers."""
_PLAIN_OVERLOADS = {"bernoulli": "p", "bernoulli_": "float", "normal": "float_float", "normal_functional": "default"}
_UNIFORM = {torch.ops.aten.rand.default, torch.ops.aten.rand_like.default}
_DROPOUT = torch.ops.aten.native_dropout.default
"""Dropout in training on a GPU: (input, p, True) -> (output, mask)."""


@dataclass(frozen=True)
class _Draw:
    """One draw of a forward, whose tensors among ``args`` are made again, empty, since only their layout matters."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def make(self) -> Tensor:
        result: Tensor = self.function(*(x() if isinstance(x, partial) else x for x in self.args), **self.kwargs)
        return result


class ModuleDraws:
    """The draws of some steps ahead, by one member's ``forward`` in training on minibatches of each number of rows.

    Raises TraceError where it draws what depends on other numbers than the key of the step.
    """

    def __init__(self, forward: Callable[[Batch], object], batches: Batches, seed: int) -> None:
        self.seed, self.device = seed, batches.data.device
        self.rows = [{part.rows for part in shape.parts} for shape in batches.shapes]
        self.draws: dict[int, list[_Draw]] = {}
        for step, shape in enumerate(batches.shapes):
            for part, batch in zip(shape.parts, batches.at(0, step)):
                if part.rows not in self.draws:
                    with torch.no_grad(), keyed_draws(self.device, seed, "try"), (recorder := _DrawRecorder()):
                        forward(batch)
                    self.draws[part.rows] = recorder.draws
        with keyed_draws(self.device, seed, "try"):
            samples = {rows: [draw.make() for draw in draws] for rows, draws in self.draws.items()}
        size = sum(sample.nbytes for sample in tensors(samples))
        self.ahead = max(1, min(len(self.rows), _DRAW_BYTES // max(1, size)))
        self.buffers = {
            rows: [sample.new_empty((self.ahead, *sample.shape), device=self.device) for sample in several]
            for rows, several in samples.items()
        }
        self.uniform = {
            rows
            for rows, several in samples.items()
            if {draw.function for draw in self.draws[rows]} <= _UNIFORM
            and all(x.dtype == torch.float32 and x.is_contiguous() and x.device.type == "cpu" for x in several)
        }
        """Rows whose draws compiled code can make: the same numbers."""

    def fill(self, epoch: int, step: int) -> None:
        """Draw for this step and those ahead, where the buffer ends before it."""
        if step % self.ahead or not any(self.draws.values()):
            return
        with keyed_draws(self.device, self.seed, "dropout", epoch, step):
            for slot, several in enumerate(self.rows[step : step + self.ahead]):
                for rows in several:
                    parts = [buffer[slot] for buffer in self.buffers[rows]]
                    key = "dropout", epoch, step + slot
                    if rows not in self.uniform or not fill_uniform(stream_seed(self.seed, *key), parts):
                        start_stream(self.device, self.seed, *key)
                        for draw, part in zip(self.draws[rows], parts):
                            part.copy_(draw.make())

    def at(self, step: Tensor, rows: int) -> tuple[Tensor, ...]:
        """Return the draws of a minibatch of so many rows in the step that a counter on the device says."""
        slot = torch.remainder(step, self.ahead).view(1)
        return tuple(buffer.index_select(0, slot)[0] for buffer in self.buffers[rows])


def draws_of(forward: Callable[[], object]) -> tuple[Tensor, ...]:
    """Return what a forward draws, in the order of its draws. Raises TraceError as ``ModuleDraws`` does."""
    with torch.no_grad(), (recorder := _DrawRecorder()):
        forward()
    return tuple(recorder.results)


class _DrawRecorder(DispatchMode):
    """Notes what is drawn, and how."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws: list[_Draw] = []
        self.results: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _DROPOUT:
            with self:  # what a GPU draws and applies at once
                return _dropout(args[0], torch.bernoulli(args[0], 1 - args[1]), args[1])
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        plain = name in _PLAIN or _PLAIN_OVERLOADS.get(name) == func._overloadname
        if not plain or kwargs.get("generator") is not None:  # and a generator of the user's own stays where it is
            raise TraceError(f"{func} draws what depends on other numbers than the key of its step")
        self.draws.append(_Draw(func, tuple(_empty_like(x) if isinstance(x, Tensor) else x for x in args), kwargs))
        result = func(*args, **kwargs)
        self.results.append(result.clone())  # the module goes on in place
        return result


def _dropout(x: Tensor, kept: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return x * kept * (1 / (1 - p)), kept.bool()


def _empty_like(x: Tensor) -> partial[Tensor]:
    return partial(torch.empty_strided, tuple(x.shape), x.stride(), dtype=x.dtype, device=x.device)


def replay_draws(draws: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Let these be what operations that draw give inside, one after the other."""
    return _DrawReplayer(draws) if draws else nullcontext()  # a mode costs something in every call


class _DrawReplayer(DispatchMode):
    """Gives draws that were made before."""

    def __init__(self, draws: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = iter(draws)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        drawn = next(self.draws)
        if func is _DROPOUT:
            return _dropout(args[0], drawn.reshape(args[0].shape), args[1])
        if args and isinstance(args[0], Tensor):  # a substitute may have other axes for the same numbers
            drawn = drawn.reshape(args[0].shape)
        return args[0].copy_(drawn) if func._schema.is_mutable else drawn
