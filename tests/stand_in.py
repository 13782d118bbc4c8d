"""A stand-in for CUDA graphs on a CPU: it records a step, replays it, and refuses operations that a
graph refuses.

It is a check, not a fast way to train. As a graph does, it records operations and not the code that
asks for them: a number that the host computed is the same in every replay, and tensors are known by
their memory, which it does not keep alive. What it cannot see is a tensor on the wrong device, for
here there is one.
"""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gputune.modules.trace import DispatchMode

_HOST = (Tensor.numpy, Tensor.__array__, Tensor.tolist)  # read by the host without an operation
_RULES = (
    (torch.Tag.data_dependent_output, "it waits for the device; compute with tensors"),
    (
        torch.Tag.dynamic_output_shape,
        "the shape of its result depends on numbers; use index_select",
    ),
    (torch.Tag.nondeterministic_seeded, "it draws random numbers; draw them before the step"),
)


class CaptureError(RuntimeError):
    """A step used an operation that a CUDA graph refuses."""


class StandIn:
    """Records steps on a CPU."""

    before = 3
    repays = 3
    spare = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def warm_up(self, step: Callable[[], None]) -> None:
        """Take a step without recording."""
        step()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record a step; all that it wrote is then as it was before. Raises CaptureError."""
        recording = Recording(self.device)
        with recording.undone(), NoReading(), recording:
            step()
        return recording.close().replay


@dataclass(frozen=True)
class _Place:
    """A tensor by its memory, which someone else keeps."""

    storage: "weakref.ref[torch.UntypedStorage]" = field(compare=False)
    pointer: int
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "_Place":
        storage = tensor.untyped_storage()
        offset = int(tensor.storage_offset())
        memory = weakref.ref(storage), storage.data_ptr()
        return _Place(*memory, tensor.dtype, offset, tensor.shape, tensor.stride())

    def tensor(self) -> Tensor:
        storage = self.storage()
        if storage is None or storage.data_ptr() != self.pointer:
            raise CaptureError(
                f"the memory of a {tuple(self.shape)} tensor that a recorded step uses is gone: "
                "keep its tensors, write into them in place, and record the step again where "
                "they are replaced."
            )
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


@dataclass(frozen=True)
class _Slot:
    """The number of a step's tensor, in the recorded arguments of an operation."""

    number: int


@dataclass(frozen=True)
class Operation:
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: tuple[int, ...]  # the slots of its results, in their order


@dataclass(frozen=True)
class Tape:
    """The operations of a step on ``slots`` tensors; ``places`` has the tensors from before the
    step.
    """

    slots: int
    places: tuple[tuple[int, _Place], ...]
    operations: tuple[Operation, ...]

    @torch.no_grad()
    def replay(self) -> None:
        """Take the step again. Raises CaptureError where its memory is no longer there."""
        found = [torch.empty(0)] * self.slots
        for slot, place in self.places:
            found[slot] = place.tensor()
        for operation in self.operations:
            result = operation.function(
                *(_filled(value, found) for value in operation.args),
                **{name: _filled(value, found) for name, value in operation.kwargs.items()},
            )
            for slot, tensor in zip(operation.made, _tensors(result)):
                found[slot] = tensor


