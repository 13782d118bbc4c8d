"""Calls a user's module with other parameters, or with random numbers made in advance.

A draw is an operation that makes random numbers, or the tensor of these numbers. A recorded step is
the list of operations of one training step, which is replayed for the next steps. A member is one
trial on one fold. Stacked members share one call of the module, by torch.func.vmap.

To record a module's draws, gputune tries a forward pass in training once for each number of rows.
From then on, every step reads its random numbers from a buffer. They equal the random numbers that
the step itself would have drawn. The step can therefore be recorded.
"""

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gputune.ground.seeding import keyed_draws, start_stream, stream_seed
from gputune.ground.types import Params
from gputune.modules.trace import (
    Args,
    DispatchMode,
    Kwargs,
    Operator,
    TraceError,
    memory_of,
    reason_against,
    tensors,
    written_tensors,
)
from gputune.native.library import fill_uniform
from gputune.population.batches import Batch, Batches, StepDraws


class Recorder(DispatchMode):  # type: ignore[no-untyped-call]
    """Records the writes, the reads of values and the generators of a user's operations.

    Attributes:
        has_written: Whether an operation wrote into the memory of a watched tensor, also by a view
            or ``out=``.
        has_read: Whether Python read the value of a tensor.
        has_generator: Whether an operation drew from a generator other than PyTorch's default.
    """

    # Version counters of the tensors are not enough: they do not count writes through ``.data``.

    def __init__(self, watched: Sequence[Tensor]) -> None:
        super().__init__()
        self.memories = set(map(memory_of, watched))
        self.has_written = False
        self.has_read = False
        self.has_generator = False

    def __torch_dispatch__(
        self, func: Operator, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        self.has_read |= torch.Tag.data_dependent_output in func.tags
        self.has_generator |= kwargs.get("generator") not in (None, torch.default_generator)
        if func._schema.is_mutable and not self.has_written:
            for tensor in written_tensors(func, args, kwargs):
                if tensor.layout is torch.strided and not tensor.is_nested:
                    self.has_written |= memory_of(tensor) in self.memories
        return func(*args, **kwargs)


class Stateless:
    """Wraps a module so that ``substitute`` can replace its tensors inside a ``with`` block.

    After the block, ``substitute`` restores the attributes of every submodule: parameters, buffers,
    hooks, the mode, and values that a forward pass keeps in ``self`` or in a dict, list or set
    there. Tensors that the module has written in place are not restored.
    """

    # torch.func.functional_call is not used, because it leaves the second value in a submodule with
    # two names.

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._attributes = [(vars(part), dict(vars(part))) for part in module.modules()]
        self._containers: list[tuple[Any, Any]] = []
        for _, attributes in self._attributes:
            for value in attributes.values():
                if isinstance(value, dict | list | set):
                    self._containers.append((value, value.copy()))
        names = {}
        for name, tensor in named_tensors(module).items():
            names[id(tensor)] = name
        self._places: list[tuple[dict[str, Any], str, Tensor, str]] = []
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for key, value in table.items():
                    if value is not None:
                        self._places.append((table, key, value, names[id(value)]))

    @contextmanager
    def substitute(self, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """Inside the context, replace the module's parameters and buffers by ``tensors`` of the
        same names.

        A tensor with several names is replaced under all of them.
        """
        try:
            for table, key, _, name in self._places:
                if name in tensors:
                    table[key] = tensors[name]
            yield self.module
        finally:
            for attributes, before in self._attributes:
                for name in attributes.keys() - before.keys():
                    del attributes[name]
                attributes.update(before)
            for value, items in self._containers:
                if value or items:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(items)
            for table, key, tensor, _ in self._places:  # a scripted module holds them in no dict
                table[key] = tensor

    def current(self, names: Container[str]) -> Params:
        """Return the module's current parameters and buffers that are listed in ``names``.

        Inside ``substitute``, these are the tensors that a forward pass has written.
        """
        return {name: table[key] for table, key, _, name in self._places if name in names}


def named_tensors(module: nn.Module) -> Params:
    """Return all parameters and buffers of a module, by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def not_trained(module: nn.Module) -> Params:
    """Return the tensors of a module that the optimizer does not train: buffers and frozen
    parameters."""
    frozen = {name: w for name, w in module.named_parameters() if not w.requires_grad}
    return frozen | dict(module.named_buffers())


def state_of(module: nn.Module, names: Iterable[str]) -> Params:
    """Return some attributes of a module as tensors, by name: buffers, frozen parameters or
    numbers."""
    state = {}
    for name in names:
        value = attrgetter(name)(module)
        if not isinstance(value, Tensor):
            is_whole = isinstance(value, int | np.integer | np.bool_)
            dtype = torch.int64 if is_whole else torch.float64
            value = torch.tensor(value, dtype=dtype)
        state[name] = value.detach()
    return state


def put_numbers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set a module's attributes that are numbers of Python or NumPy, such as counters, to new
    values. Tensors do not change."""
    for name, value in values.items():
        before = attrgetter(name)(module)
        if not isinstance(before, Tensor):
            path, _, key = name.rpartition(".")
            setattr(module.get_submodule(path), key, type(before)(value.item()))


def convert(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert the floating-point tensors of a module to a dtype, in place.

    Complex numbers keep their imaginary parts, which ``Module.to`` would discard.
    """

    def cast(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(dtype.to_complex())
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    module._apply(cast)  # type: ignore[no-untyped-call]
    return module


_DRAW_BYTES = 64 << 20  # bytes of draws that are made ahead

_PLAIN = set(
    "rand randn randint randperm rand_like randn_like randint_like uniform uniform_ normal_ "
    "exponential_ geometric_ cauchy_ log_normal_ random_".split()
)
"""Random operations that read only the shape of their argument, not its values."""
# Overloads of further such operations.
_PLAIN_OVERLOADS = {
    "bernoulli": "p",
    "bernoulli_": "float",
    "normal": "float_float",
    "normal_functional": "default",
}
_UNIFORM = {
    torch.ops.aten.rand.default,
    torch.ops.aten.rand.generator,
    torch.ops.aten.rand_like.default,
}
_DROPOUT = torch.ops.aten.native_dropout.default
"""Dropout in training on a GPU: (input, p, True) -> (output, mask)."""


class _Draw(NamedTuple):
    """A recorded random operation of a forward pass, which ``make`` repeats with new random
    numbers.

    ``make`` passes empty tensors in place of the recorded tensors in ``args``, because only their
    layout matters. ``purpose`` is the name of the random stream: "dropout", or "augment" for draws
    of the user's augmentation.
    """

    function: Operator
    args: Sequence[object]
    kwargs: Kwargs
    purpose: str

    def make(self) -> Tensor:
        """Run the recorded random operation again, and return its new random numbers."""
        args = [x() if isinstance(x, partial) else x for x in self.args]
        result: Tensor = self.function(*args, **self.kwargs)
        return result


class ModuleDraws:
    """Makes the random numbers of the next training steps in advance, for each minibatch size.

    A call of one member's ``forward`` in training shows the random operations of a step, and a call
    of ``augment`` the random operations of the user's augmentation, which has its own random
    stream. Raises TraceError if the random numbers depend on values other than the key (epoch and
    step) of their random stream.
    """

    def __init__(
        self,
        forward: Callable[[Batch], object],
        batches: Batches,
        seed: int,
        augment: Callable[[Batch, torch.Generator], object] | None = None,
    ) -> None:
        self.seed = seed
        self.device = batches.data.device
        self.rows: list[set[int]] = []
        self.draws: dict[int, list[_Draw]] = {}
        samples: dict[int, list[Tensor]] = {}
        for step, shape in enumerate(batches.shapes):
            self.rows.append({part.rows for part in shape.parts})
            for part, batch in zip(shape.parts, batches.at(0, step)):
                if part.rows not in samples:
                    self.draws[part.rows] = []
                    samples[part.rows] = []
                    for recorder in self._recorders(forward, augment, batch):
                        self.draws[part.rows] += recorder.draws
                        samples[part.rows] += recorder.results
        size = sum(sample.nbytes for sample in tensors(samples))
        self.ahead = max(1, min(len(self.rows), _DRAW_BYTES // max(1, size)))
        self.buffers: dict[int, list[Tensor]] = {}
        self.uniform = set[int]()
        """Minibatch sizes for which compiled C code makes the random numbers. The numbers are the
        same."""
        for rows, results in samples.items():
            self.buffers[rows] = [
                x.new_empty((self.ahead, *x.shape), device=self.device) for x in results
            ]
            if {draw.function for draw in self.draws[rows]} <= _UNIFORM and all(
                x.dtype == torch.float32 and x.is_contiguous() and x.device.type == "cpu"
                for x in results
            ):
                self.uniform.add(rows)

    @property
    def in_module(self) -> bool:
        """Whether the forward pass or the loss makes random numbers."""
        all_draws = itertools.chain(*self.draws.values())
        return any(draw.purpose == "dropout" for draw in all_draws)

    def _recorders(
        self,
        forward: Callable[[Batch], object],
        augment: Callable[[Batch, torch.Generator], object] | None,
        batch: Batch,
    ) -> "Iterator[_DrawRecorder]":
        """Run the augmentation and the forward pass once, and yield the objects that recorded their
        random numbers."""
        if augment is not None:
            # A seed that no other generator has by chance.
            number = stream_seed(self.seed, "augment", "try")
            generator = torch.Generator(self.device).manual_seed(number)
            yield _recorded(partial(augment, batch, generator), generator)
        with keyed_draws(self.device, self.seed, "try"):
            yield _recorded(partial(forward, batch))

    def add_rows(self, rows: int) -> None:
        """Allow minibatches of another size, for a module that makes no random numbers."""
        assert not any(self.draws.values())
        self.draws.setdefault(rows, [])
        self.buffers.setdefault(rows, [])

    def share(self, other: "ModuleDraws") -> None:
        """Read the random numbers of minibatches that ``other`` makes too from its memory.

        Only ``other`` then writes these numbers, which depend on the epoch, step and shapes.
        """
        if len(self.rows) != len(other.rows):
            return
        for rows in self.buffers.keys() & other.buffers.keys():
            shapes = [buffer.shape[1:] for buffer in self.buffers[rows]]
            if shapes != [buffer.shape[1:] for buffer in other.buffers[rows]]:
                continue
            self.buffers[rows] = other.buffers[rows]
            for step_rows, other_rows in zip(self.rows, other.rows):
                if rows in step_rows:
                    step_rows.remove(rows)
                    other_rows.add(rows)

    def fill(self, epoch: int, step: int) -> None:
        """Write the random numbers of a step and of the next steps into a buffer, unless they are
        already there."""
        if step % self.ahead or not any(self.draws.values()):
            return
        with keyed_draws(self.device, self.seed, "dropout", epoch, step):
            for slot, step_rows in enumerate(self.rows[step : step + self.ahead]):
                for rows in step_rows:
                    for purpose in ("augment", "dropout"):
                        self._fill_part(rows, slot, purpose, (purpose, epoch, step + slot))

    def _fill_part(self, rows: int, slot: int, purpose: str, key: Sequence[object]) -> None:
        """Write the random numbers of one step and one random stream into the buffer."""
        draws = []
        parts = []
        for draw, buffer in zip(self.draws[rows], self.buffers[rows]):
            if draw.purpose == purpose:
                draws.append(draw)
                parts.append(buffer[slot])
        if not draws:
            return
        if rows in self.uniform and fill_uniform(stream_seed(self.seed, *key), parts):
            return
        start_stream(self.device, self.seed, *key)
        for draw, part in zip(draws, parts):
            part.copy_(draw.make())

    def at(self, step: Tensor, rows: int) -> StepDraws:
        """Return the random tensors that a step needs for a minibatch of ``rows`` rows. ``step`` is
        a counter on the device."""
        slot = torch.remainder(step, self.ahead).view(1)
        drawn = tuple(buffer.index_select(0, slot)[0] for buffer in self.buffers[rows])
        augment = sum(draw.purpose == "augment" for draw in self.draws[rows])
        return StepDraws(drawn[:augment], drawn[augment:])


def draws_of(forward: Callable[[], object]) -> tuple[Tensor, ...]:
    """Run a forward pass, and return its random tensors in the order in which the pass made them.

    Raises TraceError under the same conditions as ``ModuleDraws``.
    """
    return tuple(_recorded(forward).results)


def _recorded(
    call: Callable[[], object], generator: torch.Generator | None = None
) -> "_DrawRecorder":
    """Run a function once, and return the object that recorded its random numbers. ``generator`` is
    the only random generator that the function may use, or None for torch's own."""
    with torch.no_grad(), (recorder := _DrawRecorder(generator)):
        call()
    return recorder


class _DrawRecorder(DispatchMode):  # type: ignore[no-untyped-call]
    """Inside the context, records every random tensor and the operation that made the tensor.

    With a ``generator``, the context is a call of the user's augmentation. It then also raises
    TraceError for operations that a recorded step cannot repeat.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.draws: list[_Draw] = []
        self.results: list[Tensor] = []
        self.generator = generator

    def __torch_dispatch__(
        self, func: Operator, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is _DROPOUT:
            # a GPU draws and applies dropout in one operation; here it becomes a draw and a product
            with self:
                return _dropout(args[0], torch.bernoulli(args[0], 1 - args[1]), args[1])
        if torch.Tag.nondeterministic_seeded not in func.tags:
            if self.generator is not None and (reason := reason_against(func, args)):
                raise TraceError(f"{func} {reason}")
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        plain = name in _PLAIN or _PLAIN_OVERLOADS.get(name) == func._overloadname
        # a generator of the user's own must not be replaced
        if not plain or not _is_same(kwargs.get("generator"), self.generator):
            raise TraceError(
                f"{func} makes random numbers that depend on more than the epoch and the step"
            )
        layouts = [_empty_like(x) if isinstance(x, Tensor) else x for x in args]
        # A generator of the same seed makes the same numbers as torch's own.
        purpose = "dropout"
        repeated = kwargs
        if self.generator is not None:
            purpose = "augment"
            repeated = {**kwargs, "generator": None}
        self.draws.append(_Draw(func, layouts, repeated, purpose))
        result = func(*args, **kwargs)
        self.results.append(result.clone())  # a copy, because the module may write into the result
        return result


def _is_same(given: torch.Generator | None, allowed: torch.Generator | None) -> bool:
    """Return whether two objects are the same random generator: torch wraps the generator of an
    operation in a new object, so the states are compared."""
    if given is None or allowed is None:
        return given is allowed
    return torch.equal(given.get_state(), allowed.get_state())


def _dropout(x: Tensor, mask: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Apply a dropout mask to rows in training. Return the scaled rows, and the mask as
    booleans."""
    return x * mask * (1 / (1 - p)), mask.bool()


def _empty_like(x: Tensor) -> partial[Tensor]:
    """Return a function that makes an empty tensor with the layout of ``x``."""
    return partial(torch.empty_strided, tuple(x.shape), x.stride(), dtype=x.dtype, device=x.device)


def replay_draws(
    draws: Sequence[Tensor], *, repeated: bool = False
) -> AbstractContextManager[object]:
    """Inside the context, random operations return the tensors ``draws``, one after the other. With
    ``repeated``, copies of the first tensors follow after the last."""
    if not draws:
        return nullcontext()  # a mode slows down every call
    # Copies, because the operations after a draw may write into it.
    endless = (draw.clone() for draw in itertools.cycle(draws))
    return _DrawReplayer(endless if repeated else draws)


class _DrawReplayer(DispatchMode):  # type: ignore[no-untyped-call]
    """Replaces the result of each random operation by a tensor that was made in advance."""

    def __init__(self, draws: Iterable[Tensor]) -> None:
        super().__init__()
        self.draws = iter(draws)

    def __torch_dispatch__(
        self, func: Operator, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        drawn = next(self.draws)
        if func is _DROPOUT:
            return _dropout(args[0], drawn.reshape(args[0].shape), args[1])
        # a substitute operation may have the same numbers in other axes
        if args and isinstance(args[0], Tensor):
            drawn = drawn.reshape(args[0].shape)
        return args[0].copy_(drawn) if func._schema.is_mutable else drawn
