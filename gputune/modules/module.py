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
from typing import Self, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vmap

from gputune.errors import InputError
from gputune.memory import CPU
from gputune.models import Dropout
from gputune.modules.calls import (
    ModuleDraws,
    Rounded,
    Stateless,
    convert,
    draws_of,
    named_tensors,
    put_numbers,
    replay_draws,
    state_of,
)
from gputune.modules.construction import (
    Builder,
    build_module,
    dropout_rates,
    hidden_sides,
    layers_of,
    name_of,
    start_from,
)
from gputune.modules.mapped import Mapped
from gputune.modules.substitutes import Substitutes, differentiate_statistics, make_mappable
from gputune.modules.trace import TraceError, clones
from gputune.modules.write_watch import Writes
from gputune.optimizers.blocks import Block, Blocks
from gputune.population.batches import Batch, Batches, for_members
from gputune.population.kinds import ModelKind
from gputune.population.population import Shape, arguments_of, arguments_text, module_arguments
from gputune.population.traits import Traits
from gputune.scoring.objective import Objective
from gputune.seeding import keyed_draws
from gputune.types import Config, EvaluationKey, Params, StepKey

_REFUSED_WRITE = "written-to tensor"
"""Part of PyTorch's error for a write into rows that several members share."""

Result = TypeVar("Result")

WithBuffers: TypeAlias = tuple[Tensor, Params]
"""The results of all members, and the members' buffers (P, ...) after the call."""


class ModuleNetwork:
    """Base class for the members of a user's module: C trials on F folds with equal ``module__*``
    values."""

    exact = True
    one_by_one = False
    kind: ModelKind = "module"
    copies_rows = False
    """True if the user's code always receives copies of the rows, so that it may write into
    them."""

    def __init__(
        self,
        builder: Builder,
        configs: Sequence[Config],
        shape: Shape,
        *,
        seed: int,
        traits: Traits | None = None,
        objective: Objective | None = None,
    ) -> None:
        traits = traits or Traits()
        objective = objective or Objective("mse" if shape.n_outputs == 1 else "cross_entropy")
        self.objective = objective.like(shape.dtype, shape.device)
        self.builder = builder
        self.configs = tuple(configs)
        self.shape = shape
        self.seed = seed
        # ``unstackable`` alone never decides: such members form a ``LoopedModule``, which always
        # copies rows.
        if traits.writes or traits.unstackable or self.copies_rows:
            self.objective = replace(self.objective, copies=True)
        self.traits = traits
        self.least_rows = traits.least_rows
        self.alone = traits.alone
        self.evaluation_draws = traits.evaluation_draws
        self.template = self.plain(shape.device)
        self.scheduled = dropout_rates(self.template)
        parameters = dict(self.template.named_parameters())
        buffers = dict(self.template.named_buffers())
        changing = dict.fromkeys(traits.changing)
        if hasattr(self.template, "start_from"):  # start_from may set any buffer
            saved = self.template.state_dict()
            changing |= dict.fromkeys(name for name in buffers if name in saved)
        self.mutable = state_of(self.template, changing)
        self.trainable: Params = {}
        self.frozen: Params = {}
        for name, w in (parameters | buffers).items():
            if w.requires_grad and name in parameters and name not in traits.unused:
                self.trainable[name] = w.detach()
            elif name not in self.mutable:
                self.frozen[name] = w.detach()
        self.members = (shape.folds, len(configs))
        self.loss_values = self.objective.values(
            self.configs, torch.empty(0, dtype=shape.dtype, device=shape.device)
        )
        self.widest = max(traits.widest, shape.n_features)
        self._lay_out()
        self.stateless = Stateless(self.template)

    def _lay_out(self) -> None:
        """Set the layout of the members' flat buffers: ``trained`` for the parameters, and
        ``blocks`` for the complete state."""
        raise NotImplementedError

    def values(self, params: Params, fold: int, trial: int) -> Params:
        """Return the named tensors of one member, in their original shapes."""
        raise NotImplementedError

    @property
    def constants(self) -> object:
        config = self.configs[0]
        if self.objective.is_named:
            return arguments_text(config)
        return arguments_text(config), repr(arguments_of(config, "loss__"))

    def plain(self, device: torch.device) -> nn.Module:
        """Return a new, untrained module, built with the arguments that all trials share."""
        module = build_module(
            self.builder, module_arguments(self.configs[0]), self.shape, seed=self.seed
        )
        return convert(module, self.shape.dtype).to(device)

    def starts(self) -> list[Params]:
        """Return the initial tensors for each fold. All members of a fold start from the same
        tensors.

        The tensors are fitted to the fold's rows if the module has a ``start_from``.
        """
        common = self.trainable | self.mutable
        if self.shape.rows is None or not hasattr(self.template, "start_from"):
            return [common] * self.shape.folds
        starts = []
        for fold in range(self.shape.folds):
            module = self.plain(self.shape.device)
            start_from(module, *self.shape.rows(fold), seed=self.seed)
            fitted = named_tensors(module).items()
            starts.append(common | {name: w.detach() for name, w in fitted if name in common})
        return starts

    def targets(self, y: Tensor) -> Tensor:
        y = y.to(self.shape.dtype) if y.is_floating_point() else y
        return y if y.dim() > 1 else y[None]

    def with_configs(self, configs: Sequence[Config]) -> Self:
        return type(self)(
            self.builder,
            configs,
            self.shape,
            seed=self.seed,
            traits=self.traits,
            objective=self.objective,
        )

    def layers(self) -> dict[str, int]:
        owners = layers_of(self.template)
        return {name: owners.index(name.rpartition(".")[0]) for name in self.trainable}

    def member(self, params: Params, fold: int, trial: int) -> nn.Module:
        """Return one member as a plain module in evaluation mode, on the CPU."""
        # The template is not copied, because attributes other than parameters and buffers cannot
        # always be copied.
        module = self.plain(CPU)
        values = self.values(params, fold, trial) | self.frozen
        with torch.no_grad():
            for name, tensor in named_tensors(module).items():
                if not torch.equal(tensor, values[name].cpu()):
                    tensor.copy_(values[name])
            put_numbers(module, {name: values[name] for name in self.mutable})
        return module.eval()


