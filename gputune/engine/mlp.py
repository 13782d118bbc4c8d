"""The built-in MLP of all members, as stacked tensors.

A member is one trial on one fold. The members of a fold read the same rows, so the first layer is
one wide product per fold: (B, D) x (D, C*H). Its weights therefore have axes (F, D, C, H). The
other layers are batched products over members. Narrow layers are padded with units that have zero
weights on both sides. The activations map 0 to 0, so these units get a zero gradient and stay zero.

Axes: F folds, C trials, P = F*C members (fold-major), B rows, H width, K outputs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.engine.dropout import MlpDraws, dropout_draw
from gputune.ground.seeding import stream
from gputune.ground.types import Config, EvaluationKey, Params, StepKey
from gputune.models import MLP, LogisticRegression
from gputune.optimizers.blocks import Block, Blocks
from gputune.population.batches import Batch, Batches
from gputune.population.kinds import (
    ModelKind,
    dropout_rates,
    hidden_activations,
    hidden_layers,
    hidden_widths,
    padded_width,
)
from gputune.population.population import Shape
from gputune.population.traits import Traits
from gputune.scoring.losses import LOSSES, cross_entropy_slope_, number_slope_, row_losses

_MODULES: Mapping[ModelKind, tuple[Callable[..., MLP | LogisticRegression], tuple[str, ...]]] = {
    "mlp": (MLP, ("width", "depth", "activation", "dropout")),
    "linear": (LogisticRegression, ()),
}
"""Maps a kind of model to its plain module, and to the hyperparameters that are its arguments."""


def _start_values(seed: int, layer: int, n_in: int, n_out: int) -> Tensor:
    """Return the initial weights and biases of a layer, (n_out * n_in + n_out,) float64, uniform in
    [-1/sqrt(n_in), 1/sqrt(n_in))."""
    generator = stream(seed, "start", layer, n_out, n_in)
    size = n_out * n_in + n_out
    draw = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
    return (2 * draw - 1) / math.sqrt(n_in)


class StackedMLP:
    """The stacked networks of C trials on F folds: MLPs or linear models, with their gradient.

    ``kind`` is "mlp" or "linear". In a regression, the networks train on ``loss``. ``loss_number``
    is the argument of this loss, if it has an argument.
    """

    exact = False
    one_by_one = False
    traits: Traits | None = None
    constants: object = None
    alone = True
    least_rows = 1
    evaluation_draws = False
    # No parameter follows a schedule: dropout rates apply to the draws.
    scheduled: tuple[str, ...] = ()

    def __init__(
        self,
        kind: ModelKind,
        configs: Sequence[Config],
        shape: Shape,
        *,
        seed: int,
        loss: str = "mse",
        loss_number: float = 0.0,
    ) -> None:
        self.kind = kind
        self.configs = tuple(configs)
        self.shape = shape
        self.seed = seed
        self.loss = loss
        self.loss_number = loss_number
        first = configs[0]
        self.depth = len(hidden_layers(first, kind))
        self.hidden = 0
        if self.depth:
            self.hidden = padded_width(max(hidden_widths(first)))
        self.activations = hidden_activations(first) if self.depth else ()
        rates = list(map(dropout_rates, configs))
        self.rates = None
        if self.depth and any(map(any, rates)):
            # dropout rates (layers, C, 1, 1)
            table = torch.tensor(rates, dtype=shape.dtype, device=shape.device)
            self.rates = table.T[..., None, None]
            self.keep_rates = 1 - self.rates
        self.sizes = [shape.n_features, *[self.hidden] * self.depth, shape.n_outputs]
        folds = shape.folds
        trials = len(configs)
        widths = list(map(hidden_widths, configs))
        # One block per parameter. The first layer is one wide product over the trials of a fold.
        n_in, n_out = self.sizes[:2]
        blocks = [
            Block("weight0", (folds, n_in, trials, n_out), 2),
            Block("bias0", (folds, trials, n_out), 1),
        ]
        for layer in range(1, self.depth + 1):
            n_in, n_out = self.sizes[layer : layer + 2]
            sides = None
            if layer < self.depth:
                # muon needs the true sides of each trial's hidden matrices
                sides = tuple(max(units[layer - 1 : layer + 1]) for units in widths)
            weight_shape = (folds, trials, n_in, n_out)
            bias_shape = (folds, trials, 1, n_out)
            blocks.append(Block(f"weight{layer}", weight_shape, 1, sides))
            blocks.append(Block(f"bias{layer}", bias_shape, 1))
        self.blocks = self.trained = Blocks(blocks)
        self.widest = max(self.sizes)
        self.mask = None
        if shape.present is not None:  # (F, 1, 1, K): -inf for classes that take no part
            mask = torch.where(shape.present, 0.0, -torch.inf).to(shape.dtype)
            self.mask = mask[:, None, None]

    def start(self) -> Tensor:
        """Return the initial parameters of all members in one flat buffer.

        All folds, and all trials with the same layer sizes, start with the same values, except that
        each replica has its own. The values follow the distribution of nn.Linear for the fan-in
        without padding.
        """
        flat = torch.zeros(self.blocks.size, dtype=self.shape.dtype)
        views = self.blocks.by_member(flat)
        n_splits = self.shape.folds // self.shape.replicas
        for replica, seed in enumerate(self.shape.seeds(self.seed)[::n_splits]):
            folds = slice(replica * n_splits, (replica + 1) * n_splits)
            for c, config in enumerate(self.configs):
                for layer, (n_in, n_out) in enumerate(self._true_sizes(config)):
                    draw = _start_values(seed, layer, n_in, n_out).to(flat.dtype)
                    weight = draw[: n_out * n_in].view(n_out, n_in).T
                    views[f"weight{layer}"][folds, c, :n_in, :n_out] = weight
                    views[f"bias{layer}"][folds, c, ..., :n_out] = draw[n_out * n_in :]
        return flat.to(self.shape.device)

    def _true_sizes(self, config: Config) -> list[tuple[int, int]]:
        """Return the sizes (inputs, outputs) of each layer of a trial's network, without
        padding."""
        hidden = hidden_widths(config) if self.depth else ()
        sizes = [self.shape.n_features, *hidden, self.shape.n_outputs]
        return list(pairwise(sizes))

    def targets(self, y: Tensor) -> Tensor:
        """Return the training targets (V, n, K): class codes (n,) become one-hot rows, and values
        (F, n) become a column."""
        dtype = self.shape.dtype
        if y.is_floating_point():
            return y[..., None].to(dtype)
        return functional.one_hot(y, self.shape.n_outputs).to(dtype)[None]

    def with_configs(self, configs: Sequence[Config]) -> "StackedMLP":
        return StackedMLP(
            self.kind,
            configs,
            self.shape,
            seed=self.seed,
            loss=self.loss,
            loss_number=self.loss_number,
        )

    def differentiate_statistics(self) -> tuple[str, ...]:
        return ()

    def member(self, params: Params, fold: int, trial: int) -> nn.Module:
        config = self.configs[trial]
        sizes = (self.shape.n_features, self.shape.n_outputs)
        module_class, keys = _MODULES[self.kind]
        module = module_class(*sizes, **{key: config[key] for key in keys})
        module = module.to(self.shape.dtype)
        with torch.no_grad():
            for layer, (n_in, n_out) in enumerate(self._true_sizes(config)):
                # (F, D, C, H) -> (F, C, D, H) in the first layer
                weight = params[f"weight{layer}"].movedim(2 if layer == 0 else 1, 1)[fold, trial]
                linear = module.layers[layer]
                assert isinstance(linear, nn.Linear)
                linear.weight.copy_(weight[:n_in, :n_out].T)
                bias = params[f"bias{layer}"][fold, trial].flatten()
                linear.bias.copy_(bias[:n_out])
        return module.eval()

    def outputs(
        self, params: Params, fold: int, inputs: Sequence[Tensor], key: EvaluationKey | None = None
    ) -> Tensor:
        (x,) = inputs
        # (m, D) @ (D, C*H) -> (m, C*H)
        wide = torch.addmm(params["bias0"][fold].flatten(), x, params["weight0"][fold].flatten(1))
        z = wide.view(len(x), len(self.configs), -1).movedim(1, 0)  # (C, m, H)
        return self._later_layers(z, {name: views[fold] for name, views in params.items()})

    def _later_layers(self, z: Tensor, params: Params, keep: Sequence[Tensor] = ()) -> Tensor:
        """Return the outputs (P, B, K) of some members from the values (P, B, H) of their first
        layer, before its activation.

        The parameters of the later layers are (P, ...). ``keep`` has the dropout mask of each
        hidden layer, (C, B, H), or is empty without dropout.
        """
        for layer, activation in enumerate(self.activations, 1):
            h = getattr(functional, activation)(z)
            if keep:
                # (F, C, B, H) * (C, B, H)
                h = (h.view(-1, *keep[layer - 1].shape) * keep[layer - 1]).flatten(0, 1)
            # (P, B, H) @ (P, H, H) -> (P, B, H); K outputs in the last layer
            bias = params[f"bias{layer}"].view(len(h), 1, -1)
            z = torch.baddbmm(bias, h, params[f"weight{layer}"])
        return z

    def draws(self, batches: Batches, *, ahead: bool) -> MlpDraws | None:
        del ahead  # these draws are always made ahead
        if self.rates is None:
            return None
        rows = [shape.parts[0].rows for shape in batches.shapes]
        return MlpDraws(
            rows,
            layers=self.depth,
            width=self.hidden,
            seed=self.seed,
            device=self.shape.device,
        )

    def differentiable(
        self, params: Params, inputs: Sequence[Tensor], key: StepKey | None
    ) -> Tensor:
        (x,) = inputs
        # (P, B, D) @ (P, D, H) -> (P, B, H)
        z = torch.baddbmm(params["bias0"].view(len(x), 1, -1), x, params["weight0"])
        if self.rates is None or key is None:
            return self._later_layers(z, params)
        # one draw (B, H) for all members; each trial compares it with its own rate
        shape = (x.shape[1], self.hidden)
        draws = [dropout_draw(self.seed, key, layer, *shape) for layer in range(self.depth)]
        return self._later_layers(z, params, self._keep(torch.stack(draws).to(z.device)))

    def row_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        if not self.shape.regression or self.loss == "mse":
            return row_losses(outputs, y)
        loss = LOSSES[self.loss]
        number = outputs.new_tensor([self.loss_number])
        return loss.rows(outputs, y, **dict.fromkeys(loss.arguments, number))

    def layers(self) -> dict[str, int]:
        layers = {}
        for layer in range(self.depth + 1):
            layers[f"weight{layer}"] = layer
            layers[f"bias{layer}"] = layer
        return layers

    def gradient(self, params: Params, batch: Batch, grads: Params) -> None:
        with torch.enable_grad():
            weights = {name: view.detach().requires_grad_() for name, view in params.items()}
            outputs = self._training_outputs(weights, batch)
        slope = outputs.detach().clone()
        if self.mask is not None:
            slope.add_(self.mask)
        # The members of a fold share their targets, or each trial has its own.
        y = batch.y.view(self.shape.folds, -1, *batch.y.shape[1:])  # (F, 1 or C, B, K)
        if self.shape.regression:
            number_slope_(slope, y, batch.share, loss=self.loss, number=self.loss_number)
        else:
            cross_entropy_slope_(slope, y, batch.share)
        slopes = torch.autograd.grad(outputs, list(weights.values()), slope)
        torch._foreach_copy_([grads[name] for name in weights], slopes)

    def _training_outputs(self, params: Params, batch: Batch) -> Tensor:
        """Return the outputs (F, C, B, K) of a minibatch, with dropout."""
        folds = self.shape.folds
        rows = batch.x.shape[1]
        weight = params["weight0"]  # (F, D, C, H)
        bias = params["bias0"]  # (F, C, H)
        if len(batch.x) == folds:
            # All trials of a fold train on the same rows: one wide product for each fold.
            # (F, B, D) @ (F, D, C*H) -> (F, B, C*H)
            wide = torch.baddbmm(bias.flatten(1)[:, None], batch.x, weight.flatten(2))
            z = wide.view(folds, rows, len(self.configs), -1).movedim(2, 1).flatten(0, 1)
        else:
            # (P, B, D) @ (P, D, H) -> (P, B, H)
            weight = weight.movedim(2, 1).flatten(0, 1)
            z = torch.baddbmm(bias.flatten(0, 1)[:, None], batch.x, weight)
        keep: Sequence[Tensor] = ()
        if self.rates is not None:
            assert isinstance(batch.draws, Tensor)
            keep = self._keep(batch.draws)
        later = {name: view.flatten(0, 1) for name, view in params.items()}
        outputs = self._later_layers(z, later, keep)
        return outputs.view(folds, -1, *outputs.shape[1:])

    def _keep(self, draws: Tensor) -> Sequence[Tensor]:
        """Return the dropout mask (C, B, H) of each layer for draws (layers, B, H).

        The mask is 1 / (1 - p) for each kept unit, and 0 for each dropped unit.
        """
        assert self.rates is not None
        keep = draws[:, None] >= self.rates
        return (keep / self.keep_rates).unbind()
