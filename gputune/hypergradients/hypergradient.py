"""The function hypergradient(), which trains a module and differentiates its validation loss.

The derivatives are with respect to the hyperparameters of the training, for example the learning
rate.

A table (1, S, L) has the values of one hyperparameter: S segments of the training, L layers. The 1
is the number of members, because only one module trains.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gputune.engine.plan import parse_memory
from gputune.engine.stop import waited_for
from gputune.ground.errors import InputError, Verbatim, check_count, option, warn
from gputune.ground.seeding import GLOBAL_DRAWS
from gputune.ground.text import count, size_words
from gputune.ground.types import DEFAULT_LR, Params, default_momentum, default_weight_decay
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
    """Train ``module`` and differentiate its validation loss with respect to hyperparameters, for
    example the learning rate.

    Before training, gputune tests PyTorch's second derivatives on the first minibatch. In float64,
    it compares them with finite differences. In lower precision, it tests only their symmetry,
    which does not reveal a ``.detach()`` in the loss.

    Args:
        module: Any ``nn.Module`` whose only state is the running statistics of BatchNorm. gputune
            does not change the module itself.
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
        A ``gputune.HypergradientResult``: the validation loss ``value``, its derivatives
        ``gradient`` and ``log_gradient``, the trained ``parameters``, and ``ratio``, which tells
        whether training is chaotic.

    Raises:
        InputError: An argument is invalid, an operation cannot be differentiated twice, or the
            memory does not suffice.

    Warns:
        RuntimeWarning: Training is chaotic, so the gradient is noise; or the validation loss is not
            finite.

    Sources: Maclaurin et al. (2015), arXiv:1502.03492; Franceschi et al. (2017), arXiv:1703.01785;
    Bengio (2000), "Gradient-based optimization of hyperparameters", for the implicit derivative.

    Example:
        >>> import gputune, torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 3)
        >>> y = x.sum(1, keepdim=True)
        >>> module = torch.nn.Linear(3, 1)
        >>> batches = [(x[:48], y[:48])] * 20  # 20 steps on all training rows
        >>> result = gputune.hypergradient(
        ...     module, torch.nn.functional.mse_loss, batches, valid=(x[48:], y[48:]),
        ...     hyperparameters={"lr": 0.01}, optimizer="sgd",
        ... )
        >>> bool(result.gradient["lr"] < 0)  # a larger learning rate lowers the validation loss
        True
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
    wanted, fixed_tables = _check_tables(hyperparameters, fixed, rule, training)
    tables = _default_tables(rule, momentum, training.start()) | fixed_tables | wanted
    problem = InnerProblem(training, rule, tables)
    names = list(wanted)
    training.check_graph()
    if mode == "fd":
        reason, slopes = _differences(problem, names)
    else:
        with twice_differentiable(training):
            exact, reason = _choose(problem, names, mode, truncate, checkpoint, budget)
            if exact == "forward":
                mode = "forward"
                slopes = forward(problem, names)
            else:
                mode = "reverse"
                blocks = exact == "checkpointed"
                slopes = reverse(problem, names, truncate=truncate, checkpoint=blocks)
    gradient = {}
    log_gradient = {}
    for name, value in hyperparameters.items():
        shape = torch.as_tensor(value, device="cpu").shape
        gradient[name] = slopes.gradients[name].view(shape)
        log_gradient[name] = gradient[name] * wanted[name].view(shape)
    parameters = training.parameters(slopes.weights)
    result = HypergradientResult(
        float(slopes.value),
        gradient,
        log_gradient,
        {name: tensor.detach().clone() for name, tensor in parameters.items()},
        float(slopes.ratio),
        mode,
        reason,
    )
    _warn_of_noise(result)
    return result


def _check_data(loss: object, batches: Iterable[DataPair], valid: DataPair) -> list[DataPair]:
    """Check the loss function and every minibatch (x, y), and return the minibatches as a list."""
    if not callable(loss):
        raise InputError("loss", "must be a function loss(module(x), y)", got=loss)
    if not isinstance(batches, Iterable):
        kind = Verbatim(type(batches).__name__)
        raise InputError("batches", "must be the minibatches (x, y)", got=kind)
    pairs = list(batches)
    if not pairs:
        rule = "must have at least one minibatch (x, y)"
        raise InputError("batches", rule, got=Verbatim("none"))
    for i, pair in enumerate(pairs):
        _check_pair(f"batches[{i}]", pair)
    _check_pair("valid", valid)
    return pairs


