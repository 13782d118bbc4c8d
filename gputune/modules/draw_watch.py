"""Watches a user's module in trial calls on a few rows: its random numbers, hooks and submodules."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gputune.ground.device import CPU
from gputune.ground.seeding import keyed_draws
from gputune.modules.host_draws import drawing_code
from gputune.modules.host_generators import changed_generator, generator_states
from gputune.modules.substitutes import counting_on_device
from gputune.modules.trace import Args, DispatchMode, Function, Kwargs, Operator


class DrawWatch:
    """Watches how a module makes random numbers while gputune tries the module on a few rows, and
    whether the module branches on values.

    Attributes:
        draws: Whether a call in training drew from PyTorch's default generator.
        branches: Whether a call in training read a tensor's value into Python. The module may
            branch on this value.
        draws_in_evaluation: Whether a call in evaluation mode drew from PyTorch's default
            generator.
        hooks: Whether a call in training registered a hook on the gradient of a tensor.
        generator: The name of another generator that a call drew from; "" if there was none.
    """

    def __init__(self, module: nn.Module, loss: object, step: object, augment: object) -> None:
        self._module = module
        self._step = step
        # functions of the user that run in a step in addition to the forward pass
        self._functions = (loss, step, augment)
        self.draws = False
        self.branches = False
        self.draws_in_evaluation = False
        self.hooks = False
        self.generator = ""
        # generators passed to operations, in all calls so far
        self._passed: list[torch.Generator] = []

    def outside(self) -> str:
        """Return the reason why gputune cannot make the module's random numbers for all members.

        The reason is "" if gputune can make them.
        """
        code = drawing_code(self._module, self._functions, self._step)
        if not code and not self.generator:
            return ""
        where = code or f"it draws from {self.generator}"
        return f"{where}, and a stacked or recorded step would repeat the first random number"

    @contextmanager
    def watching(self, *, training: bool) -> Iterator[None]:
        """Inside the context, note the random generators that the module uses, and whether Python
        reads a tensor's value."""
        with keyed_draws(CPU, 0, "check", host=True):
            default = torch.get_rng_state()
            others = generator_states(self._module, self._functions)
            with (
                counting_on_device(self._module),
                (recorder := _OperationWatch()),
                (hooks := _HookWatch()),
            ):
                yield
            drew = not torch.equal(default, torch.get_rng_state())
            changed = changed_generator(others, generator_states(self._module, self._functions))
        for generator in recorder.generators:
            # the same generator in a second call: it keeps its state between calls
            if any(generator is other for other in self._passed):
                changed = changed or "a torch.Generator of its own"
        self._passed += recorder.generators
        self.generator = self.generator or changed
        self.draws |= drew and training
        self.branches |= training and recorder.reads
        self.hooks |= training and hooks.has_hook
        self.draws_in_evaluation |= drew and not training


class _OperationWatch(DispatchMode):  # type: ignore[no-untyped-call]
    """Notes the random generators that operations use, and whether Python reads a tensor's
    value."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = False
        self.generators: list[torch.Generator] = []

    def __torch_dispatch__(
        self, func: Operator, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        self.reads |= torch.Tag.data_dependent_output in func.tags
        generator = kwargs.get("generator")
        if generator is not None and generator is not torch.default_generator:
            self.generators.append(generator)
        return func(*args, **kwargs)


class _HookWatch(TorchFunctionMode):
    """Notes whether code registers a hook on the gradient of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.has_hook = False

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        self.has_hook |= func is Tensor.register_hook
        return func(*args, **(kwargs or {}))


class Trail:
    """Remembers the running submodule, for error messages, and the size of the largest result.

    In a module with frozen parameters, only results that depend on trained tensors count. All
    members share the others.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.open: list[str] = []
        self.largest = 0
        # numbers in the weights of the called layers, and of those before the first trained layer
        self._weights = 0
        self._shared_weights = 0
        self._is_shared = True
        self.convolves = False
        """Whether a convolution was called behind the first trained layer, or is such a layer."""
        self._has_frozen = not all(w.requires_grad for w in module.parameters())

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the calls of the module inside the ``with`` block.

        The hooks are removed afterwards, because a part of the module may also belong to the user,
        such as an activation that the user passes to the builder.
        """
        self.open.clear()
        handles = []
        for name, part in self.module.named_modules():
            if isinstance(part, torch.jit.ScriptModule):  # a scripted module takes no hooks
                continue
            handles.append(part.register_forward_pre_hook(partial(self._enter, name)))
            handles.append(part.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, _args: object) -> None:
        """Forward hook: note the begin of a submodule's call."""
        self.open.append(name)
        if not name:
            self._weights = 0
            self._shared_weights = 0
            self._is_shared = True
        if any(w.requires_grad for w in module.parameters(recurse=False)):
            self._is_shared = False

    def _leave(self, module: nn.Module, _args: object, result: object) -> None:
        """Forward hook: note the end of a submodule's call and the size of its ``result``."""
        self.open.pop()
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):  # which has no product
            weights = [w for w in module.parameters(recurse=False) if w.dim() > 1]
            numbers = sum(w.numel() for w in weights)
            self._weights += numbers
            self._shared_weights += numbers if self._is_shared else 0
            self.convolves |= not self._is_shared and any(w.dim() > 2 for w in weights)
        if isinstance(result, Tensor) and (result.requires_grad or not self._has_frozen):
            self.largest = max(self.largest, result.numel())

    @property
    def shared(self) -> float:
        """The share of weights in frozen layers before the first trained layer, in the last call.

        Embeddings do not count.
        """
        return self._shared_weights / max(1, self._weights)

    @property
    def submodule(self) -> str:
        """The submodule that was running, as text for messages, such as submodule 'layers.0'. It is
        "" for the module itself."""
        name = next((name for name in reversed(self.open) if name), "")
        return f"submodule {name!r}" if name else ""
