"""The members of a chunk as rows, each of all parameters of one plain module: of what cannot be stacked."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gputune.errors import InputError
from gputune.modules.calls import put_numbers
from gputune.modules.construction import name_of
from gputune.modules.module import ModuleNetwork
from gputune.optimizers.blocks import Block, Blocks
from gputune.optimizers.classes import loop_reason
from gputune.population.batches import Batch, Batches
from gputune.types import Params


class LoopedModule(ModuleNetwork):
    """Members with a row each: block "trained" (F, C, N), and "kept" (F, C, M) where training changes more.

    ``own`` are the modules of members that train, by fold and trial, where they are scored as they are.
    """

    def _lay_out(self) -> None:
        why = self.traits.unstackable or loop_reason(self.configs[0])
        self.reason = f"since {why}" if why else "as asked for"
        self.sizes = [_real(w).numel() for w in self.first.values()]
        self.kept_sizes = [_real(w).numel() for w in self.kept.values()]
        self.own: Mapping[tuple[int, int], nn.Module] = {}
        rows = [Block("trained", (*self.members, sum(self.sizes)), 1)]
        self.trained = Blocks(rows)
        self.blocks = Blocks(
            [*rows, *[Block("kept", (*self.members, sum(self.kept_sizes)), 1)] * bool(self.kept)]
        )

    def start(self) -> Tensor:
        flat = torch.empty(self.blocks.size, dtype=self.shape.dtype, device=self.shape.device)
        for fold, start in enumerate(self.starts()):
            for view, names in zip(self.blocks.views(flat).values(), (self.first, self.kept)):
                view[fold].copy_(self.as_row({name: start[name] for name in names}))
        return flat

    def as_row(self, tensors: Params) -> Tensor:
        """Return tensors of one member as its row."""
        return torch.cat(
            [_real(w).flatten().to(self.shape.device, self.shape.dtype) for w in tensors.values()]
        )

    def values(self, params: Params, fold: int, trial: int) -> Params:
        """Return the tensors of one member, in their own shapes and dtypes."""
        found = self.parts(params["trained"][fold, trial])
        if self.kept:
            parts = torch.split(params["kept"][fold, trial], self.kept_sizes)
            found |= {k: _shaped(p, w).to(w.dtype) for (k, w), p in zip(self.kept.items(), parts)}
        return found

    def parts(self, row: Tensor) -> Params:
        """Return the parameters that lie in a row (N,)."""
        parts = torch.split(row, self.sizes)
        return {k: _shaped(part, w) for (k, w), part in zip(self.first.items(), parts)}

    def leaves(self, row: Tensor) -> Params:
        """Return the parameters that lie in a row (N,) as real numbers, which an optimizer may hold."""
        return {k: _real(part) for k, part in self.parts(row).items()}

    def outputs(self, params: Params, fold: int, inputs: Sequence[Tensor]) -> Tensor:
        found = []
        for trial in range(len(self.configs)):
            if (module := self.own.get((fold, trial))) is not None:  # one may have a length, of 0
                found.append(self.objective.outputs(module.eval(), inputs, self.shape.names))
                continue
            values = self.values(params, fold, trial)
            with self.stateless.holding(values) as module:
                put_numbers(module, {k: values[k] for k in self.kept})
                found.append(self.objective.outputs(module.eval(), inputs, self.shape.names))
        return torch.stack(found)

    def member(self, params: Params, fold: int, trial: int) -> nn.Module:
        return self.filled(self.values(params, fold, trial))

    def draws(self, batches: Batches, *, ahead: bool) -> None:
        return None

    def gradient(self, params: Params, batch: Batch, grads: Params) -> None:
        raise self.refusal()

    def differentiable(self, params: Params, inputs: Sequence[Tensor], key: tuple[int, int] | None) -> Tensor:
        raise self.refusal()

    def row_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        raise self.refusal()

    def refusal(self) -> InputError:
        """Return the error of what needs stacked members."""
        return InputError(
            f"model: {name_of(self.builder)} trains one by one, {self.reason}. Hypergradients need members that can be "
            "stacked; choose another method."
        )


def _real(tensor: Tensor) -> Tensor:
    """Return complex numbers (...) as real and imaginary parts (..., 2), others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    """Return a part of a row in the shape of a tensor, complex where that is."""
    return torch.view_as_complex(part.view(*like.shape, 2)) if like.is_complex() else part.view(like.shape)
