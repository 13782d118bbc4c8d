"""The base class of the members of a user's module, which are stacked or train one by one.

A member is one trial on one fold. All members of one network have equal ``module__*`` values.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from gputune.ground.device import CPU
from gputune.ground.types import Config, Params
from gputune.modules.calls import Stateless, convert, named_tensors, put_numbers, state_of
from gputune.modules.construction import (
    Builder,
    build_module,
    dropout_rates,
    hidden_sides,
    layers_of,
    start_from,
)
from gputune.modules.pretrained import adapters_of, start_member
from gputune.optimizers.blocks import Block, Blocks
from gputune.population.kinds import ModelKind
from gputune.population.outputs import in_mode
from gputune.population.population import Shape, arguments_of, arguments_text, module_arguments
from gputune.population.traits import Traits
from gputune.scoring.objective import Objective


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
        self.widest = traits.widest
        if not traits.common_rows:  # each member has a copy of its rows
            self.widest = max(traits.widest, shape.n_features)
        self._lay_out()
        self.stateless = Stateless(self.template)

    def _lay_out(self) -> None:
        """Set the layout of the members' flat buffers: ``trained`` for the parameters, and
        ``blocks`` for the complete state. A block is a tensor of all members (F, C, ...)."""
        trials = self.members[1]
        sides = hidden_sides(self.template, self.trainable)
        blocks = []
        for name, w in (self.trainable | self.mutable).items():
            member_sides = (sides[name],) * trials if name in sides else None
            blocks.append(Block(name, (*self.members, *real(w).shape), 1, member_sides))
        self.trained = Blocks(blocks[: len(self.trainable)])
        self.blocks = Blocks(blocks)

    def start(self) -> Tensor:
        """Return the flat buffer of all members at the start of their training."""
        flat = torch.empty(self.blocks.size, dtype=self.shape.dtype, device=self.shape.device)
        views = self.blocks.views(flat)
        for fold, start in enumerate(self.starts()):
            for name, view in views.items():
                view[fold].copy_(real(start[name]))
            if self.has_own_starts:
                for trial in range(len(self.configs)):
                    for name, w in self.start_of(start, fold, trial).items():
                        views[name][fold, trial].copy_(real(w))
        return flat

    def values(self, params: Params, fold: int, trial: int) -> Params:
        """Return the named tensors of one member, in their original shapes and dtypes."""
        values = {}
        for name, start in (self.trainable | self.mutable).items():
            value = params[name][fold, trial]
            if start.is_complex():
                value = torch.complex(value[..., 0], value[..., 1])
            values[name] = value.to(start.dtype)
        return values

    @property
    def constants(self) -> object:
        config = self.configs[0]
        if self.objective.is_named:
            return arguments_text(config)
        return arguments_text(config), repr(arguments_of(config, "loss__"))

    def plain(self, device: torch.device, seed: int | None = None) -> nn.Module:
        """Return a new, untrained module, built with the arguments that all trials share.

        ``seed`` is the seed of its initial weights. None means the seed of the search.
        """
        seed = self.seed if seed is None else seed
        module = build_module(
            self.builder, module_arguments(self.configs[0]), self.shape, seed=seed
        )
        return convert(module, self.shape.dtype).to(device)

    @property
    def has_own_starts(self) -> bool:
        """True if trials may start from different tensors on the same fold."""
        has_seeds = any("init_seed" in config for config in self.configs)
        return has_seeds or adapters_of(self.builder) is not None

    def starts(self) -> list[Params]:
        """Return the initial tensors for each fold, for members without an ``init_seed``."""
        seeds = self.shape.seeds(self.seed)
        return [self._start(fold, seed) for fold, seed in enumerate(seeds)]

    def _start(self, fold: int, seed: int) -> Params:
        """Return the initial tensors for a fold and a seed.

        The tensors are fitted to the fold's rows if the module has a ``start_from``.
        """
        common = self.trainable | self.mutable
        has_hook = self.shape.rows is not None and hasattr(self.template, "start_from")
        if seed == self.seed and not has_hook:
            return common
        module = self.plain(self.shape.device, seed)
        if has_hook:
            assert self.shape.rows is not None
            start_from(module, *self.shape.rows(fold), seed=seed)
        own = named_tensors(module).items()
        return common | {name: w.detach() for name, w in own if name in common}

    def start_of(self, start: Params, fold: int, trial: int) -> Params:
        """Return the initial tensors of one trial's member on a fold, which begin as ``start``.

        They differ between trials for an ``init_seed``, and for adapters, whose rank and scale
        belong to a trial.
        """
        config = self.configs[trial]
        if "init_seed" in config:
            start = self._start(fold, self.shape.seeds(config["init_seed"])[fold])
        if adapters_of(self.builder) is None:
            return start
        tensors = {name: w.clone() for name, w in start.items()}
        start_member(self.template, config, tensors)
        return tensors

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
        return in_mode(module, training=False)


def real(tensor: Tensor) -> Tensor:
    """View a complex tensor (...) as real and imaginary parts (..., 2). A real tensor is
    unchanged."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
