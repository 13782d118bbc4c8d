"""The public function hypergradient().

It differentiates a validation loss in the hyperparameters of the training that came before it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gputune.engine.plan import parse_memory
from gputune.engine.stop import waited_for
from gputune.errors import InputError, warn
from gputune.hypergradients.first_step import (
    HYPERPARAMETERS_OF,
    ExactMode,
    fastest_that_fits,
    free_bytes,
    measure,
    twice_differentiable,
)
from gputune.hypergradients.implicit import differentiate_minimum
from gputune.hypergradients.inner import (
    BETWEEN_0_AND_1,
    HypergradientResult,
    Hypergradients,
    InnerProblem,
)
from gputune.hypergradients.modes import default_width, differences, forward, reverse
from gputune.hypergradients.module_training import DataPair, Loss, ModuleTraining, check_module
from gputune.optimizers.rules import BETA1, BETA2
from gputune.seeding import GLOBAL_DRAWS
from gputune.text import count, size_words
from gputune.types import DEFAULT_LR, default_momentum, default_weight_decay

Mode = Literal["auto", "reverse", "forward", "fd"]


@waited_for()
@torch.inference_mode(False)
def hypergradient(
    module: nn.Module,
    loss: Loss,
    batches: Iterable[DataPair],
    valid: DataPair,
    *,
    hyperparameters: Mapping[str, object],
    optimizer: str,
    mode: Mode = "auto",
    truncate: int | None = None,
    checkpoint: bool = False,
    seed: int | None = None,
    fixed: Mapping[str, object] | None = None,
    memory: int | str | None = None,
) -> HypergradientResult:
    """Train ``module`` and differentiate its validation loss in the hyperparameters of that
    training.

    Second derivatives are tested on the first minibatch before training. In float64 they are
    compared with finite differences. In lower precision only their symmetry is tested, and this
    test does not notice a ``.detach()`` in the loss.

    Args:
        module: Any ``nn.Module`` whose only state is the running statistics of BatchNorm. The
            module itself is not changed.
        loss: A function ``loss(module(x), y)`` that returns one number, for example
            ``torch.nn.functional.cross_entropy``.
        batches: The minibatches (x, y). The optimizer takes one step for each of them.
        valid: The validation pair (x, y).
        hyperparameters: The hyperparameters to differentiate: some of "lr", "momentum",
            "weight_decay", "beta1" and "beta2". Each value is a number, or has shape (S,) or (S,
            L). Segment s of T steps begins at step floor(s*T/S). Layer l is the l-th submodule that
            owns parameters. A hyperparameter that is left out has its value from ``fixed``, or its
            default. The default momentum is 0 for "sgd" and 0.9 for "momentum" and "nesterov".
        optimizer: "sgd", "momentum", "nesterov", "adam" or "adamw", as in ``torch.optim``. "exact"
            solves a ``gputune.models.LogisticRegression`` on all minibatches together. Its only
            hyperparameter is "C", and it always uses implicit differentiation at the minimum, for
            any ``mode``.
        mode: "reverse" needs memory that grows with the number of steps; its time does not depend
            on the number of hyperparameters. "forward" needs memory that does not grow with the
            number of steps; its time grows with the number of hyperparameters. "fd" uses finite
            differences: two more trainings per hyperparameter. "auto" (the default) chooses
            "reverse" or "forward" by the memory that they need.
        truncate: Number of last steps that reverse mode differentiates through; None means all
            steps. Truncation is cheaper, but its result is biased towards small rates.
        checkpoint: If True, reverse mode stores only every sqrt(T)-th step and trains twice.
        seed: Seed of dropout and other random draws. Every training uses the same draws. None draws
            a seed from torch's generator.
        fixed: Values of hyperparameters that are not differentiated, in the same shapes as in
            ``hyperparameters``.
        memory: The memory that may be used, in bytes or as text such as "8GB". None means most of
            the free memory.

    Returns:
        A ``HypergradientResult``.

    Raises:
        InputError: An argument is invalid, an operation cannot be differentiated twice, or the
            memory does not suffice.

    Warns:
        RuntimeWarning: Training is chaotic, so the gradient is noise; or the validation loss is not
            finite.

    Sources: Maclaurin et al. (2015); Franceschi et al. (2017); Bengio (2000) for the implicit
    derivative.
    """
    check_module(module)
    batches = _check_data(loss, batches, valid)
    budget = parse_memory(memory)
    _check_mode(mode, truncate, checkpoint)
    if optimizer == "exact":
        return differentiate_minimum(module, loss, batches, valid, hyperparameters, memory=budget)
    rule, momentum = _check_optimizer(optimizer)
    if seed is None:
        with GLOBAL_DRAWS:
            seed = int(torch.randint(2**62, (), device="cpu"))
    training = ModuleTraining(module, loss, batches, valid, seed=seed)
    wanted, others = _check_tables(hyperparameters, fixed, rule, training)
    tables = _default_tables(rule, momentum, training.start()) | others | wanted
    problem = InnerProblem(training, rule, tables)
    training.check_graph()
    if mode == "fd":
        reason, slopes = _differences(problem, list(wanted))
    else:
        with twice_differentiable(training):
            exact, reason = _choose(
                problem, len(problem.columns(list(wanted))), mode, truncate, checkpoint, budget
            )
            if exact == "forward":
                mode = "forward"
                slopes = forward(problem, list(wanted))
            else:
                blocks = exact == "checkpointed"
                mode = "reverse"
                slopes = reverse(problem, list(wanted), truncate=truncate, checkpoint=blocks)
    shapes = {
        name: torch.as_tensor(value, device="cpu").shape for name, value in hyperparameters.items()
    }
    gradient = {name: slopes.gradients[name].view(shape) for name, shape in shapes.items()}
    logs = {name: slope * wanted[name].view(shapes[name]) for name, slope in gradient.items()}
    parameters = {
        name: w.detach().clone() for name, w in training.parameters(slopes.weights).items()
    }
    result = HypergradientResult(
        float(slopes.value), gradient, logs, parameters, float(slopes.ratio), mode, reason
    )
    _warn_of_noise(result)
    return result


def _check_data(loss: object, batches: Iterable[DataPair], valid: DataPair) -> list[DataPair]:
    """Return the minibatches as a list, after a check of the loss and of every pair (x, y)."""
    if not callable(loss):
        raise InputError(f"loss must be a function loss(module(x), y), got {loss!r}.")
    if not isinstance(batches, Iterable):
        raise InputError(f"batches must be the minibatches (x, y), got {type(batches).__name__}.")
    pairs = list(batches)
    if not pairs:
        raise InputError("batches must have at least one minibatch (x, y), got none.")
    for name, pair in (
        *((f"batches[{i}]", pair) for i, pair in enumerate(pairs)),
        ("valid", valid),
    ):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            got = f"{len(pair)} values" if isinstance(pair, tuple | list) else type(pair).__name__
            raise InputError(
                f"{name} must be a pair (x, y), got {got}; put several inputs into one x."
            )
    return pairs


def _check_mode(mode: object, truncate: object, checkpoint: object) -> None:
    if mode not in get_args(Mode):
        raise InputError(f"mode must be 'auto', 'reverse', 'forward' or 'fd', got {mode!r}.")
    if truncate is not None and (
        isinstance(truncate, bool) or not isinstance(truncate, int) or truncate < 1
    ):
        raise InputError(f"truncate must be a number of steps >= 1 or None, got {truncate!r}.")
    if not isinstance(checkpoint, bool):
        raise InputError(f"checkpoint must be True or False, got {checkpoint!r}.")
    if mode in ("forward", "fd") and (truncate is not None or checkpoint):
        raise InputError(
            f"truncate and checkpoint belong to reverse mode, got mode={mode!r}; leave them out, "
            "or use mode='reverse'."
        )


def _check_optimizer(optimizer: object) -> tuple[str, float]:
    """Return the name of the update rule and its default momentum.

    "momentum" is the rule sgd with a momentum of 0.9.
    """
    if optimizer == "momentum":
        return "sgd", 0.9
    if not isinstance(optimizer, str) or optimizer not in HYPERPARAMETERS_OF:
        words = ", ".join(
            ("sgd", "momentum", *(name for name in HYPERPARAMETERS_OF if name != "sgd"), "exact")
        )
        raise InputError(f"optimizer must be one of {words}, got {optimizer!r}.")
    return optimizer, default_momentum(optimizer)


def _default_tables(optimizer: str, momentum: float, like: Tensor) -> dict[str, Tensor]:
    """Return a (1, 1, 1) table with the default value of each hyperparameter."""
    values = {
        "lr": DEFAULT_LR,
        "momentum": momentum,
        "weight_decay": default_weight_decay(optimizer),
    }
    return {
        name: like.new_full((1, 1, 1), x)
        for name, x in (values | {"beta1": BETA1, "beta2": BETA2}).items()
    }


def _check_tables(
    hyperparameters: object,
    fixed: Mapping[str, object] | None,
    optimizer: str,
    training: ModuleTraining,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tables to differentiate and the tables of fixed hyperparameters."""
    wanted = _check_hyperparameters(hyperparameters, optimizer, training, "hyperparameters")
    others = _check_hyperparameters(fixed, optimizer, training, "fixed") if fixed else {}
    if twice := ", ".join(sorted(others.keys() & wanted)):
        raise InputError(
            f"fixed must have other names than hyperparameters, got {twice} in both; leave it out "
            "of one."
        )
    return wanted, others


