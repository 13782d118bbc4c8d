"""The MLP of all members as stacked tensors, with a gradient written by hand instead of autograd.

A member is one trial on one fold. The gradient needs no autograd graph and skips the gradient of
the input. The members of a fold read the same rows, so the first layer is one wide product per
fold: (B, D) x (D, C*H). Its weights therefore have axes (F, D, C, H). The other layers are batched
products over members. Narrow layers are padded with units that have zero weights on both sides. The
activations map 0 to 0, so these units get a zero gradient and stay zero.

Axes: F folds, C trials, P = F*C members (fold-major), B rows, H width, K outputs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.engine.dropout import MlpDraws, dropout_draw
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
from gputune.seeding import stream
from gputune.types import Config, EvaluationKey, Params, StepKey

aten = torch.ops.aten

_SLOPES = {
    "tanh": (aten.tanh_backward, True),
    "gelu": (aten.gelu_backward, False),
    "silu": (aten.silu_backward, False),
}
"""Maps each activation to PyTorch's backward function and a flag. The backward function reads the
output of the activation if the flag is True, otherwise the input of the activation."""


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
        self._workspaces: dict[int, _Workspace] = {}

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

    def with_rates(self, configs: Sequence[Config]) -> "StackedMLP":
        """Return the networks of the same trials with other ``RATES``. All other values of the
        configurations must be equal."""
        networks = copy(self)
        networks.configs = tuple(configs)
        return networks

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
        trials = len(self.configs)
        # (m, D) @ (D, C*H) -> (m, C*H)
        bias = params["bias0"][fold].flatten()
        weight = params["weight0"][fold].flatten(1)
        wide = torch.addmm(bias, x, weight)
        h = wide.view(len(x), trials, -1).movedim(1, 0)  # (C, m, H)
        for layer in range(1, self.depth + 1):
            h = _activate(self.activations[layer - 1], h)
            # (C, m, H) @ (C, H, H) -> (C, m, H); K outputs in the last layer
            bias = params[f"bias{layer}"][fold]
            weight = params[f"weight{layer}"][fold]
            h = torch.baddbmm(bias, h, weight)
        return h

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
        (h,) = inputs
        for layer in range(self.depth + 1):
            if layer:
                h = getattr(functional, self.activations[layer - 1])(h)
                if self.rates is not None and key is not None:
                    # one draw (B, H) for all members; each trial compares it with its own rate
                    draw = dropout_draw(self.seed, key, layer - 1, *h.shape[1:])
                    keep = h.new_empty((len(self.configs), *h.shape[1:]))
                    self._keep_units(draw.to(h.device), keep, layer - 1)
                    # (F, C, B, H) * (C, B, H)
                    h = h.view(-1, *keep.shape) * keep
                    h = h.flatten(0, 1)
            # (P, B, H) @ (P, H, H) -> (P, B, H); D inputs in the first layer, K outputs in the last
            bias = params[f"bias{layer}"].view(len(h), 1, -1)
            h = torch.baddbmm(bias, h, params[f"weight{layer}"])
        return h

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
        rows = batch.x.shape[1]
        if rows not in self._workspaces:
            self._workspaces[rows] = _Workspace(self, rows)
        workspace = self._workspaces[rows]
        self._forward(params, batch, workspace)
        if self.mask is not None:
            workspace.out.add_(self.mask)
        # The members of a fold share their targets, or each trial has its own.
        y = batch.y.view(self.shape.folds, -1, *batch.y.shape[1:])  # (F, 1 or C, B, K)
        if self.shape.regression:
            number_slope_(workspace.out, y, batch.share, loss=self.loss, number=self.loss_number)
        else:
            cross_entropy_slope_(workspace.out, y, batch.share)
        self._backward(params, batch, workspace, grads)

    def _forward(self, params: Params, batch: Batch, workspace: "_Workspace") -> None:
        """Compute the outputs (F, C, B, K) of a minibatch, and store the tensors that the backward
        pass needs."""
        z = self._first_layer(params, batch, workspace)  # (F, C, B, H)
        if self.rates is not None:
            assert isinstance(batch.draws, Tensor)
            # (layers, 1, B, H) against the rates (layers, C, 1, 1)
            self._keep_units(batch.draws[:, None], workspace.keep)
        for layer in range(1, self.depth + 1):
            h = _activate(self.activations[layer - 1], z, out=workspace.active[layer - 1])
            if self.rates is not None:
                keep = workspace.keep[layer - 1]
                h = torch.mul(h, keep, out=workspace.dropped[layer - 1])
            z = workspace.out if layer == self.depth else workspace.linear[layer]
            weight = params[f"weight{layer}"].flatten(0, 1)
            bias = params[f"bias{layer}"].flatten(0, 1)
            # (P, B, H) @ (P, H, H) -> (P, B, H); K outputs in the last layer
            torch.baddbmm(bias, h.flatten(0, 1), weight, out=z.flatten(0, 1))

    def _first_layer(self, params: Params, batch: Batch, workspace: "_Workspace") -> Tensor:
        """Compute the first layer (F, C, B, H). If the members of a fold share their rows, one wide
        matrix product per fold is enough."""
        weight = params["weight0"]  # (F, D, C, H)
        bias = params["bias0"]  # (F, C, H)
        z = workspace.linear[0]
        if self._shares_rows(batch):
            weight = weight.flatten(2)
            bias = bias.flatten(1)[:, None]
            # (F, B, D) @ (F, D, C*H) -> (F, B, C*H)
            torch.baddbmm(bias, batch.x, weight, out=workspace.wide)
            z = workspace.by_trial
        elif z.is_cuda:
            # Copying the weights costs less than launching an operation for each fold.
            weight = weight.movedim(2, 1).flatten(0, 1)
            bias = bias.flatten(0, 1)[:, None]
            # (P, B, D) @ (P, D, H) -> (P, B, H)
            torch.baddbmm(bias, batch.x, weight, out=z.flatten(0, 1))
        else:
            x = batch.x.view(*z.shape[:2], *batch.x.shape[1:])  # (F, C, B, D)
            for f in range(self.shape.folds):
                of_fold = weight[f].movedim(1, 0)
                # (C, B, D) @ (C, D, H) -> (C, B, H)
                torch.baddbmm(bias[f][:, None], x[f], of_fold, out=z[f])
        return z if self.depth else workspace.out.copy_(z)

    def _shares_rows(self, batch: Batch) -> bool:
        """Return whether all trials of a fold train on the same minibatch, so that x is (F, B,
        D)."""
        return len(batch.x) == self.shape.folds

    def _keep_units(self, draw: Tensor, keep: Tensor, layer: int | slice = slice(None)) -> None:
        """Fill the dropout mask ``keep`` with 1/(1-p) for each kept unit and 0 for each dropped unit.

        The mask is (C, B, H) for one hidden layer, or (layers, C, B, H) for all of them.
        """
        assert self.rates is not None
        torch.ge(draw, self.rates[layer], out=keep).div_(self.keep_rates[layer])

    def _backward(
        self, params: Params, batch: Batch, workspace: "_Workspace", grads: Params
    ) -> None:
        """Compute the gradients of all parameters from ``workspace.out``, the derivative of the
        loss in the outputs."""
        slope = workspace.out  # (F, C, B, width of this layer)
        below, spare = workspace.slopes
        shares_rows = self._shares_rows(batch)
        for layer in range(self.depth, 0, -1):
            active = workspace.active[layer - 1]
            h = active if self.rates is None else workspace.dropped[layer - 1]
            flat = slope.flatten(0, 1)
            weight = params[f"weight{layer}"].flatten(0, 1)
            weight_grad = grads[f"weight{layer}"].flatten(0, 1)
            bias_grad = grads[f"bias{layer}"].flatten(0, 1)
            # (P, H, B) @ (P, B, H) -> (P, H, H)
            torch.bmm(h.flatten(0, 1).mT, flat, out=weight_grad)
            torch.sum(flat, 1, keepdim=True, out=bias_grad)
            # (P, B, H) @ (P, H, H) -> (P, B, H)
            torch.bmm(flat, weight.mT, out=below.flatten(0, 1))
            if self.rates is not None:
                below.mul_(workspace.keep[layer - 1])
            if layer == 1 and shares_rows:
                z = slope = workspace.by_trial
            else:
                z = workspace.linear[layer - 1]
                slope = below
            activation = self.activations[layer - 1]
            if activation == "relu":
                aten.threshold_backward.grad_input(below, active, 0, grad_input=slope)
            else:
                kernel, takes_value = _SLOPES[activation]
                kernel.grad_input(below, active if takes_value else z, grad_input=slope)
            # The buffers swap: a slope must not overwrite the slope that it is computed from.
            below, spare = spare, below
        if self.depth == 0:
            slope = workspace.by_trial.copy_(workspace.out)
        weight_grad = grads["weight0"]  # (F, D, C, H)
        bias_grad = grads["bias0"]  # (F, C, H)
        if shares_rows:
            # (F, D, B) @ (F, B, C*H) -> (F, D, C*H)
            torch.bmm(batch.x.mT, workspace.wide, out=weight_grad.flatten(2))
            torch.sum(workspace.wide, 1, out=bias_grad.flatten(1))
            return
        if slope.is_cuda:
            # (P, D, B) @ (P, B, H) -> (P, D, H)
            product = torch.bmm(batch.x.mT, slope.flatten(0, 1))
            by_trial = product.view(*slope.shape[:2], *product.shape[1:])  # (F, C, D, H)
            weight_grad.copy_(by_trial.movedim(1, 2))
        else:
            x = batch.x.view(*slope.shape[:2], *batch.x.shape[1:])  # (F, C, B, D)
            for f in range(self.shape.folds):
                # (C, D, B) @ (C, B, H) -> (C, D, H)
                product = torch.bmm(x[f].mT, slope[f])
                weight_grad[f].copy_(product.movedim(0, 1))
        torch.sum(slope, 2, out=bias_grad)


class _Workspace:
    """The intermediate tensors of one training step with B rows for each member.

    All steps with B rows use the same tensors, so a step allocates no memory.
    """

    def __init__(self, net: StackedMLP, rows: int) -> None:
        folds = net.shape.folds
        trials = len(net.configs)
        first = net.sizes[1]

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=net.shape.dtype, device=net.shape.device)

        def for_layers(layers: int, width: int = net.hidden) -> list[Tensor]:
            return [empty(folds, trials, rows, width) for _ in range(layers)]

        # (F, B, C*H)
        self.wide = empty(folds, rows, trials * first)
        # (F, C, B, H)
        self.by_trial = self.wide.view(folds, rows, trials, first).movedim(2, 1)
        self.linear = for_layers(max(1, net.depth), first)
        # relu and tanh have a gradient that follows from their value, so the value may overwrite
        # the argument.
        self.active = []
        for activation, linear in zip(net.activations, self.linear, strict=False):
            in_place = activation in ("relu", "tanh")
            self.active.append(linear if in_place else empty(*linear.shape))
        dropping = 0 if net.rates is None else net.depth
        self.dropped = for_layers(dropping)
        self.keep = empty(dropping, trials, rows, net.hidden)
        (self.out,) = for_layers(1, net.shape.n_outputs)
        self.slopes = for_layers(2)


def _activate(name: str, z: Tensor, out: Tensor | None = None) -> Tensor:
    """Apply an activation function to ``z`` and return the result, in the tensor ``out`` if the
    caller passes one. The result is contiguous for any layout of ``z``."""
    if out is None:
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
    if name == "relu":
        return torch.clamp_min(z, 0, out=out)
    getattr(aten, name).out(z, out=out)
    return out