def _check_pair(name: str, pair: object) -> None:
    kind = type(pair).__name__
    if isinstance(pair, tuple | list):
        if len(pair) == 2:
            return
        kind = f"{len(pair)} values"
    remedy = "Put several inputs into one x."
    raise InputError(name, "must be a pair (x, y)", got=Verbatim(kind), remedy=remedy)


def _check_mode(mode: object, truncate: object, checkpoint: object) -> None:
    if mode not in get_args(Mode):
        raise InputError("mode", "must be 'auto', 'reverse', 'forward' or 'fd'", got=mode)
    check_count(truncate, "truncate", none=True)
    if not isinstance(checkpoint, bool):
        raise InputError("checkpoint", "must be True or False", got=checkpoint)
    if mode in ("forward", "fd") and (truncate is not None or checkpoint):
        raise InputError(
            "mode",
            f"must be 'reverse' or 'auto' with {option('truncate')} or {option('checkpoint')}",
            got=mode,
            remedy=f"Leave them out, or use {option('mode', 'reverse')}.",
        )


def _check_optimizer(optimizer: object) -> tuple[str, float]:
    """Check the optimizer's name, and return the name of its update rule and its default momentum.

    "momentum" is the rule sgd with a momentum of 0.9.
    """
    if optimizer == "momentum":
        return "sgd", 0.9
    if not isinstance(optimizer, str) or optimizer not in HYPERPARAMETERS_OF:
        rule = "must be one of sgd, momentum, nesterov, adam, adamw, exact"
        raise InputError("optimizer", rule, got=optimizer)
    return optimizer, default_momentum(optimizer)


def _default_tables(optimizer: str, momentum: float, like: Tensor) -> Params:
    """Return the default value of each hyperparameter as a tensor (1, 1, 1)."""
    values = {
        "lr": DEFAULT_LR,
        "momentum": momentum,
        "weight_decay": default_weight_decay(optimizer),
        "beta1": BETA1,
        "beta2": BETA2,
    }
    return {name: like.new_full((1, 1, 1), value) for name, value in values.items()}


def _check_tables(
    hyperparameters: object,
    fixed: Mapping[str, object] | None,
    optimizer: str,
    training: ModuleTraining,
) -> tuple[Params, Params]:
    """Check the hyperparameters to differentiate and the fixed hyperparameters, and return both as
    tensors."""
    wanted = _check_hyperparameters(hyperparameters, optimizer, training, "hyperparameters")
    if not fixed:
        return wanted, {}
    fixed_tables = _check_hyperparameters(fixed, optimizer, training, "fixed")
    in_both = ", ".join(sorted(fixed_tables.keys() & wanted))
    if in_both:
        raise InputError(
            "fixed",
            f"must have other names than {option('hyperparameters')}",
            got=Verbatim(f"{in_both} in both"),
            remedy="Pass the name in only one of them.",
        )
    return wanted, fixed_tables


def _check_hyperparameters(
    values: object, optimizer: str, training: ModuleTraining, argument: str
) -> Params:
    """Check the values of hyperparameters, and return each as a tensor (1, S segments, L layers).

    A value is a number, segments (S,), or segments and layers (S, L).
    """
    if not isinstance(values, Mapping) or not values:
        raise InputError(
            argument,
            "must be a dict with at least one hyperparameter",
            got=values,
            remedy='For example {"lr": 0.1}.',
        )
    tables = {}
    for name, value in values.items():
        if name not in HYPERPARAMETERS_OF[optimizer]:
            raise InputError(
                argument,
                f"must be some of {', '.join(HYPERPARAMETERS_OF[optimizer])} for {optimizer}",
                got=name,
                remedy="Leave the name out, or choose an optimizer that has this hyperparameter.",
            )
        tables[name] = _table(f"{argument}[{name!r}]", name, value, training)
    return tables


def _table(place: str, name: str, value: object, training: ModuleTraining) -> Tensor:
    """Return the value of one hyperparameter as a tensor (1, S segments, L layers). Raises
    InputError if its shape or range is wrong."""
    layers = training.layers
    try:
        table = torch.as_tensor(value, dtype=training.dtype, device=training.device).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(place, "must be a number or an array of numbers", got=value) from error
    shape = tuple(table.shape)
    if len(shape) > 2 or 0 in shape or (len(shape) == 2 and shape[1] != len(layers)):
        names = ", ".join(layer or "the module itself" for layer in layers)
        raise InputError(
            place,
            f"must be a number, (segments,) or (segments, layers) with {len(layers)} layers "
            f"({names})",
            got=Verbatim(f"shape {shape}"),
        )
    if shape and shape[0] > training.steps:
        got = Verbatim(f"{shape[0]} segments for {training.steps} minibatches")
        raise InputError(place, "must have at most one segment per step", got=got)
    # Written with > and >=, because every comparison with NaN is False and NaN must be refused.
    if name == "lr":
        rule = "finite and > 0"
        valid = (table > 0) & (table < math.inf)
    elif name in BETWEEN_0_AND_1:
        rule = "in [0, 1)"
        valid = (table >= 0) & (table < 1)
    else:
        rule = "finite and >= 0"
        valid = (table >= 0) & (table < math.inf)
    if not bool(valid.all()):
        raise InputError(place, f"must be {rule}", got=table.tolist())
    return table.reshape(1, -1, shape[1] if len(shape) == 2 else 1)


