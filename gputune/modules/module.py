"""Trains many members of any nn.Module at once, with stacked parameters.

A member is one trial on one fold. In shapes, P counts members, F folds, C configurations (trials),
B rows of a minibatch and K outputs. Draws are random numbers, for example of dropout.

The parameters and changing buffers of all members are stacked, and torch.func maps the module's
forward pass over them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vmap

from gputune.ground.errors import InputError
from gputune.ground.seeding import keyed_draws
from gputune.ground.types import EvaluationKey, Params, StepKey
from gputune.models import Dropout
from gputune.modules.calls import ModuleDraws, Recorder, Stateless, draws_of, replay_draws
from gputune.modules.construction import name_of
from gputune.modules.failures import uneven_use
from gputune.modules.mapped import Mapped
from gputune.modules.network import ModuleNetwork
from gputune.modules.rounded import Rounded
from gputune.modules.substitutes import Substitutes, differentiate_statistics, make_mappable
from gputune.modules.trace import TraceError, clones
from gputune.population.batches import Batch, Batches, StepDraws, for_members
from gputune.population.outputs import in_mode, with_columns

_REFUSED_WRITE = "written-to tensor"
"""Part of PyTorch's error for a write into rows that several members share."""

Result = TypeVar("Result")

WithBuffers: TypeAlias = tuple[Tensor, Params]
"""The results of all members, and the members' buffers (P, ...) after the call."""

DrawsOfCall: TypeAlias = Callable[[int], AbstractContextManager[object]]
"""Makes a context with the random numbers of one call of the members of a fold.

The argument is the place of the fold among the folds of the step. A call for all folds has place
0."""


