"""Training that calls the user's module once per step, on the rows of all members.

A member is one trial on one fold. In shapes, P counts members, B rows of a minibatch and N rows of
all members, P * B.

This way to train is for modules that torch.func.vmap refuses, such as modules with an
``autograd.Function`` without a batching rule. Only the layers that own trained parameters know of
members: vmap maps each of these layers over the members and their rows. All other code of the
module runs on plain tensors. The rows of different members must not affect each other, which the
inspection checks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gputune.ground.errors import InputError, option
from gputune.ground.types import Params
from gputune.modules.construction import name_of
from gputune.modules.failures import StackedError
from gputune.modules.findings import is_alone_in_training
from gputune.modules.mapped import Mapped
from gputune.modules.module import StackedModule, WithBuffers
from gputune.modules.module_trial import ModuleTrial
from gputune.modules.pretrained import member_buffers
from gputune.modules.rounded import Rounded
from gputune.modules.substitutes import Substitutes
from gputune.population.outputs import in_mode
from gputune.population.traits import Traits

Pattern = tuple[bool, ...]
"""Whether each tensor that a layer receives has the rows of the members as its first axis."""

Slot = tuple[dict[str, Any], str]
"""The place of a tensor in a module: a table of parameters or buffers, and a name there."""


class MergedModule(StackedModule):
    """Members with stacked parameters. The module gets the rows of all members as one batch.

    ``patterns`` has the ``Pattern`` of each layer with trained parameters, by the layer's path. The
    first call of a layer defines it, unless the traits have it. ``StackedModule`` documents the
    methods.
    """

    def _lay_out(self) -> None:
        super()._lay_out()
        self.patterns: dict[str, Pattern] = dict(self.traits.merges)
        self._n_members = 0  # of the running call; 0: the module is called as a plain module
        self._n_rows = 0
        stacked = self.trainable.keys() | self.mutable.keys()
        for path, layer in owners_of(self.template):
            slots = list[Slot]()
            for name, part in layer.named_modules(prefix=path):
                for table in (part._parameters, part._buffers):
                    slots += [(table, key) for key in table if _joined(name, key) in stacked]
            layer.forward = partial(self._of_members, path, layer.forward, slots)

    def _of_members(
        self,
        path: str,
        forward: Callable[..., object],
        slots: Sequence[Slot],
        *args: object,
        **kwargs: object,
    ) -> object:
        """Call a layer with trained parameters for all members, each on its part of the rows."""
        if not self._n_members:
            return forward(*args, **kwargs)
        values, structure = tree_flatten((args, kwargs))
        places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        found = tuple(self._has_rows(values[i]) for i in places)
        pattern = self.patterns.setdefault(path, found)
        fits = len(pattern) == len(found) and all(
            not has_rows or is_divisible for has_rows, is_divisible in zip(pattern, found)
        )
        if not fits or not any(pattern):
            raise StackedError(
                None,
                f"{name_of(self.builder)} calls its layer {path!r} with tensors whose first axis "
                "is not the rows",
                remedy=f"Choose {option('backend', 'loop')}.",
            )
        of_rows = [i for i, has_rows in zip(places, pattern) if has_rows]
        # (N, ...) -> (P, B, ...)
        rows = [values[i].unflatten(0, (self._n_members, -1)) for i in of_rows]
        stacked = [table[key] for table, key in slots]

        results: list[object] = []
        layout: list[TreeSpec] = []

        def call(tensors: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
            arguments = list(values)
            for i, part in zip(of_rows, parts):
                arguments[i] = part
            positional, named = tree_unflatten(arguments, structure)
            _put(slots, tensors)
            try:
                results[:], spec = tree_flatten(forward(*positional, **named))
            finally:
                _put(slots, stacked)
            layout.append(spec)
            return [x for x in results if isinstance(x, Tensor)]

        with Mapped(), Substitutes():
            outputs = iter(vmap(call)(stacked, rows))
        # Attention returns None next to its outputs, which vmap would refuse.
        for i, result in enumerate(results):
            if isinstance(result, Tensor):
                results[i] = next(outputs).flatten(0, 1)  # (P, B, ...) -> (N, ...)
        return tree_unflatten(results, layout[0])

    def _has_rows(self, x: Tensor) -> bool:
        """Return whether the first axis of a tensor may be the rows of all members."""
        return x.dim() > 0 and len(x) > 0 and len(x) % self._n_rows == 0

    def _map(
        self,
        function: Callable[..., Tensor],
        members: Params,
        tensors: Sequence[Tensor],
        training: bool,
    ) -> WithBuffers:
        members = dict(members)
        for name, start in self.mutable.items():
            members[name] = members[name].to(start.dtype)
        rounded = training and self.shape.precision == "bf16"
        rows = [x.flatten(0, 1) for x in tensors]  # (P, B, ...) -> (N, ...)
        self._n_members = len(tensors[0])
        self._n_rows = len(rows[0])
        try:
            with (
                self.stateless.substitute({**members, **self.frozen}) as module,
                Rounded() if rounded else nullcontext(),
            ):
                results = function(in_mode(module, training=training), rows)
                after = self.stateless.current(self.mutable)
                of_members = results.view(self._n_members, -1, *results.shape[1:])
                return of_members, after
        finally:
            self._n_members = 0

    def _refuse(self, *_: object) -> NoReturn:
        """Raise InputError, because the called method needs members that vmap maps."""
        raise InputError(
            None,
            f"The members of {name_of(self.builder)} train on merged rows, because "
            f"{self.traits.unstackable}. Hypergradients need stacked members",
            remedy=f"Choose another {option('method')}.",
        )

    differentiable = _refuse  # type: ignore[assignment]
    with_statistics = _refuse  # type: ignore[assignment]
    differentiate_statistics = _refuse


def owners_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the paths and the modules that own trained parameters, without modules inside of such
    modules."""
    owners: list[str] = []
    for path, part in module.named_modules():
        if any(path.startswith(f"{owner}.") or not owner for owner in owners):
            continue
        if any(w is not None and w.requires_grad for w in part._parameters.values()):
            owners.append(path)
            yield path, part


