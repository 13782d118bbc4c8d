"""hypergradient() for the logistic regression: solved on all minibatches together, differentiated at its minimum."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.errors import DivergedError, InputError
from gputune.hypergradients.implicit import implicit_gradients
from gputune.hypergradients.result import HypergradientResult
from gputune.models import LogisticRegression
from gputune.solver.job import solved_module
from gputune.solver.solve import solve


def differentiate_minimum(
    module: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    valid: tuple[Tensor, Tensor],
    hyperparameters: Mapping[str, Any],
    *,
    memory: int | None,
) -> HypergradientResult:
    """Return the validation loss at the minimum of ``C * sum of losses + |W|^2 / 2`` and its derivative in C.

    The objective is that of sklearn.linear_model.LogisticRegression; computed in float64. Raises InputError where
    the problem is not that convex one, DivergedError where it has no minimum that could be reached.
    """
    C = _checked(module, loss, hyperparameters)
    if not all(isinstance(part, Tensor) for pair in (*batches, valid) for part in pair):
        raise InputError(
            "optimizer='exact' joins all minibatches and needs tensors, got another kind of x or y; make them with "
            "torch.from_numpy or torch.as_tensor."
        )
    x, y = (torch.cat(parts) for parts in zip(*batches))
    rows = torch.cat([x, valid[0]]).double()
    codes = _codes(torch.cat([y, valid[1]]), module)
    weights = torch.zeros(1, len(rows), dtype=torch.float64, device=rows.device)
    weights[:, : len(x)] = 1.0
    values = weights.new_tensor([C]), weights.new_zeros(1)
    solution = solve(
        rows[None], codes, weights, C=values[0], l1_ratio=values[1], n_classes=max(2, _outputs(module))
    )
    if not bool(solution.converged):
        raise DivergedError(
            f"the logistic regression with C={C:g} has no minimum that could be reached; choose a smaller C, or scale "
            "the inputs."
        )
    places = [torch.arange(len(x), len(rows), device=rows.device)]
    found = implicit_gradients(
        solution, rows[None], codes, weights, places, C=values[0], l1_ratio=values[1], memory=memory
    )
    slope = found.gradient[0]
    return HypergradientResult(
        value=float(found.value),
        gradient={"C": slope / C},
        log_gradient={"C": slope},
        parameters=dict(solved_module(solution, 0).named_parameters()),
        ratio=0.0,
        mode="implicit",
        reason="asked for; the derivative at the minimum of a convex problem, in which no step is taken",
    )


def _outputs(module: nn.Module) -> int:
    assert isinstance(module, LogisticRegression)
    outputs: int = module.n_outputs
    return outputs


def _checked(module: nn.Module, loss: object, hyperparameters: Mapping[str, Any]) -> float:
    """Return C, or say why there is no convex problem."""
    if not isinstance(module, LogisticRegression) or module.n_outputs < 2:
        raise InputError(
            "implicit differentiation (optimizer='exact') needs the minimum of a convex problem: module must be a "
            f"gputune.models.LogisticRegression of at least two outputs, got {type(module).__name__}; train it with "
            "another optimizer, for example 'adamw', and mode='reverse'."
        )
    if loss is not functional.cross_entropy and not _plain(loss):
        raise InputError(
            "loss must be torch.nn.functional.cross_entropy where optimizer='exact' solves the logistic regression, "
            f"got {loss!r}; train it with another optimizer for other losses."
        )
    if set(hyperparameters) != {"C"}:
        raise InputError(
            f"hyperparameters: optimizer='exact' has C alone, got {', '.join(map(str, hyperparameters)) or 'none'}; "
            'for example {"C": 1.0}.'
        )
    try:
        C = float(hyperparameters["C"])
    except (TypeError, ValueError, RuntimeError):
        C = -1.0
    if not 0 < C < float("inf"):
        raise InputError(f"hyperparameters['C'] must be one finite number > 0, got {hyperparameters['C']!r}.")
    return C


def _plain(loss: object) -> bool:
    """Whether it is the module of the plain cross-entropy."""
    return isinstance(loss, nn.CrossEntropyLoss) and (
        (loss.weight, loss.label_smoothing, loss.reduction, loss.ignore_index) == (None, 0.0, "mean", -100)
    )


def _codes(y: Tensor, module: nn.Module) -> Tensor:
    if y.is_floating_point() or y.dim() != 1 or int(y.min()) < 0 or int(y.max()) >= _outputs(module):
        raise InputError(
            f"y must be class codes 0 .. {_outputs(module) - 1}, one integer a row, where optimizer='exact', got "
            f"{y.dtype} of shape {tuple(y.shape)} with values {y.min().item()} .. {y.max().item()}."
        )
    return y.long()