class StackedModule(ModuleNetwork):
    """Members with stacked parameters. vmap maps one forward pass over all members.

    ``population.Network`` or the base class documents the methods without docstrings.
    """

    checks_use = True
    """Whether a step that uses other parameters than the tried steps raises StackedError."""

    def _lay_out(self) -> None:
        # This changes the template too, before ``stateless`` keeps the module's state.
        make_mappable(self.template)
        # calls that left their rows unchanged, by the shapes of these rows
        self.harmless_calls = set[tuple[object, ...]]()
        # Parameters that the tried steps did not use. Their gradients show if another step does.
        self._idle = self.traits.unused
        for name in self._idle:
            self.frozen[name].requires_grad_()
        super()._lay_out()

    def draws(self, batches: Batches, *, ahead: bool) -> ModuleDraws | None:
        """Return the object that makes the random numbers of the next steps in advance.

        It makes none if only dropout is random, at rate 0. The result is None unless ``ahead`` is
        True. Raises TraceError if a step cannot read its random numbers from tensors, or for a
        module that branches on values.
        """
        if not ahead:
            return None  # the step draws for itself, by the key of the minibatch
        # A failed recording on a GPU would end all recordings of the process.
        if self.traits.branches and (self.traits.draws or self.shape.device.type == "cuda"):
            raise TraceError(
                "its forward pass may branch on a tensor's value, so that each step may differ"
            )
        drops = any(config["dropout"] for config in self.configs)
        for is_off in (False,) if drops else (True, False):
            for part in self.template.modules():
                if isinstance(part, Dropout):
                    part.is_off = is_off
            self.stateless = Stateless(self.template)
            draws = ModuleDraws(
                self.plain_losses,
                batches,
                self.seed,
                augment=self._augmented_rows if self.objective.augment else None,
            )
            # If something else draws, dropout draws too, so that the order of draws stays the same.
            if not draws.in_module:
                break
        return draws

    def _plain_values(self) -> Params:
        """Return the initial tensors for one call of a plain module, which may write into them."""
        # Clones, because draws depend on a tensor's layout in memory, and a member's part of a
        # stacked tensor has another layout.
        mutable = {name: w.clone() for name, w in self.mutable.items()}
        return self.trainable | mutable | self.frozen

    def plain_losses(self, batch: Batch, place: int = 0) -> object:
        """Compute the losses of one member as a plain module, to record its random numbers.

        ``place`` is the place of the member's fold among the folds of the minibatch.
        """
        # Copies, because the members read these rows next.
        inputs = [x[place].clone() for x in batch.inputs]
        y = batch.y[place].clone()
        names = self.shape.names
        # Substitutes as in the mapped call: a fused attention would count as an operation that
        # draws.
        with self.stateless.substitute(self._plain_values()) as module, Substitutes():
            return self.objective.losses(
                in_mode(module, training=True), inputs, y, self.configs[0], names=names
            )

    def _augmented_rows(self, batch: Batch, generator: torch.Generator) -> object:
        """Apply the user's augmentation to the rows of one fold, to record its random numbers."""
        rows = [x[0].clone() for x in batch.inputs]
        return self.objective.augmented_rows(rows, self.shape.names, generator)

    def gradient(self, params: Params, batch: Batch, grads: Params) -> None:
        # (F, C, ...) -> (P, ...). ``batch.folds`` is a slice, so these tensors are views. A copy
        # into them writes into ``params``.
        members = {name: w[batch.folds].flatten(0, 1) for name, w in params.items()}
        made = batch.draws.augment if isinstance(batch.draws, StepDraws) else ()
        with replay_draws(made, repeated=True):
            inputs = self.objective.augmented(batch.inputs, self.shape.names, self.seed, batch.key)
        if self.traits.branches:  # the rows that the module receives decide what it draws
            batch = replace(batch, inputs=tuple(inputs))
        with torch.enable_grad():
            draws = self._draws(batch)
        # One group after another, so that only the activations of one group are in memory.
        batch = replace(batch, inputs=tuple(inputs))
        parts = batch.by_fold() if self.traits.common_rows else [batch]
        for place, (group, part) in enumerate(zip(self._groups(members), parts, strict=True)):
            self._group_gradient(group, part, draws, place, grads)

    def _group_gradient(
        self,
        group: Params,
        batch: Batch,
        draws: DrawsOfCall,
        place: int,
        grads: Params,
    ) -> None:
        """Write the gradients of a group of members (``_groups``) into ``grads``, and their
        buffers after the minibatch into ``group``. ``place`` is the place of its fold."""
        leaves = {name: group[name].detach().requires_grad_() for name in self.trainable}

        def losses() -> WithBuffers:
            tensors = dict(leaves)
            for name, start in self.mutable.items():
                # Copies, because the members' own tensors share a counter of writes with the
                # leaves, and autograd requires unwritten leaves.
                tensors[name] = group[name].to(start.dtype, copy=True)
            return self._losses(tensors, batch, draws, place)

        with torch.enable_grad():
            loss, after = self._with_copies_if_refused(losses)
            # A user's own mean loss has no rows to weight. It was refused if there are weights.
            if loss.dim() == 3:
                share = batch.share  # a float, or one weight per row: (F, 1 or C, B, 1)
                loss = loss * (share.squeeze(-1) if isinstance(share, Tensor) else share)
            idle = [self.frozen[name] for name in self._idle]
            gradients = torch.autograd.grad(
                loss.sum(), [*leaves.values(), *idle], allow_unused=True
            )
        if self.checks_use:
            self._check_use(gradients)
        for name, gradient in zip(leaves, gradients):
            part = grads[name][batch.folds]  # a view
            # A parameter without influence on the output gets the gradient 0.
            part.zero_() if gradient is None else part.copy_(gradient.view(part.shape))
        for name, buffer in after.items():
            group[name].copy_(buffer.detach())

    def _groups(self, members: Params) -> list[Params]:
        """Split the tensors of the members (P, ...) by the calls of the module that they share.

        The members of a fold share a call if they share its rows: then there is a group (C, ...)
        for each fold. Otherwise there is only one group.
        """
        if not self.traits.common_rows:
            return [members]
        trials = len(self.configs)
        parts: dict[str, tuple[Tensor, ...]] = {}
        for name, w in members.items():
            parts[name] = w.view(-1, trials, *w.shape[1:]).unbind()
        folds = len(next(iter(parts.values())))
        return [{name: part[fold] for name, part in parts.items()} for fold in range(folds)]

    def _check_use(self, gradients: Sequence[Tensor | None]) -> None:
        """Raise StackedError if a step uses other parameters than the tried steps did.

        ``gradients`` are the gradients of the trained parameters of a group of members, and of the
        parameters that the tried steps did not use. A plain loop leaves a parameter unchanged in a
        step that does not use it, but stacked members would apply momentum and weight decay.
        """
        names = [*self.trainable, *self._idle]
        for place, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
            is_used = gradient is not None
            if is_used == (place < len(self.trainable)):
                continue
            raise uneven_use(name_of(self.builder), name)

    def _draws(self, batch: Batch) -> DrawsOfCall:
        """Return a context in which random operations use the minibatch's random numbers.

        These were made in advance, or come from the minibatch's random stream.
        """
        if isinstance(batch.draws, StepDraws):
            return partial(self._replay, batch.draws.module)
        if not self.traits.draws:
            return nullcontext
        if self.traits.branches and self.traits.common_rows:
            # The rows of a fold decide which random numbers its members draw.
            return partial(self._draws_of_fold, batch)
        return self._draws_of(partial(self.plain_losses, batch), "dropout", *batch.key)

    def _draws_of_fold(self, batch: Batch, place: int) -> AbstractContextManager[object]:
        """Inside the context, random operations return the numbers that a plain member of one fold
        draws in this minibatch."""
        forward = partial(self.plain_losses, batch, place)
        return self._draws_of(forward, "dropout", *batch.key)(place)

    def _replay(self, draws: Sequence[Tensor], _place: int) -> AbstractContextManager[object]:
        """Inside the context, random operations return the tensors ``draws``."""
        # The operations after a draw may write into it, and every fold reads the same draws.
        return replay_draws(clones(draws) if self.traits.common_rows else draws)

    def _draws_of(self, forward: Callable[[], object], *key: object) -> DrawsOfCall:
        """Return a context in which all members use the random numbers that one plain member makes
        in ``forward``. They come from the random stream of ``key``."""

        def keyed(_place: int) -> AbstractContextManager[object]:
            return keyed_draws(self.shape.device, self.seed, *key)

        try:
            with keyed(0):
                return partial(self._replay, draws_of(forward))
        except TraceError:
            return keyed

    def _losses(self, group: Params, batch: Batch, draws: DrawsOfCall, place: int) -> WithBuffers:
        """Return the loss of each row of a group's minibatch, (F, C, B), and the buffers after it.

        A user's own loss may return means (F, C) instead.
        """
        trials = len(self.configs)
        if not self.objective.is_named:

            def member_losses(module: nn.Module, parts: Sequence[Tensor]) -> Tensor:
                *rows, y = parts
                config = self.configs[0]
                return self.objective.losses(module, rows, y, config, names=self.shape.names)

            tensors = [*batch.inputs, batch.y]
            losses, after = self._on_folds(
                member_losses, [group], tensors, training=True, draws=draws, place=place
            )
            return losses.view(-1, trials, *losses.shape[1:]), after
        outputs, after = self._on_folds(
            self._member_outputs, [group], batch.inputs, training=True, draws=draws, place=place
        )
        outputs = with_columns(outputs).to(self.shape.dtype)
        outputs = outputs.view(-1, trials, *outputs.shape[1:])  # (F, C, B, K)
        if self.shape.present is not None:
            outputs = outputs.masked_fill(~self.shape.present[batch.folds, None, None], -torch.inf)
        return self.row_losses(outputs, batch.y[:, None]), after

    def outputs(
        self, params: Params, fold: int, inputs: Sequence[Tensor], key: EvaluationKey | None = None
    ) -> Tensor:
        members = {name: w[fold] for name, w in params.items()}
        rows = [x[None] for x in inputs]  # one fold

        def outputs() -> Tensor:
            draws: DrawsOfCall = nullcontext
            if self.evaluation_draws and key is not None:
                draws = self._draws_of(partial(self._plain_outputs, inputs), "evaluation", *key)
            groups = self._groups(members)
            return self._on_folds(self._member_outputs, groups, rows, training=False, draws=draws)[
                0
            ]

        return self._with_copies_if_refused(outputs)

    def _plain_outputs(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs of one member as a plain module in evaluation mode, to record its
        random numbers."""
        copies = clones(inputs)  # the members read these rows next
        with self.stateless.substitute(self._plain_values()) as module, Substitutes():
            return self.objective.outputs(in_mode(module, training=False), copies, self.shape.names)

    def differentiable(
        self, params: Params, inputs: Sequence[Tensor], key: StepKey | None
    ) -> Tensor:
        return with_columns(self.with_statistics(params, inputs, key)[0])

    def with_statistics(
        self, params: Params, inputs: Sequence[Tensor], key: StepKey | None
    ) -> WithBuffers:
        """Return the members' outputs like ``differentiable``, and the members' buffers (P, ...)
        afterwards."""

        # ``inputs`` repeat the rows of a fold for each of its members.
        rows = [x[:: len(self.configs)] for x in inputs]

        def outputs() -> WithBuffers:
            stream: tuple[object, ...] | None = None
            if key is not None:
                stream = "dropout", *key
            # the same draws in all evaluations, because a derivative compares them
            elif self.evaluation_draws:
                stream = ("evaluation",)

            def draws(_place: int) -> AbstractContextManager[object]:
                if stream is None:
                    return nullcontext()
                return keyed_draws(self.shape.device, self.seed, *stream)

            return self._on_folds(
                self._member_outputs,
                self._groups(params),
                rows,
                training=key is not None,
                draws=draws,
            )

        return self._with_copies_if_refused(outputs)

    def differentiate_statistics(self) -> tuple[str, ...]:
        """Make running statistics (of BatchNorm) differentiable functions of the parameters.

        Returns the names of the other tensors that a step changes.
        """
        # the imported function, not this method
        statistics = differentiate_statistics(self.template)
        self.stateless = Stateless(self.template)
        return tuple(name for name in self.traits.changing if name not in statistics)

    def row_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self.objective.rows(outputs, y, self.loss_values)

    def _member_outputs(self, module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """Return the predictions of one member."""
        return self.objective.outputs(module, inputs, self.shape.names)

    def _on_folds(
        self,
        function: Callable[..., Tensor],
        groups: Sequence[Params],
        tensors: Sequence[Tensor],
        *,
        training: bool,
        draws: DrawsOfCall,
        place: int = 0,
    ) -> WithBuffers:
        """Call a function for groups of members (``_groups``) and the rows (F, B, ...) of their
        folds, and return the results (P, ...).

        Also returns the members' buffers afterwards. ``place`` is the place of the first fold.
        """
        if not self.traits.common_rows:
            rows = [for_members(x, len(self.configs)) for x in tensors]
            with draws(place):
                return self._mapped(function, groups[0], rows, training)
        # One call for each fold, because the members of a fold share their rows. vmap computes
        # everything before the first trained tensor only once.
        results = []
        buffers: dict[str, list[Tensor]] = {name: [] for name in self.mutable}
        for fold, rows_of_fold in enumerate(zip(*tensors, strict=True)):
            with draws(place + fold):
                result, after = self._mapped(function, groups[fold], rows_of_fold, training)
            results.append(result)
            for name, buffer in after.items():
                buffers[name].append(buffer)
        joined = {name: torch.cat(of_folds) for name, of_folds in buffers.items()}
        return torch.cat(results), joined

    def _mapped(
        self,
        function: Callable[..., Tensor],
        members: Params,
        tensors: Sequence[Tensor],
        training: bool,
    ) -> WithBuffers:
        """Call a function for each member with the member's part of tensors (P, ...), and return
        the results.

        If rows are common, the tensors have no axis of members. Also returns the members' buffers
        afterwards. The tensors are copied if the module may write into rows that members share.
        """
        call = training, torch.is_grad_enabled(), *(x.shape for x in tensors)
        # In training, members of several folds have separate rows, which no other step reads,
        # because ``for_members`` copies the rows of several folds.
        shared = not training or self.traits.common_rows
        shared = shared or any(len(x) > 1 and x.stride(0) == 0 for x in tensors)
        if self.objective.copies or not shared or call in self.harmless_calls:
            return self._map(function, members, tensors, training)
        # A module was tried on few rows, and it may write only if there are more. Therefore the
        # first call with each number of rows gets copies.
        copies = clones(tensors)
        with Recorder(copies) as operations:
            result = self._map(function, members, copies, training)
        if operations.has_written:
            self.objective = replace(self.objective, copies=True)
        else:
            self.harmless_calls.add(call)
        return result

    def _with_copies_if_refused(self, compute: Callable[[], Result]) -> Result:
        """Return the result of ``compute``, which reads rows shared by several members.

        PyTorch refuses a write into shared rows. A module that writes for the first time in the
        middle of the training therefore gets copies from then on.
        """
        try:
            return compute()
        except RuntimeError as error:
            if self.objective.copies or _REFUSED_WRITE not in str(error):
                raise
        self.objective = replace(self.objective, copies=True)
        return compute()

    def _map(
        self,
        function: Callable[..., Tensor],
        members: Params,
        tensors: Sequence[Tensor],
        training: bool,
    ) -> WithBuffers:
        """Call a function for each member (one trial on one fold), without copies of the
        tensors."""

        def call_member(member: Params, *parts: Tensor) -> WithBuffers:
            with self.stateless.substitute({**member, **self.frozen}) as module:
                result = function(in_mode(module, training=training), parts)
                return result, self.stateless.current(self.mutable)

        members = dict(members)
        for name, start in self.mutable.items():
            members[name] = members[name].to(start.dtype)
        rounded = training and self.shape.precision == "bf16"
        # torch's warning about slow vmap operations is for PyTorch's developers. gputune itself
        # reports that members train slowly.
        warns = getattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled")  # noqa: B009
        warns(False)
        try:
            with Mapped(), Rounded() if rounded else nullcontext(), Substitutes():
                row_axis = None if self.traits.common_rows else 0
                axes = (0, *[row_axis] * len(tensors))
                mapped = vmap(call_member, axes, randomness="same")
                result: WithBuffers = mapped(members, *tensors)
                return result
        except IndexError as error:
            raise InputError(
                None,
                f"{name_of(self.builder)} raised IndexError: {error}. It raised no error on the "
                "rows that gputune tried before training",
                remedy="An embedding must have an entry for every code in the data.",
            ) from error
        finally:
            warns(True)
