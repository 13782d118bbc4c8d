"""hypergradient(): the derivative of a validation loss in the hyperparameters of the training before it."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gputune.engine.entry import waited_for
from gputune.engine.plan import parse_memory
from gputune.errors import InputError
from gputune.hypergradients.arguments import (
    check_hyperparameters,
    check_optimizer,
    default_tables,
)
from gputune.hypergradients.convex import differentiate_minimum
from gputune.hypergradients.curvature import twice_differentiable
from gputune.hypergradients.differences import default_width, differences
from gputune.hypergradients.inner import Tables
from gputune.hypergradients.memory import Need, free_bytes, measure
from gputune.hypergradients.module_training import Loss, ModuleTraining, Pair, check_module
from gputune.hypergradients.result import HypergradientResult
from gputune.hypergradients.unrolled import Hypergradients, forward, reverse
from gputune.seeding import GLOBAL_DRAWS
from gputune.text import size_words

Mode = Literal["auto", "reverse", "forward", "fd"]


@waited_for()
@torch.inference_mode(False)
def hypergradient(
    module: nn.Module,
    loss: Loss,
    batches: Iterable[Pair],
    valid: Pair,
    *,
    hyperparameters: Mapping[str, Any],
    optimizer: str,
    mode: Mode = "auto",
    truncate: int | None = None,
    checkpoint: bool = False,
    seed: int | None = None,
    fixed: Mapping[str, Any] | None = None,
    memory: int | str | None = None,
) -> HypergradientResult:
    """Train ``module`` on ``batches`` and differentiate its validation loss in the hyperparameters of that training.

    module           any ``nn.Module`` without running statistics; it is left as it was
    loss             ``loss(module(x), y)`` -> one number, for example ``torch.nn.functional.cross_entropy``
    batches          the minibatches (x, y), one step of the optimizer each
    valid            the validation pair (x, y)
    hyperparameters  some of "lr", "momentum", "weight_decay", "beta1", "beta2", each a number, (S,) or (S, L): segment
                     s covers the steps from floor(s*T/S) on, layer l is the l-th submodule that owns parameters;
                     those left out have the value of ``fixed``, or their default one (a momentum of 0 for sgd, 0.9 for
                     momentum and nesterov)
    optimizer        "sgd", "momentum", "nesterov", "adam" or "adamw", as ``torch.optim`` has them; "exact" solves a
                     ``gputune.models.LogisticRegression`` on all minibatches together, whose hyperparameter is "C", and
                     differentiates at the minimum (implicit differentiation), whatever the mode
    mode             "reverse" (memory grows with the steps, one price for any number of hyperparameters), "forward"
                     (memory independent of the steps, a price for each), "fd" (finite differences: two more trainings
                     for each), "auto" (one of the first two, by their need of memory)
    truncate         reverse mode through the last so many steps only: cheaper, and biased towards small rates
    checkpoint       reverse mode that trains twice and remembers every sqrt(T)-th step
    seed             of dropout and other draws, the same in every training; None: drawn from torch's generator
    fixed            values, in the same shapes, of hyperparameters that are not differentiated
    memory           bytes, or text such as "8GB", that may be used; None: most of what is free

    Warns (RuntimeWarning) where training is chaotic, so that the gradient is noise. Raises InputError for bad input,
    for an operation that cannot be differentiated twice, and where the memory does not suffice. Second derivatives are
    tried on the first minibatch: in float64 against measured ones, in lower precision for symmetry alone, which a
    .detach() in the loss passes unseen. Sources: Maclaurin et al. (2015), Franceschi et al. (2017); Bengio (2000) for
    the implicit derivative.
    """
    check_module(module)
    if not callable(loss):
        raise InputError(f"loss must be a function loss(module(x), y), got {loss!r}.")
    batches = _checked_batches(batches)
    _check_pair("valid", valid)
    _check_choice(mode, truncate, checkpoint)
    budget = parse_memory(memory)
    if optimizer == "exact":
        return differentiate_minimum(module, loss, batches, valid, hyperparameters, memory=budget)
    rule, momentum = check_optimizer(optimizer)
    if seed is None:
        with GLOBAL_DRAWS:
            seed = int(torch.randint(2**62, ()))
    training = ModuleTraining(module, loss, batches, valid, seed=seed)
    start = training.start()
    given = check_hyperparameters(
        hyperparameters, rule, steps=len(batches), layers=training.layers, like=start
    )
    held = _held(fixed, hyperparameters, rule, training, start)
    tables = {**default_tables(rule, momentum, start), **held, **given}
    choice, result = _differentiate(training, rule, tables, tuple(given), mode, truncate, checkpoint, budget)
    shapes = {name: torch.as_tensor(value).shape for name, value in hyperparameters.items()}
    gradient = {name: table.view(shapes[name]) for name, table in result.gradients.items()}
    found = HypergradientResult(
        value=float(result.value),
        gradient=gradient,
        log_gradient={name: slope * given[name].view(shapes[name]) for name, slope in gradient.items()},
        parameters={name: w.detach().clone() for name, w in training.parameters(result.weights).items()},
        ratio=float(result.ratio),
        mode=choice.mode,
        reason=choice.reason,
    )
    _warn(found)
    return found


def _warn(found: HypergradientResult) -> None:
    """Warn of a result that says nothing."""
    if not math.isfinite(found.value):
        text = (
            f"the validation loss is {found.value}: look for NaN in the minibatches and in valid, or lower the "
            "learning rate."
        )
    elif found.chaotic:
        text = (
            f"training is chaotic: it amplifies a small change {found.ratio:.3g} times, and the gradient is noise; "
            "lower the learning rate, train for fewer steps, or look at the trend with a wide finite difference."
        )
    else:
        return
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def _held(
    fixed: Mapping[str, Any] | None,
    searched: Mapping[str, Any],
    rule: str,
    training: ModuleTraining,
    like: Tensor,
) -> dict[str, Tensor]:
    """Return the tables of the hyperparameters that are not differentiated."""
    if not fixed:
        return {}
    twice = sorted(set(fixed) & set(searched))
    if twice:
        raise InputError(
            f"fixed must have other names than hyperparameters, got {', '.join(twice)} in both; leave it out of one."
        )
    return check_hyperparameters(
        fixed, rule, steps=training.steps, layers=training.layers, like=like, argument="fixed"
    )


@dataclass(frozen=True)
class _Choice:
    mode: Literal["reverse", "forward", "fd"]
    checkpoint: bool
    reason: str


def _differentiate(
    training: ModuleTraining,
    rule: str,
    tables: Tables,
    wanted: tuple[str, ...],
    mode: Mode,
    truncate: int | None,
    checkpoint: bool,
    budget: int | None,
) -> tuple[_Choice, Hypergradients]:
    training.check_graph()
    if mode == "fd":
        _check_above_zero(tables, wanted)
        width = default_width(training.start().dtype)
        choice = _Choice(
            "fd", False, f"asked for; steps of {width:.1e} in the logarithm (logit of momentum and betas)"
        )
        return choice, differences(training, rule, tables, wanted, width=width)
    with twice_differentiable(training):
        need = measure(training, rule, tables)
        number = sum(tables[name][0].numel() for name in wanted)
        choice = _choose(
            mode, need, budget or free_bytes(training.device), training.steps, number, truncate, checkpoint
        )
        if choice.mode == "forward":
            return choice, forward(training, rule, tables, wanted)
        return choice, reverse(
            training, rule, tables, wanted, truncate=truncate, checkpoint=choice.checkpoint
        )


def _choose(
    mode: Mode, need: Need, budget: int, steps: int, number: int, truncate: int | None, checkpoint: bool
) -> _Choice:
    """Return the mode: the one asked for where it fits, or the fastest that fits."""
    back = steps if truncate is None else min(truncate, steps)
    whole, blocks, tangents = need.reverse(back), need.checkpointed(back), need.forward(number)
    reversible = mode == "reverse" or truncate is not None or checkpoint
    sizes = (
        f"reverse needs about {size_words(whole)} for {back} steps, checkpointed {size_words(blocks)}, forward "
        f"{size_words(tangents)} for {number} hyperparameter{'' if number == 1 else 's'}; {size_words(budget)} may be "
        "used"
    )
    if mode == "forward" or (not reversible and number == 1 and tangents <= budget):
        chosen = _Choice(
            "forward",
            False,
            "asked for"
            if mode == "forward"
            else "one hyperparameter, whose tangent is no slower than reverse",
        )
    elif reversible:
        chosen = _Choice("reverse", checkpoint, "asked for")
    elif whole <= budget:
        chosen = _Choice("reverse", False, "one price for all hyperparameters")
    elif blocks <= budget:
        chosen = _Choice("reverse", True, "checkpointed, since the whole does not fit")
    else:
        chosen = _Choice("forward", False, "reverse does not fit")
    needed = tangents if chosen.mode == "forward" else blocks if chosen.checkpoint else whole
    if needed > budget:
        fitting = [
            word
            for word, size in (("checkpoint=True", blocks), ("mode='forward'", tangents))
            if size <= budget
        ]
        if need.longest(budget):
            fitting.append(f"truncate={need.longest(budget)}")
        raise InputError(
            f"memory does not suffice for mode={chosen.mode!r}: {sizes}. Use "
            f"{''.join(word + ' (fits), ' for word in fitting)}smaller minibatches or a larger memory=."
        )
    return replace(chosen, reason=f"{chosen.reason}; {sizes}")


def _checked_batches(batches: Iterable[Pair]) -> list[Pair]:
    if not isinstance(batches, Iterable):
        raise InputError(f"batches must be the minibatches (x, y), got {type(batches).__name__}.")
    pairs = list(batches)
    if not pairs:
        raise InputError("batches must have at least one minibatch (x, y), got none.")
    for i, pair in enumerate(pairs):
        _check_pair(f"batches[{i}]", pair)
    return pairs


def _check_pair(name: str, pair: object) -> None:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        found = f"{len(pair)} values" if isinstance(pair, tuple | list) else type(pair).__name__
        raise InputError(f"{name} must be a pair (x, y), got {found}; put several inputs into one x.")


def _check_choice(mode: object, truncate: int | None, checkpoint: bool) -> None:
    if mode not in ("auto", "reverse", "forward", "fd"):
        raise InputError(f"mode must be 'auto', 'reverse', 'forward' or 'fd', got {mode!r}.")
    if truncate is not None and (isinstance(truncate, bool) or not isinstance(truncate, int) or truncate < 1):
        raise InputError(f"truncate must be a number of steps >= 1 or None, got {truncate!r}.")
    if not isinstance(checkpoint, bool):
        raise InputError(f"checkpoint must be True or False, got {checkpoint!r}.")
    if mode in ("forward", "fd") and (truncate is not None or checkpoint):
        raise InputError(
            f"truncate and checkpoint belong to reverse mode, got mode={mode!r}; leave them out, or use "
            "mode='reverse'."
        )


def _check_above_zero(tables: Tables, wanted: tuple[str, ...]) -> None:
    for name in wanted:
        if bool((tables[name] == 0).any()):
            raise InputError(
                f"hyperparameters[{name!r}] must be above 0 for mode='fd', which moves it in its logarithm, got "
                f"{tables[name].tolist()}; use mode='reverse' or 'forward'."
            )
