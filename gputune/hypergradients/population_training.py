"""A population as an inner training: F folds x C trials, on the minibatches of the engine, one row each.

Members, starts, minibatches and dropout are those that training reads too, so that a member here equals the same
member there.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.engine.batches import Batch, Batches, for_members
from gputune.engine.losses import row_losses
from gputune.engine.network import Network
from gputune.engine.scoring import Scoring
from gputune.engine.update import schedule_factor
from gputune.hypergradients.inner import Clock
from gputune.types import Config, Params


class PopulationTraining:
    """The members of ``network`` for ``epochs`` epochs; members fold-major, p = f*C + c."""

    def __init__(
        self, network: Network, data: Dataset, configs: Sequence[Config], *, seed: int, epochs: int
    ) -> None:
        self.network, self.data = network, data
        self.folds, self.trials = data.n_folds, len(configs)
        sizes = [config["batch_size"] for config in configs]
        target = data.y if data.y.is_floating_point() else data.y[None]
        self.batches = Batches(data, sizes, target, seed=seed, exact=network.exact)
        self.each = int(self.batches.steps.max())
        self.steps = epochs * self.each
        self.totals = (epochs * self.batches.steps).flatten()
        self.schedules = [config["schedule"] for config in configs]
        self.first = network.blocks.by_member(network.start())
        self.shapes = {name: tuple(view.shape[2:]) for name, view in self.first.items()}
        self.sizes = [view[0, 0].numel() for view in self.first.values()]
        layers = network.layers()
        numbers = torch.tensor([layers[name] for name in self.first])
        self.layer = numbers.repeat_interleave(torch.tensor(self.sizes)).to(data.device)

    def start(self) -> Tensor:
        """Return the members' starts (P, N)."""
        return torch.cat([view.reshape(self.folds * self.trials, -1) for view in self.first.values()], 1)

    def clock(self, step: int) -> Clock:
        """Return where the members stand: those with fewer steps an epoch wait for its end."""
        epoch, within = divmod(step, self.each)
        steps = self.batches.steps
        done = epoch * steps + np.minimum(within, steps - 1)
        active = within < steps
        return Clock(done.flatten(), None if active.all() else active.flatten(), self._factor(done))

    def _factor(self, done: np.ndarray) -> np.ndarray | None:
        if set(self.schedules) == {"constant"}:
            return None
        totals = self.totals.reshape(done.shape)
        columns = [schedule_factor(s, done[:, c], totals[:, c]) for c, s in enumerate(self.schedules)]
        return np.stack(columns, 1).flatten()

    def losses(self, weights: Tensor, step: int) -> Tensor:
        """Return each member's minibatch loss (P,); 0 for a member that has no step now."""
        params = self._named(weights)
        losses = [weights.new_zeros(self.trials)] * self.folds
        for part in self.batches.at(*divmod(step, self.each)):
            found = self._part(params, part)
            losses[part.folds] = list(found)
        return torch.cat(losses)

    def _part(self, params: Params, batch: Batch) -> Tensor:
        """Return the losses (F, C) of the folds of one part of a step."""
        whole = batch.folds == slice(0, self.folds)  # a slice of everything would be copied on the way back
        own = {name: (w if whole else w[batch.folds]).flatten(0, 1) for name, w in params.items()}
        shared = len(batch.inputs[0]) != self.folds * self.trials or self.trials == 1
        inputs = [for_members(x, self.trials) if shared else x for x in batch.inputs]
        outputs = self.network.differentiable(own, inputs, batch.key)
        outputs = self._masked(outputs.view(-1, self.trials, *outputs.shape[1:]), batch.folds)
        y = batch.y.view(len(outputs), -1, outputs.shape[2])  # (F, 1 or C, B)
        share = batch.share.squeeze(-1) if isinstance(batch.share, Tensor) else batch.share
        losses: Tensor = (row_losses(outputs, y) * share).sum(-1)
        return losses

    def validation(self, weights: Tensor) -> Tensor:
        """Return the loss (P,) on the validation rows: cross-entropy, or squared error in the target's own units."""
        params = self._named(weights)
        losses = []
        for f, fold in enumerate(self.data.folds):
            y = self.data.y[f] if self.data.y.is_floating_point() else self.data.y
            mean = row_losses(self._valid(params, f), y[fold.valid]).mean(-1)
            losses.append(mean * self.data.scale[f].to(mean.dtype) ** 2)
        return torch.cat(losses)

    @torch.no_grad()
    def scores(self, weights: Tensor, scoring: Scoring) -> np.ndarray:
        """Return the scores (C, F) of all members on the validation rows of their fold."""
        params = self._named(weights)
        columns = [
            scoring(self.data, f, self._valid(params, f, masked=False), partial(self.member, weights, f))
            for f in range(self.folds)
        ]
        found: np.ndarray = torch.stack(columns, 1).cpu().numpy()
        return found

    def _valid(self, params: Params, fold: int, *, masked: bool = True) -> Tensor:
        rows = self.data.rows(fold, self.data.folds[fold].valid)
        own = {name: w[fold] for name, w in params.items()}
        inputs = [x.expand(self.trials, *x.shape) for x in rows]
        outputs = self.network.differentiable(own, inputs, None)
        return self._masked(outputs[None], slice(fold, fold + 1))[0] if masked else outputs

    def _masked(self, outputs: Tensor, folds: slice) -> Tensor:
        """Give -inf to the classes that take no part in a fold, of outputs (F, C, B, K)."""
        if self.data.present is None:
            return outputs
        return outputs.masked_fill(~self.data.present[folds, None, None], -torch.inf)

    def _named(self, weights: Tensor) -> Params:
        """Return the parameters (F, C, ...) that rows (P, N) hold."""
        parts = torch.split(weights, self.sizes, 1)
        return {
            name: part.view(self.folds, self.trials, *shape)
            for (name, shape), part in zip(self.shapes.items(), parts)
        }

    def member(self, weights: Tensor, fold: int, trial: int) -> nn.Module:
        """Return one member as a plain module on the CPU, in evaluation mode."""
        blocks = self.network.blocks
        flat = weights.new_empty(blocks.size)
        views = blocks.by_member(flat)
        for name, value in self._named(weights).items():
            views[name].copy_(value)
        return self.network.member(blocks.views(flat), fold, trial)
