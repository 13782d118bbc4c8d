"""What the engine asks of a model: the stacked start, one gradient, the outputs of one fold, one member back.

And several modules of one study as one, an ensemble: the weighted mean of what they predict.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.data.dataset import Dataset
from gputune.optimizers.blocks import Blocks
from gputune.population.batches import Batch, Batches
from gputune.population.population import ModelKind
from gputune.types import Config, Params, Precision, Task

_CPU = torch.device("cpu")

InputKind = tuple[tuple[int, ...], torch.dtype]
"""The shape of a row of an input, and its dtype."""


@dataclass(frozen=True)
class Shape:
    """What the stacked tensors of a chunk have in common."""

    n_features: int
    n_outputs: int
    folds: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = _CPU
    regression: bool = False
    present: Tensor | None = None  # (F, K) bool: classes that take part in a fold, None when all do
    input_shape: tuple[int, ...] | None = None  # of a row of the first input, None: (n_features,)
    inputs: tuple[InputKind, ...] = ()  # of all inputs; (): of a table
    names: tuple[str, ...] | None = None  # of the inputs, where they are passed as keywords
    precision: Precision = "full"  # of what a module computes while it trains; parameters and updates are of ``dtype``
    feature_groups: tuple[int, ...] | None = None  # of a table's features, (D,): ``Layout.feature_groups``
    rows: Callable[[int], tuple[tuple[Tensor, ...], Tensor]] | None = None  # training rows and targets of a fold

    @staticmethod
    def of(data: Dataset, precision: Precision = "full") -> "Shape":
        """Return the shape of members that train on some data; scaled bytes come to them as floats."""
        kinds = zip(data.inputs, data.scaling, strict=True)
        same = ("n_features", "n_outputs", "dtype", "device", "present", "names", "feature_groups")
        return Shape(
            **{name: getattr(data, name) for name in same},
            folds=data.n_folds,
            regression=data.task == "regression",
            input_shape=tuple(data.inputs[0].shape[2:]),
            inputs=tuple((tuple(x.shape[2:]), data.dtype if scaled else x.dtype) for x, scaled in kinds),
            precision=precision,
            rows=data.training_rows,
        )


class Draws(Protocol):
    """The random draws of a model's steps, made ahead of them on the device."""

    def fill(self, epoch: int, step: int) -> None:
        """See that the draws of a step are there."""

    def at(self, step: Tensor, rows: int) -> Tensor | tuple[Tensor, ...]:
        """Return the draws of the step that a counter on the device says, for so many rows."""