def why_not_merged(trial: ModuleTrial, traits: Traits) -> str:
    """Return the property of a module that excludes merged rows, or "".

    Random numbers, decisions and changing buffers belong to a member. A batch has only one of each.
    """
    others = set(traits.changing) - set(member_buffers(trial.module))
    if traits.draws or traits.evaluation_draws:
        return "it draws random numbers"
    if traits.branches:
        return "it branches on a tensor's value, which may differ between members"
    if others:
        return f"its forward pass changes {min(others)!r}"
    if not trial.objective.is_named:
        return "only losses with a name are computed on merged rows"
    if name := _replaced_parameter(trial):
        return f"its forward pass assigns to the data of its parameter {name!r}"
    if not traits.alone or not is_alone_in_training(trial):
        return "a row may affect the outputs of other rows"
    for path, part in owners_of(trial.module):
        if not path:
            return "the module itself owns a trained parameter, not one of its layers"
        if isinstance(part, torch.jit.ScriptModule):
            return f"its layer {path!r} is a scripted module"
    return ""


def _replaced_parameter(trial: ModuleTrial) -> str:
    """Find a parameter that has other memory after a training call, and return its name or "".

    The assignment ``w.data = ...`` replaces the memory. It reaches the plain module, but not the
    members.
    """
    before = {name: w.data_ptr() for name, w in trial.module.named_parameters()}
    trial.forward(trial.inputs, training=True)
    for name, w in trial.module.named_parameters():
        if w.data_ptr() != before.get(name):
            return name
    return ""


def _joined(path: str, name: str) -> str:
    """Return the name of a tensor in the whole module."""
    return f"{path}.{name}" if path else name


def _put(slots: Sequence[Slot], tensors: Sequence[Tensor]) -> None:
    """Put tensors into their places in a module."""
    for (table, key), tensor in zip(slots, tensors):
        table[key] = tensor
