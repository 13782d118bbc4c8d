"""Trains members one after another, each as a plain module in a plain PyTorch loop, on any device.

A member is one trial on one fold. In shapes, F counts folds, C trials, N the parameters of a member
and M the other values that training changes. This way to train is for modules that cannot be
stacked.

A member's parameters are one contiguous row. The parameters and gradients of its module are views of
two contiguous rows. The minibatches and the random numbers are the same as for stacked members.

A step leaves a parameter that it does not use unchanged, as a plain PyTorch loop does. For modules
that cannot be stacked, the classes of torch.optim take the steps if they can.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from gputune.ground.errors import InputError, option
from gputune.ground.seeding import keyed_draws, start_stream
from gputune.ground.types import DECAY_FACTOR, LR_FACTOR, Config, EvaluationKey, Params
from gputune.ground.within_epoch import report_steps
from gputune.modules.calls import named_tensors, not_trained, put_numbers, state_of
from gputune.modules.construction import hidden_sides, name_of
from gputune.modules.failures import uneven_use
from gputune.modules.findings import check_frozen
from gputune.modules.network import ModuleNetwork, real
from gputune.optimizers.blocks import Block, Blocks
from gputune.optimizers.classes import RowUpdate, class_of, class_of_rule, loop_reason
from gputune.optimizers.optimizer import Optimizer
from gputune.optimizers.rules import schedule_factor
from gputune.optimizers.update import optimizer_of
from gputune.population.batches import Batches, row_order, steps_of
from gputune.population.outputs import in_mode
from gputune.population.population import beyond_adam
from gputune.population.state import State, selected_configs
from gputune.scoring.validation import Validation


class LoopedModule(ModuleNetwork):
    """The members of one population, trained one by one.

    ``running`` has the modules of members in training by fold and trial, if they are scored without
    averaging.
    """

    # All members read the same rows. A module that cannot be stacked may write into them depending
    # on the data or on chance, so no trial can show that it never does. Counters of writes would
    # show it only after the rows are lost. Copying a minibatch takes little of the time of a plain
    # module's step.
    copies_rows = True
    one_by_one = True

    def _lay_out(self) -> None:
        reason = self.traits.unstackable or loop_reason(self.configs[0])
        self.reason = f"because {reason}" if reason else "as requested"
        self.running: Mapping[tuple[int, int], nn.Module] = {}
        super()._lay_out()

    def outputs(
        self, params: Params, fold: int, inputs: Sequence[Tensor], key: EvaluationKey | None = None
    ) -> Tensor:
        host = self.traits.host_draws
        outputs = []
        for trial in range(len(self.configs)):
            draws: AbstractContextManager[None] = nullcontext()
            if self.evaluation_draws and key is not None:
                draws = keyed_draws(self.shape.device, self.seed, "evaluation", *key, host=host)
            with draws:
                outputs.append(self._outputs(params, fold, trial, inputs))
        return torch.stack(outputs)

    def _outputs(self, params: Params, fold: int, trial: int, inputs: Sequence[Tensor]) -> Tensor:
        """Run one member in evaluation mode, and return its outputs (m, K) for m rows."""
        names = self.shape.names
        # not "or": a module may have a length, of 0
        module = self.running.get((fold, trial))
        if module is not None:
            return self.objective.outputs(in_mode(module, training=False), inputs, names)
        values = self.values(params, fold, trial)
        with self.stateless.substitute(values) as module:
            put_numbers(module, {k: values[k] for k in self.mutable})
            return self.objective.outputs(in_mode(module, training=False), inputs, names)

    def draws(self, batches: Batches, *, ahead: bool) -> None:
        return None

    def _refuse(self, *_: object) -> NoReturn:
        """Raise InputError, because the called method needs stacked members."""
        raise self.refusal()

    gradient = differentiable = row_losses = differentiate_statistics = _refuse

    def refusal(self) -> InputError:
        """Return the error of methods that need stacked members: these members train one by one."""
        return InputError(
            None,
            f"The members of {name_of(self.builder)} train one by one, {self.reason}. "
            f"Hypergradients need stacked members",
            remedy=f"Choose another {option('method')}.",
        )


def _stacked_optimizer(
    network: LoopedModule, config: Config, theta: Tensor, *, steps: int, horizon: int
) -> Optimizer:
    """Return gputune's own optimizer for one member, used if no class of torch.optim can take its
    steps.

    This includes optimizers that adapt their own learning rate.
    """
    sides = {}
    if config["optimizer"] == "muon":
        sides = hidden_sides(network.template, network.trainable)
    parts = {"trained": theta}
    if sides or any(key.startswith((LR_FACTOR, DECAY_FACTOR)) for key in config):
        parts = {k: real(w) for k, w in _parts(network, theta).items()}
    blocks = [
        Block(k, (1, 1, *w.shape), 1, (sides[k],) if k in sides else None) for k, w in parts.items()
    ]
    return optimizer_of(
        [config],
        Blocks(blocks),
        theta,
        steps=torch.tensor([[steps]], device=theta.device),
        horizon=horizon,
    )


class _Member:
    """A member in training: a plain module and its optimizer.

    The module's parameters are views of one contiguous row, and their gradients are views of
    another.
    """

    def __init__(
        self, network: LoopedModule, config: Config, start: Params, *, steps: int, horizon: int
    ) -> None:
        self.network = network
        self.config = config
        self.module = network.plain(network.shape.device)
        parameters = dict(self.module.named_parameters())
        self.frozen = {name for name, w in parameters.items() if not w.requires_grad}
        self.row = _as_row(network, [start[name] for name in network.trainable])
        for name, tensor in not_trained(self.module).items():
            if name in network.mutable:
                tensor.copy_(start[name])
        self.grad = torch.zeros_like(self.row)
        self.parts = [(parameters[k], value) for k, value in _parts(network, self.row).items()]
        # Each gradient has its own counter of writes, which shows if a backward pass has reached it.
        self.gradients = [value.data for value in _parts(network, self.grad).values()]
        for (parameter, value), gradient in zip(self.parts, self.gradients):
            parameter.data = value
            parameter.grad = gradient
        self.written = [gradient._version for gradient in self.gradients]
        self.rates = [self.module.get_buffer(name) for name in network.scheduled]
        self.total = steps * horizon
        # Parameters that the optimizer holds separately, and skips if a step does not use them.
        self.leaves = list[Tensor]()
        self.leaf_gradients = list[Tensor]()
        self.update: RowUpdate | Optimizer
        if not (class_of(config) or class_of_rule(config)) or set(beyond_adam(config)) - {"beta2"}:
            self.update = _stacked_optimizer(
                network, config, self.row, steps=steps, horizon=horizon
            )
            return
        if class_of(config) or network.traits.unstackable:
            self.leaves = [real(w) for w in _parts(network, self.row).values()]
            self.leaf_gradients = [real(w) for w in _parts(network, self.grad).values()]
        else:  # as for stacked members: every step updates all parameters
            self.row.grad = self.grad
        self.update = RowUpdate(config, self.row, self.leaves, steps=steps, horizon=horizon)

    def step(self) -> None:
        """Take an optimizer step with the gradients of a backward pass.

        A torch.optim class skips parameters that the backward pass has not reached.
        """
        for parameter, value in self.parts:
            # the forward pass has replaced the parameter's memory by assigning to its data
            if parameter.data_ptr() != value.data_ptr():
                value.copy_(parameter.detach())
                parameter.data = value
        if self.leaves:
            before = self.written
            self.written = [gradient._version for gradient in self.gradients]
            for leaf, gradient, old, new in zip(
                self.leaves, self.leaf_gradients, before, self.written
            ):
                leaf.grad = None if old == new else gradient
        elif not self.network.traits.unstackable:
            self._check_use()
        self.update.step(self.row, self.grad)

    def _check_use(self) -> None:
        """Raise StackedError if a step uses other parameters than the tried steps did.

        The update of a whole row would then apply momentum and weight decay to unused parameters,
        and would leave out the parameters that no tried step used.
        """
        before = self.written
        self.written = [gradient._version for gradient in self.gradients]
        names = [*self.network.trainable]
        skipped = [name for name, old, new in zip(names, before, self.written) if old == new]
        for name in self.network.traits.unused:
            if self.module.get_parameter(name).grad is not None:
                skipped.append(name)
        if skipped:
            name = name_of(self.network.builder)
            raise uneven_use(name, skipped[0], one_by_one=True)

    def dropouts(self, epoch: int, steps: int) -> list[float]:
        """Return the dropout rate in each step of an epoch."""
        done = np.arange(epoch * steps, (epoch + 1) * steps)
        factors = schedule_factor(self.config["dropout_schedule"], done, np.full(steps, self.total))
        return [float(self.config["dropout"] * factor) for factor in factors]

    @property
    def mutable(self) -> Tensor:
        """The row (M,) of the other values that training changes."""
        return _as_row(self.network, state_of(self.module, self.network.mutable).values())

    def resume(self, values: Params, moments: Sequence[Tensor]) -> None:
        """Continue the training of a member from its saved tensors and its saved optimizer
        state, rows (N,)."""
        for name, tensor in named_tensors(self.module).items():
            if name in values:
                tensor.data.copy_(values[name])
        put_numbers(self.module, {k: values[k] for k in self.network.mutable})
        self.update.resume(moments)


class LoopChunk:
    """The members of trials that train together (a chunk), trained one after another, fold by
    fold."""

    scoring_share = 0.0
    faults: Mapping[str, None] = {}
    holds_only_state = False

    def __init__(
        self, network: LoopedModule, validation: Validation, *, seed: int, horizon: int
    ) -> None:
        self.network = network
        self.validation = validation
        self.data = validation.data
        self.seed = seed
        self.target = network.targets(self.data.y)
        self.horizon = horizon
        self.epoch = 0  # epochs that the members have trained
        self.steps_of_epoch = 0  # steps that all members have taken in the running epoch
        self.lengths = np.array(self.data.train_lengths)
        # 2**62: a batch size may be larger than an int64.
        sizes = np.array([min(config["batch_size"], 2**62) for config in network.configs])
        self.sizes = np.minimum.outer(self.lengths, sizes)  # (F, C)
        self.steps = steps_of(self.lengths[:, None], self.sizes, network.least_rows)
        self.members = {
            (f, c): self._member(f, c, network.start_of(start, f, c))
            for f, start in enumerate(network.starts())
            for c in range(len(network.configs))
        }
        """All members by (fold, trial), in the order of the folds."""

    def _member(self, fold: int, trial: int, start: Params) -> _Member:
        """Return a new member that starts from these tensors."""
        config = self.network.configs[trial]
        steps = int(self.steps[fold, trial])
        return _Member(self.network, config, start, steps=steps, horizon=self.horizon)

    @property
    def flat(self) -> Tensor:
        """One flat buffer with the parameters and other changing tensors of all members."""
        rows = [torch.cat([m.row, m.mutable]) for m in self.members.values()]
        return self.network.blocks.from_rows(self._joined(rows))

    @property
    def scored(self) -> Tensor:
        """Flat buffer to score and save: parameters or their averages, then other tensors that
        training changes."""
        members = self.members.values()
        rows = [torch.cat([m.update.scored(m.row), m.mutable]) for m in members]
        return self.network.blocks.from_rows(self._joined(rows))

    @property
    def moments(self) -> tuple[Tensor, ...]:
        """Flat buffers with the optimizer state (moments) of all members."""
        states = zip(*(member.update.state() for member in self.members.values()))
        return tuple(self.network.trained.from_rows(self._joined(rows)) for rows in states)

    def _joined(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the rows (N,) of all members as one tensor (C, F, N)."""
        return torch.stack(list(rows)).view(*self.network.members, -1).transpose(0, 1)

    @property
    def steps_taken(self) -> np.ndarray:
        """Number of optimizer steps that each member has taken, (C, F)."""
        return np.ascontiguousarray(self.epoch * self.steps.T)

    @property
    def state(self) -> State:
        """A copy of the training state, from which ``resume`` continues."""
        return State.of(self.network, self.flat, self.moments, self.epoch, self.steps_taken)

    def resume(self, state: State) -> None:
        """Continue from the state of the same trials."""
        if state.lag(self.steps).any():
            raise ValueError("the batch size of a module that trains one by one cannot change")
        self.epoch = state.epoch
        for (fold, trial), member in self.members.items():
            self._resume(member, state, fold, trial)

    def _resume(self, member: _Member, state: State, fold: int, trial: int) -> None:
        """Continue the training of a member from the state of a trial on a fold."""
        row, *moments = (buffer[trial, fold].to(self.data.device) for buffer in state.buffers)
        member.resume(_values(self.network, row), moments)

    def select(self, slots: Sequence[int], configs: Sequence[Config | None] | None = None) -> None:
        """Replace the trials: the new trial i continues from the state of the trial ``slots[i]``,
        with a new configuration unless ``configs`` or its entry is None.

        A trial with its old configuration keeps its modules. Only its repeats are built again.
        """
        places = list(slots)
        new_configs = selected_configs(self.network, places, configs)
        if new_configs == list(self.network.configs) and places == list(range(len(places))):
            return
        stays = [self.network.configs[c] == config for c, config in zip(places, new_configs)]
        for i, c in enumerate(places):
            stays[i] = stays[i] and c not in places[:i]
        saved = None if all(stays) else self.state
        old = self.members
        self.network = self.network.with_configs(new_configs)
        self.sizes = self.sizes[:, places]
        self.steps = self.steps[:, places]
        self.members = {}
        for fold in range(len(self.lengths)):
            for i, c in enumerate(places):
                if stays[i] or saved is None:
                    self.members[fold, i] = old[fold, c]
                    continue
                start = _values(self.network, saved.buffers[0][c, fold])
                self.members[fold, i] = self._member(fold, i, start)
                self._resume(self.members[fold, i], saved, fold, c)

    def scores(self) -> np.ndarray:
        """Return the scores (C, F) of all members, each on the validation rows of its fold."""
        # The other members are scored by an average of their parameters.
        self.network.running = {
            at: m.module for at, m in self.members.items() if m.update.scored(m.row) is m.row
        }
        params = self.network.blocks.views(self.scored)
        trials = len(self.network.configs)
        return self.validation.scores(self.network, params, trials, epoch=self.epoch)

    def release(self) -> None:
        """Free memory that the next training of these trials allocates again."""
        self.validation.release()

    def advance(self, epoch: int) -> None:
        """Train all members for one epoch."""
        self.epoch = epoch + 1
        self.steps_of_epoch = 0
        order = row_order(self.data, self.seed, epoch)
        draws: AbstractContextManager[None] = nullcontext()
        if self.network.traits.draws:
            host = self.network.traits.host_draws
            draws = keyed_draws(self.data.device, self.seed, "dropout", host=host)
        with draws, torch.enable_grad():
            for (f, c), member in self.members.items():
                rows = order[f, : self.lengths[f]]
                minibatches = torch.split(rows, int(self.sizes[f, c]))[: self.steps[f, c]]
                self._train(member, f, epoch, minibatches)

    def _train(self, member: _Member, fold: int, epoch: int, minibatches: Sequence[Tensor]) -> None:
        """Train one member for one epoch, in a plain PyTorch training loop."""
        module = in_mode(member.module, training=True)
        network = self.network
        objective = self.network.objective
        names = network.shape.names
        rounded = network.shape.precision == "bf16"
        absent = None if self.data.present is None else ~self.data.present[fold]
        member.update.begin(epoch)
        dropouts = member.dropouts(epoch, len(minibatches)) if member.rates else []
        steps_of_all = int(self.steps.sum())
        data = self.data
        target = self.target[fold % len(self.target)]
        for step, rows in enumerate(minibatches):
            inputs = data.rows(fold, rows)
            y = target[rows]
            weights = None if data.weights is None else data.weights[fold, rows]
            for rate in member.rates:
                rate.fill_(dropouts[step])
            if network.traits.draws:
                start_stream(
                    self.data.device,
                    self.seed,
                    "dropout",
                    epoch,
                    step,
                    host=network.traits.host_draws,
                )
            if objective.augment is not None:
                augmented = objective.augmented(
                    [x[None] for x in inputs], names, self.seed, (epoch, step)
                )
                inputs = tuple(x[0] for x in augmented)
            with (
                torch.autocast(network.shape.device.type, torch.bfloat16)
                if rounded
                else nullcontext()
            ):
                losses = objective.losses(
                    module, inputs, y, member.config, names=names, absent=absent
                )
            member.grad.zero_()
            if weights is None or losses.dim() == 0:
                loss = losses.mean()
            else:
                # Double precision, because a sum of weights may leave the range of single
                # precision.
                share = weights.double() / weights.double().sum().clamp_min(
                    torch.finfo(torch.float64).tiny
                )
                loss = (losses * share.to(losses.dtype)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            member.step()
            self.steps_of_epoch += 1
            report_steps(self.steps_of_epoch, steps_of_all, len(network.configs))
        check_frozen(module, member.frozen, name_of(network.builder))


def _as_row(network: LoopedModule, tensors: Iterable[Tensor]) -> Tensor:
    """Flatten the tensors of one member, and join them into one row."""
    empty = torch.empty(0, dtype=network.shape.dtype, device=network.shape.device)
    return torch.cat([empty, *(real(w).flatten().to(empty) for w in tensors)])


def _parts(network: LoopedModule, row: Tensor) -> Params:
    """Split a member's row (N,) into its parameters, as views of the row."""
    return _split(network.trainable, row)


def _values(network: LoopedModule, row: Tensor) -> Params:
    """Split a member's row (N + M,) into its tensors, in their original dtypes."""
    tensors = network.trainable | network.mutable
    return {k: w.to(tensors[k].dtype) for k, w in _split(tensors, row).items()}


def _split(tensors: Params, row: Tensor) -> Params:
    """Split a row into parts with the shapes of some tensors."""
    parts = torch.split(row, [real(w).numel() for w in tensors.values()])
    values = {}
    for (name, w), part in zip(tensors.items(), parts):
        value = part.view(real(w).shape)
        values[name] = torch.view_as_complex(value) if w.is_complex() else value
    return values
