"""The tensors of members that train one after another, each as a plain module, on any device.

A member is one trial on one fold. In shapes, F counts folds, C trials, N the parameters of a member
and M the other values that training changes.

This way to train is for modules that cannot be stacked. ``loop_chunk.py`` has the training.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import torch
from torch import Tensor, nn

from gputune.ground.errors import InputError, option
from gputune.ground.seeding import keyed_draws
from gputune.ground.types import EvaluationKey, Params
from gputune.modules.calls import put_numbers
from gputune.modules.construction import name_of
from gputune.modules.network import ModuleNetwork
from gputune.optimizers.blocks import Block, Blocks
from gputune.optimizers.classes import loop_reason
from gputune.population.batches import Batches
from gputune.population.outputs import in_mode


class LoopedModule(ModuleNetwork):
    """The members of one population, trained one by one: each member's parameters are one row.

    The block "trained" (F, C, N) holds the parameters of C trials on F folds. The block "mutable"
    (F, C, M) holds other tensors, if training changes any. ``running`` has the modules of members
    in training by fold and trial, if they are scored without averaging.
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
        self.rows = {"trained": self.trainable}
        if self.mutable:
            self.rows["mutable"] = self.mutable
        blocks = []
        for name, tensors in self.rows.items():
            size = sum(_real(w).numel() for w in tensors.values())
            blocks.append(Block(name, (*self.members, size), 1))
        self.trained = Blocks(blocks[:1])
        self.blocks = Blocks(blocks)

    def start(self) -> Tensor:
        flat = torch.empty(self.blocks.size, dtype=self.shape.dtype, device=self.shape.device)
        for fold, start in enumerate(self.starts()):
            for trial in range(len(self.configs)):
                tensors = self.start_of(start, fold, trial)
                for name, view in self.blocks.views(flat).items():
                    view[fold, trial].copy_(self.as_row({k: tensors[k] for k in self.rows[name]}))
        return flat

    def as_row(self, tensors: Params) -> Tensor:
        """Flatten the tensors of one member, and join them into one row."""
        return torch.cat(
            [_real(w).flatten().to(self.shape.device, self.shape.dtype) for w in tensors.values()]
        )

    def values(self, params: Params, fold: int, trial: int) -> Params:
        """Return the tensors of one member in their original shapes and dtypes."""
        return {
            k: w
            for name in self.rows
            for k, w in self.parts(params[name][fold, trial], name).items()
        }

    def parts(self, row: Tensor, name: str = "trained") -> Params:
        """Split a member's row (N,) into its tensors, by name. ``name`` is the row's block."""
        tensors = self.rows[name]
        parts = torch.split(row, [_real(w).numel() for w in tensors.values()])
        return {k: _reshape(part, w).to(w.dtype) for (k, w), part in zip(tensors.items(), parts)}

    def leaves(self, row: Tensor) -> Params:
        """Split a member's row (N,) into real tensors for an optimizer, by parameter name. A
        complex parameter becomes pairs of real numbers."""
        return {k: _real(part) for k, part in self.parts(row).items()}

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


def _real(tensor: Tensor) -> Tensor:
    """View a complex tensor (...) as real and imaginary parts (..., 2). A real tensor is
    unchanged."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _reshape(part: Tensor, like: Tensor) -> Tensor:
    """Return values from a member's row in the shape of the tensor ``like``. They are complex if
    ``like`` is complex."""
    return (
        torch.view_as_complex(part.view(*like.shape, 2))
        if like.is_complex()
        else part.view(like.shape)
    )