class Network(Protocol):
    """F x C members of one shape. No method mixes members."""

    kind: ModelKind
    shape: Shape
    configs: tuple[Config, ...]
    blocks: Blocks  # all that a member consists of: the trained parameters, then the buffers that training changes
    trained: Blocks  # the trained parameters alone, ``flat[:trained.size]``: what has gradients and moments
    exact: bool  # whether minibatches must come without padded rows
    least_rows: int  # rows that a minibatch needs; a last one with fewer is left out
    alone: bool  # whether an output in evaluation mode depends on its own row alone
    widest: int  # most numbers that a row has in a layer of one member
    scheduled: tuple[str, ...]  # buffers of each member's rate of a dropout, (F, C), written before every step

    def start(self) -> Tensor:
        """Return the flat buffer of the members' start."""

    def targets(self, y: Tensor) -> Tensor:
        """Return the training target in the form that ``gradient`` reads, (V, n, ...); V is 1 or F."""

    def draws(self, batches: Batches, *, ahead: bool) -> Draws | None:
        """Return the draws that ``gradient`` reads, None where there are none, and where it draws them itself.

        With ``ahead`` it must not. Raises TraceError where it does all the same.
        """

    def gradient(self, params: Params, batch: Batch, grads: Params) -> None:
        """Write the gradient of every member's minibatch loss into ``grads``; buffers in ``params`` go on by a step."""

    def outputs(self, params: Params, fold: int, inputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs (C, m, K) of one fold's members on rows (m, ...) of each input, as in evaluation mode."""

    def differentiable(self, params: Params, inputs: Sequence[Tensor], key: tuple[int, int] | None) -> Tensor:
        """Return the outputs (P, B, K) of whole folds' members on rows (P, B, ...) of each input, twice differentiable.

        ``params`` are (P, ...), P = F*C for some folds F. ``key`` is that of the minibatch, None in evaluation mode.
        """

    def row_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the losses (F, C, B) of outputs (F, C, B, K) and targets (F, 1 or C, B, ...), twice differentiable."""

    def layers(self) -> dict[str, int]:
        """Return the layer of each parameter."""

    def subset(self, keep: list[int]) -> "Network":
        """Return the network of the trials ``keep`` (positions along C) alone."""

    def member(self, params: Params, fold: int, trial: int) -> nn.Module:
        """Return one member as a plain module in evaluation mode, on the CPU."""


def call_module(module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str] | None = None) -> Tensor:
    """Return what a module makes of its inputs, passed in order or by their names."""
    result: Tensor = module(*inputs) if names is None else module(**dict(zip(names, inputs, strict=True)))
    return result


def first_output(outputs: Any) -> Tensor:
    """Return what a module with several heads predicts: the first of its outputs, of a dict its first value."""
    several = tuple(outputs.values()) if isinstance(outputs, Mapping) else outputs
    first: Tensor = several[0] if isinstance(several, tuple | list) and several else outputs
    return first


def two_logits(outputs: Tensor) -> Tensor:
    """Return the logits (..., m, 2) of two classes of which the outputs (..., m, 1) are one logit z: 0 and z.

    Their softmax is the sigmoid of -z and of z, and their cross-entropy is the binary one of z.
    """
    return torch.cat([torch.zeros_like(outputs), outputs], -1)


def is_one_logit(outputs: Tensor, task: Task, axes: int) -> bool:
    """Whether outputs are one logit a row of two classes, behind so many ``axes``, with an axis of its own or none."""
    return task == "binary" and (outputs.dim() == axes or outputs.shape[-1] == 1)


def class_logits(outputs: Tensor, task: Task, axes: int) -> Tensor:
    """Return outputs with two logits a row where they are one of two classes, other outputs as they are."""
    return two_logits(outputs.reshape(*outputs.shape[:axes], 1)) if is_one_logit(outputs, task, axes) else outputs


def by_copy(y: Tensor, n_outputs: int, dtype: torch.dtype) -> Tensor:
    """Return targets (V, n, K) of an explicit gradient: class codes (n,) one-hot, or values (F, n) as a column."""
    if y.is_floating_point():
        return y[..., None].to(dtype)
    return torch.nn.functional.one_hot(y, n_outputs).to(dtype)[None]


class Ensemble(nn.Module):
    """The weighted mean of the probabilities of its members, as logits; of a regression that of their values.

    ``weights`` (M,) add up to 1. Shape: as each member, inputs -> (B, K); with ``columns``, a table's (B, D) of which
    each member reads those from its first to its end.
    """

    weights: Tensor

    def __init__(
        self, members: Sequence[nn.Module], weights: Sequence[float], task: Task, columns: Sequence[Sequence[int]] = ()
    ) -> None:
        super().__init__()
        self.columns = columns
        self.members = nn.ModuleList(members)
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float64))
        self.task = task

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        reads = [inputs] * len(self.members)
        if self.columns:
            reads = [(inputs[0][:, begin:end],) for begin, end in self.columns]
        outputs = torch.stack([first_output(member(*x, **named)) for member, x in zip(self.members, reads)])
        outputs = class_logits(outputs, self.task, 2)
        weights = self.weights.to(outputs.dtype).view(-1, *[1] * (outputs.dim() - 1))
        if self.task == "regression":
            return (weights * outputs).sum(0)
        if self.task == "multilabel":
            # log p - log (1 - p) of the mean probability p, both as sums in logarithms
            yes, no = ((weights.log() + functional.logsigmoid(sign * outputs)).logsumexp(0) for sign in (1, -1))
            return yes - no
        return (weights.log() + outputs.log_softmax(-1)).logsumexp(0)