def _differences(
    problem: InnerProblem[ModuleTraining], names: list[str]
) -> tuple[str, Hypergradients]:
    """Compute hypergradients by finite differences. Returns a text that explains the mode "fd", and
    the results."""
    for name in names:
        table = problem.tables[name]
        if bool((table == 0).any()):
            raise InputError(
                f"hyperparameters[{name!r}]",
                f"must be above 0 for {option('mode', 'fd')}, which moves its logarithm",
                got=table.tolist(),
                remedy=f"Use {option('mode', 'reverse')} or 'forward'.",
            )
    width = default_width(problem.training.dtype)
    reason = (
        f"requested; finite differences with steps of {width:.1e} in the logarithm of each value "
        "(in the logit of momentum and betas)"
    )
    return reason, differences(problem, names, width=width)


def _choose(
    problem: InnerProblem[ModuleTraining],
    names: list[str],
    asked: Mode,
    truncate: int | None,
    checkpoint: bool,
    budget: int | None,
) -> tuple[ExactMode, str]:
    """Return the mode of differentiation to use, and the reason for this mode.

    The result is the mode ``asked``, unless the user asked for "auto". For "auto", the result is
    the fastest mode that fits into memory. ``budget`` is in bytes; None means most of the free
    memory. Raises InputError if the mode does not fit.
    """
    number = len(problem.columns(names))
    need = measure(problem)
    budget = budget or free_bytes(problem.training.device)
    steps = min(truncate or problem.training.steps, problem.training.steps)
    sizes = need.of_modes(steps, number)
    comparison = (
        f"reverse needs about {size_words(sizes['reverse'])} for {steps} steps, checkpointed "
        f"{size_words(sizes['checkpointed'])}, forward {size_words(sizes['forward'])} for "
        f"{count(number, 'hyperparameter')}; {size_words(budget)} may be used"
    )
    mode: ExactMode
    if asked == "forward":
        mode = "forward"
        reason = "requested"
    elif asked == "reverse" or truncate is not None or checkpoint:
        mode = "checkpointed" if checkpoint else "reverse"
        reason = "requested"
    else:
        mode = fastest_that_fits(sizes, budget, hyperparameters=number)
        single = "one hyperparameter, so that forward mode is no slower than reverse"
        reason = {
            "reverse": "reverse takes the same time for any number of hyperparameters",
            "checkpointed": "reverse fits into memory only with checkpoints",
            "forward": single if number == 1 else "reverse does not fit",
        }[mode]
    if sizes[mode] > budget:
        remedies = []
        if sizes["checkpointed"] <= budget:
            remedies.append(f"{option('checkpoint', True)} (fits), ")
        if sizes["forward"] <= budget:
            remedies.append(f"{option('mode', 'forward')} (fits), ")
        if budget >= need.step:
            remedies.append(f"{option('truncate', budget // need.step)} (fits), ")
        refused = option("mode", "forward" if mode == "forward" else "reverse")
        raise InputError(
            "memory",
            f"does not suffice for {refused}: {comparison}",
            remedy=f"Use {''.join(remedies)}smaller minibatches or a larger {option('memory')}.",
        )
    return mode, f"{reason}; {comparison}"


def _warn_of_noise(result: HypergradientResult) -> None:
    """Warn if the validation loss is not finite, or if chaotic training made the gradient noise."""
    if not math.isfinite(result.value):
        warn(
            f"The validation loss is {result.value}. Look for NaN in the minibatches and in "
            "valid, or lower the learning rate.",
            RuntimeWarning,
        )
    elif result.chaotic:
        warn(
            f"Training is chaotic: it amplifies a small change {result.ratio:.3g} times, so the "
            "gradient is noise. Lower the learning rate, train for fewer steps, or look at the "
            "trend with a wide finite difference.",
            RuntimeWarning,
        )