class StackedModule(ModuleNetwork):
    """Members with stacked parameters. vmap maps one forward pass over all members.

    ``population.Network`` or the base class documents the methods without docstrings.
    """

    def _lay_out(self) -> None:
        # This changes the template too, before ``stateless`` keeps the module's state.
        make_mappable(self.template)
        # calls that left their rows unchanged, by the shapes of these rows
        self.harmless_calls = set[tuple[object, ...]]()
        trials = self.members[1]
        sides = hidden_sides(self.template, self.trainable)
        blocks = []
        for name, w in (self.trainable | self.mutable).items():
            member_sides = (sides[name],) * trials if name in sides else None
            blocks.append(Block(name, (*self.members, *w.shape), 1, member_sides))
        self.trained = Blocks(blocks[: len(self.trainable)])
        self.blocks = Blocks(blocks)

    def start(self) -> Tensor:
        flat = torch.empty(self.blocks.size, dtype=self.shape.dtype, device=self.shape.device)
        views = self.blocks.views(flat)
        for fold, start in enumerate(self.starts()):
            for name, view in views.items():
                view[fold].copy_(start[name])
        return flat

    def draws(self, batches: Batches, *, ahead: bool) -> ModuleDraws | None:
        """Return the object that makes the random numbers of the next steps in advance.

        It makes none if only dropout is random, at rate 0. The result is None unless ``ahead`` is
        True. Raises TraceError if ``augment`` is set.
        """
        if not ahead:
            return None  # the step draws for itself, by the key of the minibatch
        if self.objective.augment is not None:
            raise TraceError(
                "augment receives a new random generator for each minibatch, and gputune cannot "
                "record this in a training step"
            )
        drops = any(config["dropout"] for config in self.configs)
        for is_off in (False,) if drops else (True, False):
            for part in self.template.modules():
                if isinstance(part, Dropout):
                    part.is_off = is_off
            self.stateless = Stateless(self.template)
            draws = ModuleDraws(self.plain_losses, batches, self.seed)
            # If something else draws, dropout draws too, so that the order of draws stays the same.
            if not any(draws.draws.values()):
                break
        return draws

    def _plain_values(self) -> Params:
        """Return the initial tensors for one call of a plain module, which may write into them."""
        # Clones, because draws depend on a tensor's layout in memory, and a member's part of a
        # stacked tensor has another layout.
        mutable = {name: w.clone() for name, w in self.mutable.items()}
        return self.trainable | mutable | self.frozen

    def plain_losses(self, batch: Batch) -> object:
        """Compute the losses of one member as a plain module, to record its random numbers."""
        # Copies, because the members read these rows next.
        inputs = [x[0].clone() for x in batch.inputs]
        y = batch.y[0].clone()
        names = self.shape.names
        # Substitutes as in the mapped call: a fused attention would count as an operation that
        # draws.
        with self.stateless.substitute(self._plain_values()) as module, Substitutes():
            return self.objective.losses(module.train(), inputs, y, self.configs[0], names=names)

    def gradient(self, params: Params, batch: Batch, grads: Params) -> None:
        trials = len(self.configs)
        # (F, C, ...) -> (P, ...). ``batch.folds`` is a slice, so these tensors, and the parts of
        # ``grads`` below, are views. A copy into them writes into ``params`` or ``grads``.
        members = {name: w[batch.folds].flatten(0, 1) for name, w in params.items()}
        leaves = {name: members[name].detach().requires_grad_() for name in self.trainable}
        inputs = self.objective.augmented(batch.inputs, self.shape.names, self.seed, batch.key)

        def losses() -> WithBuffers:
            tensors = dict(leaves)
            for name, start in self.mutable.items():
                # Copies, because the members' own tensors share a counter of writes with the
                # leaves, and autograd requires unwritten leaves.
                tensors[name] = members[name].to(start.dtype, copy=True)
            rows = [for_members(x, trials) for x in inputs]
            with self._draws(batch):
                return self._losses(tensors, rows, batch)

        with torch.enable_grad():
            loss, after = self._with_copies_if_refused(losses)
            # A user's own mean loss has no rows to weight. It was refused if there are weights.
            if loss.dim() == 3:
                share = batch.share  # a float, or one weight per row: (F, 1 or C, B, 1)
                loss = loss * (share.squeeze(-1) if isinstance(share, Tensor) else share)
            gradients = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, gradients):
            # A parameter without influence on the output gets the gradient 0.
            part = grads[name][batch.folds]
            part.zero_() if gradient is None else part.copy_(gradient.view(part.shape))
        for name, buffer in after.items():
            members[name].copy_(buffer.detach())

    def _draws(self, batch: Batch) -> AbstractContextManager[object]:
        """Inside the context, random operations use the minibatch's random numbers. These were made
        in advance, or come from the minibatch's random stream."""
        if isinstance(batch.draws, tuple):
            return replay_draws(batch.draws)
        if not self.traits.draws:
            return nullcontext()
        return self._draws_of(partial(self.plain_losses, batch), "dropout", *batch.key)

    def _draws_of(
        self, forward: Callable[[], object], *key: object
    ) -> AbstractContextManager[object]:
        """Inside the context, all members use the random numbers that one plain member makes in
        ``forward``. They come from the random stream of ``key``."""
        keyed = partial(keyed_draws, self.shape.device, self.seed, *key)
        try:
            with keyed():
                return replay_draws(draws_of(forward))
        except TraceError:
            return keyed()

    def _losses(self, members: Params, inputs: Sequence[Tensor], batch: Batch) -> WithBuffers:
        """Return the loss of each row of a minibatch, (F, C, B), and the buffers after the
        minibatch.

        A user's own loss may return means (F, C) instead.
        """
        trials = len(self.configs)
        if not self.objective.is_named:

            def member_losses(module: nn.Module, parts: Sequence[Tensor]) -> Tensor:
                *rows, y = parts
                config = self.configs[0]
                return self.objective.losses(module, rows, y, config, names=self.shape.names)

            tensors = [*inputs, for_members(batch.y, trials)]
            losses, after = self._mapped(member_losses, members, tensors, True)
            return losses.view(-1, trials, *losses.shape[1:]), after
        outputs, after = self._forward(members, inputs, training=True)
        outputs = _with_columns(outputs).to(self.shape.dtype)
        outputs = outputs.view(-1, trials, *outputs.shape[1:])  # (F, C, B, K)
        if self.shape.present is not None:
            outputs = outputs.masked_fill(~self.shape.present[batch.folds, None, None], -torch.inf)
        return self.row_losses(outputs, batch.y[:, None]), after

    def outputs(
        self, params: Params, fold: int, inputs: Sequence[Tensor], key: EvaluationKey | None = None
    ) -> Tensor:
        trials = len(self.configs)
        members = {name: w[fold] for name, w in params.items()}
        rows = [x.expand(trials, *x.shape) for x in inputs]

        def outputs() -> Tensor:
            draws: AbstractContextManager[object] = nullcontext()
            if self.evaluation_draws and key is not None:
                draws = self._draws_of(partial(self._plain_outputs, inputs), "evaluation", *key)
            with draws:
                return self._forward(members, rows, training=False)[0]

        return self._with_copies_if_refused(outputs)

    def _plain_outputs(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs of one member as a plain module in evaluation mode, to record its
        random numbers."""
        copies = clones(inputs)  # the members read these rows next
        with self.stateless.substitute(self._plain_values()) as module, Substitutes():
            return self.objective.outputs(module.eval(), copies, self.shape.names)

    def differentiable(
        self, params: Params, inputs: Sequence[Tensor], key: StepKey | None
    ) -> Tensor:
        return _with_columns(self.with_statistics(params, inputs, key)[0])

    def with_statistics(
        self, params: Params, inputs: Sequence[Tensor], key: StepKey | None
    ) -> WithBuffers:
        """Return the members' outputs like ``differentiable``, and the members' buffers (P, ...)
        afterwards."""

        def outputs() -> WithBuffers:
            draws: AbstractContextManager[object] = nullcontext()
            if key is not None:
                draws = keyed_draws(self.shape.device, self.seed, "dropout", *key)
            # the same draws in all evaluations, because a derivative compares them
            elif self.evaluation_draws:
                draws = keyed_draws(self.shape.device, self.seed, "evaluation")
            with draws:
                return self._forward(params, inputs, training=key is not None)

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

    def _forward(self, members: Params, inputs: Sequence[Tensor], *, training: bool) -> WithBuffers:
        """Return outputs (P, B, ...) of members (P, ...) on rows (P, B, ...), and the buffers
        afterwards."""
        return self._mapped(
            partial(self.objective.outputs, names=self.shape.names), members, inputs, training
        )

    def _mapped(
        self,
        function: Callable[..., Tensor],
        members: Params,
        tensors: Sequence[Tensor],
        training: bool,
    ) -> WithBuffers:
        """Call a function for each member with the member's part of tensors (P, ...), and return
        the results.

        Also returns the members' buffers afterwards. The tensors are copied if the module may write
        into rows that members share.
        """
        call = training, torch.is_grad_enabled(), *(x.shape for x in tensors)
        # In training, members of several folds have separate rows, which no other step reads,
        # because ``for_members`` copies the rows of several folds.
        shared = not training or any(len(x) > 1 and x.stride(0) == 0 for x in tensors)
        if self.objective.copies or not shared or call in self.harmless_calls:
            return self._map(function, members, tensors, training)
        # A module was tried on few rows, and it may write only if there are more. Therefore the
        # first call with each number of rows gets copies.
        copies = clones(tensors)
        with Writes(copies) as writes:
            result = self._map(function, members, copies, training)
        if writes.has_written:
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
                return function(module.train(training), parts), self.stateless.current(self.mutable)

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
                mapped = vmap(call_member, randomness="same")
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

    def values(self, params: Params, fold: int, trial: int) -> Params:
        return {name: w[fold, trial] for name, w in params.items()}


def _with_columns(outputs: Tensor) -> Tensor:
    """Add a third axis of length 1 to outputs (P, B) with one value per row. Other outputs are
    unchanged."""
    return outputs if outputs.dim() > 2 else outputs[..., None]