def _check_hyperparameters(
    values: object, optimizer: str, training: ModuleTraining, argument: str
) -> dict[str, Tensor]:
    """Return a table (1, S, L) for each value.

    A value is a number, segments (S,), or segments and layers (S, L).
    """
    if not isinstance(values, Mapping) or not values:
        raise InputError(
            f'{argument} must be a dict with at least one of them, for example {{"lr": 0.1}}, got '
            f"{values!r}."
        )
    for name in values:
        if name not in HYPERPARAMETERS_OF[optimizer]:
            raise InputError(
                f"{argument}: {optimizer} has {', '.join(HYPERPARAMETERS_OF[optimizer])}, got "
                f"{name!r}; leave it out, or choose an optimizer that has it."
            )
    return {
        name: _table(f"{argument}[{name!r}]", name, value, training)
        for name, value in values.items()
    }


def _table(place: str, name: str, value: object, training: ModuleTraining) -> Tensor:
    """Return one value as a table (1, S, L); raise InputError if its shape or range is wrong."""
    layers = training.layers
    try:
        table = torch.as_tensor(value, dtype=training.dtype, device=training.device).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"{place} must be a number or an array of numbers, got {value!r}."
        ) from error
    if table.dim() > 2 or 0 in table.shape or (table.dim() == 2 and table.shape[1] != len(layers)):
        raise InputError(
            f"{place} must be a number, (segments,) or (segments, layers) with {len(layers)} "
            f"layers ({', '.join(layer or 'the module itself' for layer in layers)}), got shape "
            f"{tuple(table.shape)}."
        )
    if table.dim() and len(table) > training.steps:
        raise InputError(
            f"{place} must have at most one segment a step, got {len(table)} segments for "
            f"{training.steps} minibatches."
        )
    high, rule = (1.0, "in [0, 1)") if name in BETWEEN_0_AND_1 else (math.inf, "finite and >= 0")
    rule = "finite and > 0" if name == "lr" else rule
    # Written with > and >=, because every comparison with NaN is False and NaN must be refused.
    if not bool(((table > 0 if name == "lr" else table >= 0) & (table < high)).all()):
        raise InputError(f"{place} must be {rule}, got {table.tolist()}.")
    return table.reshape(1, -1, table.shape[1] if table.dim() == 2 else 1)