class NoReading(TorchFunctionMode):
    """Refuses reads of a tensor by the host, which no operation would show."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HOST:
            raise _refusal(
                f"Tensor.{func.__name__}", "it waits for the device; compute with tensors"
            )
        return func(*args, **(kwargs or {}))


class Recording(DispatchMode):
    """Runs operations and notes them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.operations: list[Operation] = []
        self.slots = 0
        self.places: dict[_Place, int] = {}  # what was there before the step -> its slot
        self.made: dict[int, int] = {}  # id of a tensor that the step made -> its slot
        self.kept: list[Tensor] = []  # those tensors, so that no id is given twice
        self.fresh: dict[int, str] = {}  # memory that the step took -> the operation that took it
        # memory that was there, its bytes
        self.written: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        self._check(func, inputs, kwargs)
        for tensor in self._written_by(func, args, kwargs):
            self._remember(tensor)
        before = [(_key(tensor), tensor.shape, tensor.data_ptr()) for tensor in inputs]
        result = func(*args, **kwargs)
        if before != [(_key(tensor), tensor.shape, tensor.data_ptr()) for tensor in inputs]:
            raise _refusal(func, "it moves or resizes a tensor; give it one of the right shape")
        known = {key for key, *_ in before}
        results = list(_tensors(result))
        self.fresh.update(
            (_key(tensor), str(func)) for tensor in results if _key(tensor) not in known
        )
        if not func.is_view or any(_key(tensor) in self.fresh for tensor in results):
            encoded = (
                tuple(map(self._encode, args)),
                {key: self._encode(v) for key, v in kwargs.items()},
            )
            self.operations.append(Operation(func, *encoded, tuple(map(self._slot, results))))
        return result

    def _check(self, func: Any, inputs: Sequence[Tensor], kwargs: dict[str, Any]) -> None:
        for tag, reason in _RULES:
            if tag in func.tags and not (
                func is torch.ops.aten.index.Tensor and not _has_mask(inputs)
            ):
                raise _refusal(func, reason)
        if func is torch.ops.aten.lift_fresh.default:
            raise _refusal(func, "it takes numbers of the host; make the tensor before the step")
        # by a kernel of the device
        made_here = kwargs.get("device") not in (None, torch.device("cpu"))
        if not inputs and func is not torch.ops.aten.empty.memory_format and not made_here:
            raise _refusal(func, "it makes a tensor out of nothing; make it before the step")
        devices = {tensor.device for tensor in inputs} | {kwargs.get("device") or self.device}
        if devices != {self.device}:
            raise _refusal(func, f"it is not on {self.device} alone; keep all tensors there")

    def _written_by(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Iterator[Tensor]:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _tensors(args[i] if i < len(args) else kwargs.get(argument.name))

    def _remember(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key not in self.fresh and key not in self.written:
            storage = tensor.untyped_storage()
            self.written[key] = (storage, _bytes(storage).clone())

    def _slot(self, tensor: Tensor) -> int:
        """The number of a tensor; a tensor from before the step has one number for each of its
        views.
        """
        if _key(tensor) not in self.fresh:
            place = _Place.of(tensor)
            if place not in self.places:
                self.places[place] = self._next()
            return self.places[place]
        if id(tensor) not in self.made:
            self.made[id(tensor)] = self._next()
            self.kept.append(tensor)
        return self.made[id(tensor)]

    def _next(self) -> int:
        self.slots += 1
        return self.slots - 1

    def _encode(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return _Slot(self._slot(value))
        return [self._encode(part) for part in value] if isinstance(value, list | tuple) else value

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Restore the numbers of the memory from before the step, because a recording has no
        effects.
        """
        try:
            yield
        finally:
            for storage, held in self.written.values():
                _bytes(storage)[: len(held)].copy_(held)

    def close(self) -> Tape:
        """Return the tape, where nothing that the step made is still there."""
        made = [
            (weakref.ref(tensor.untyped_storage()), self.fresh[_key(tensor)])
            for tensor in self.kept
        ]
        self.kept.clear()
        if any(storage() is not None for storage, _ in made):
            gc.collect()  # what only garbage holds does not outlive the step
        for storage, function in made:
            if storage() is not None:
                raise _refusal(
                    function, "its result outlives the step; write it into a tensor made before"
                )
        places = tuple((slot, place) for place, slot in self.places.items())
        return Tape(self.slots, places, tuple(self.operations))


def _refusal(function: Any, reason: str) -> CaptureError:
    return CaptureError(f"{function} in a recorded step: {reason}.")


def _has_mask(inputs: Sequence[Tensor]) -> bool:
    return any(tensor.dtype == torch.bool for tensor in inputs[1:])


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _filled(value: Any, found: list[Tensor]) -> Any:
    """An argument with tensors in place of their slots."""
    if isinstance(value, _Slot):
        return found[value.number]
    return [_filled(part, found) for part in value] if isinstance(value, list) else value