def _differences(
    problem: InnerProblem[ModuleTraining], names: list[str]
) -> tuple[str, Hypergradients]:
    """Return the reason for mode "fd" and the hypergradients by finite differences."""
    if zero := [name for name in names if bool((problem.tables[name] == 0).any())]:
        raise InputError(
            f"hyperparameters[{zero[0]!r}] must be above 0 for mode='fd', which moves it in its "
            f"logarithm, got {problem.tables[zero[0]].tolist()}; use mode='reverse' or 'forward'."
        )
    width = default_width(problem.training.dtype)
    reason = f"asked for; steps of {width:.1e} in the logarithm (logit of momentum and betas)"
    return reason, differences(problem, names, width=width)


def _choose(
    problem: InnerProblem[ModuleTraining],
    number: int,
    asked: Mode,
    truncate: int | None,
    checkpoint: bool,
    budget: int | None,
) -> tuple[ExactMode, str]:
    """Return the mode to use and the reason for it.

    A mode that was asked for is used. For "auto" it is the fastest mode that fits into memory.
    ``number`` is the number of hyperparameter entries. ``budget`` is in bytes; None means most of
    the free memory. Raises InputError if the mode does not fit.
    """
    need = measure(problem)
    budget = budget or free_bytes(problem.training.device)
    steps = min(truncate or problem.training.steps, problem.training.steps)
    sizes = need.of_modes(steps, number)
    words = (
        f"reverse needs about {size_words(sizes['reverse'])} for {steps} steps, checkpointed "
        f"{size_words(sizes['checkpointed'])}, forward {size_words(sizes['forward'])} for "
        f"{count(number, 'hyperparameter')}; {size_words(budget)} may be used"
    )
    mode: ExactMode
    if asked == "forward":
        mode = "forward"
        reason = "asked for"
    elif asked == "reverse" or truncate is not None or checkpoint:
        mode = "checkpointed" if checkpoint else "reverse"
        reason = "asked for"
    else:
        mode = fastest_that_fits(sizes, budget, hyperparameters=number)
        single = "one hyperparameter, whose tangent is no slower than reverse"
        reason = {
            "reverse": "one price for all hyperparameters",
            "checkpointed": "checkpointed, since the whole does not fit",
            "forward": single if number == 1 else "reverse does not fit",
        }[mode]
    if sizes[mode] > budget:
        remedies: dict[str, ExactMode] = {
            "checkpoint=True": "checkpointed",
            "mode='forward'": "forward",
        }
        fitting = [word for word, other in remedies.items() if sizes[other] <= budget]
        if longest := budget // need.step:
            fitting.append(f"truncate={longest}")
        raise InputError(
            f"memory does not suffice for mode={'forward' if mode == 'forward' else 'reverse'!r}: "
            f"{words}. Use {''.join(word + ' (fits), ' for word in fitting)}smaller minibatches "
            "or a larger memory=."
        )
    return mode, f"{reason}; {words}"


def _warn_of_noise(result: HypergradientResult) -> None:
    """Warn if the validation loss is not finite or if training was chaotic."""
    if not math.isfinite(result.value):
        warn(
            f"the validation loss is {result.value}: look for NaN in the minibatches and in "
            "valid, or lower the learning rate.",
            RuntimeWarning,
        )
    elif result.chaotic:
        warn(
            f"training is chaotic: it amplifies a small change {result.ratio:.3g} times, and the "
            "gradient is noise; lower the learning rate, train for fewer steps, or look at the "
            "trend with a wide finite difference.",
            RuntimeWarning,
        )
