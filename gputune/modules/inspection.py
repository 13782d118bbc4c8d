"""Tries a user's module on a few rows before training, and finds out if its members can be stacked.

Two members with different parameters train on two minibatches: stacked, and separately as plain
modules. Their gradients, buffers and outputs must agree. A module that differs, or that cannot be
mapped at all, trains member by member. If a training fails later, members are tried again to find
the row that causes the error.
"""

import re
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.errors import InputError
from gputune.memory import is_out_of_memory
from gputune.modules.calls import not_trained, state_of
from gputune.modules.construction import (
    Builder,
    call_arguments,
    dropout_rates,
    has_gradient_hook,
    name_of,
)
from gputune.modules.draw_watch import Trail
from gputune.modules.hidden_state import (
    KeptState,
    buffers_at_start,
    check_evaluation,
    check_hidden_state,
)
from gputune.modules.module import ModuleNetwork, StackedModule
from gputune.modules.module_trial import ModuleTrial, at_start, is_close
from gputune.modules.probabilities import are_probabilities, check_probabilities
from gputune.modules.traits import Traits
from gputune.population.batches import Batch
from gputune.population.population import Network, arguments_text, module_arguments
from gputune.scoring.objective import Objective
from gputune.seeding import keyed_draws
from gputune.text import count
from gputune.types import DECAY_FACTOR, LR_FACTOR, Config, Params

_CPU = torch.device("cpu")
# (epoch, step) of the tried minibatches, and the key of the tried evaluation.
_KEY = (0, 0)
_EVALUATION = (0, 0, 0)
_VMAP = "Members are stacked with torch.func.vmap"
_ADVICE = {
    (".item()", "data-dependent", "as_tensor"): (
        "which cannot read a number of a tensor: decide by torch.where instead of if or .item()"
    ),
    ("inplace",): "which cannot write into that tensor: write x = x + y instead of x += y",
    ("dynamic", "nonzero"): (
        "which needs results of a fixed size: use torch.where instead of a mask as an index"
    ),
}
"""By parts of an error of vmap: what it cannot do, and what to write instead."""

# Traits by data, builder and arguments; seconds that compiled code saves, by builder and arguments.
_known: WeakKeyDictionary[Dataset, dict[Builder, dict[str, Traits]]] = WeakKeyDictionary()
_gains: WeakKeyDictionary[Builder, dict[str, float]] = WeakKeyDictionary()


def known_traits(builder: Builder | None, data: Dataset) -> dict[str, Traits]:
    """Return the known traits of a user's module on some data, by ``arguments_text``."""
    return {} if builder is None else dict(_known.get(data, {}).get(builder, {}))


def traits_of(
    builder: Builder,
    config: Config,
    data: Dataset,
    *,
    columns: str = "",
    objective: Objective | None = None,
) -> Traits:
    """Return the traits of a user's module on rows of the first fold.

    Each text of its arguments is tried once. Raises InputError for a module that fails, returns
    outputs of another shape, or has nothing to train. If shapes may be the cause, the message ends
    in ``columns``, a sentence that explains how the rows were made from the user's rows.
    """
    known = _known.setdefault(data, {}).setdefault(builder, {})
    key = arguments_text(config)
    if key not in known:
        own = data.of(config)
        trial = ModuleTrial(builder, config, own, columns, objective)
        trial.check_ids(own)
        known[key] = inspect_module(trial)
    traits = known[key]
    if not traits.row_losses and data.weights is not None:
        loss = objective.in_words if objective else "the loss"
        raise InputError(
            f"sample_weight and class_weight weigh rows, and {loss} gives no number a row but "
            "their mean: return row losses of shape (rows,), or leave the weights out."
        )
    return traits


def returns_one_logit(builder: Builder, config: Config, data: Dataset) -> bool:
    """Return whether a module returns one number a row, (n,) or (n, 1), for a target of two
    classes.

    This concerns modules that do not ask for a number of outputs. The result is also False for a
    module that cannot be built or that fails: its inspection gives a better message.
    """
    data = data.of(config)
    given = module_arguments(config)
    sizes = {"n_features": data.n_features, "n_outputs": 2, "input_shape": ()}
    filled = call_arguments(builder, sizes, given).keys() - given.keys()
    if data.task != "binary" or filled & {"n_outputs", "num_classes"}:
        return False
    with suppress(InputError):
        trial = ModuleTrial(builder, config, data.with_one_logit())
        return trial.fits(trial.forward(trial.inputs, training=False), len(trial.y))
    return False


def check_rates(name: str, config: Config, traits: Traits, *, usual: Config) -> None:
    """Raise InputError for a rate that no part of the module ``name`` has.

    Keys that all trials have, ``usual``, are not checked.
    """
    parts = sorted({part for path in traits.named for part in path.split(".")})
    for key in config.keys() - usual.keys():
        if key.startswith((LR_FACTOR, DECAY_FACTOR)) and key.partition("__")[2] not in parts:
            raise InputError(
                f"space: {key} names no parameter of {name}: the parts of their paths are "
                f"{', '.join(parts)}; choose one of these."
            )
    if config["dropout"] and not traits.scheduled:
        raise InputError(
            f"space: dropout is the rate of gputune.models.Dropout, which {name} does not have; "
            "use it in the place of nn.Dropout, or give the rate as an argument of the module "
            "(module__*)."
        )


def gain_of_code(builder: Builder, config: Config) -> float:
    """Return the seconds by which compiled code made a step faster, on any rows.

    The result is 0.0 if it did not, or if nothing was measured yet.
    """
    gains = _gains.get(builder, {})
    by_default = {**config, "numbers": None}
    return gains.get(arguments_text(config)) or gains.get(arguments_text(by_default), 0.0)


def note_fastest(
    builder: Builder, data: Dataset, arguments: str, *, slow: str, gain: float
) -> bool:
    """Remember the fastest way to train a module's members with these arguments.

    Args:
        slow: Sentence that says by how much members train faster one by one, or "".
        gain: Seconds by which a step is faster in compiled code, or 0.0.

    Returns:
        Whether this changes the known traits.
    """
    known = _known[data][builder]
    before = known[arguments]
    known[arguments] = replace(known[arguments], slow=slow, coded=gain > 0)
    _gains.setdefault(builder, {})[arguments] = gain
    return before != known[arguments]


def inspect_module(trial: ModuleTrial) -> Traits:
    """Try a module in training, in evaluation, and stacked, and return its traits."""
    module = trial.module
    x = trial.inputs
    start = trial.numbers()
    before = {name: tensor.detach().clone() for name, tensor in not_trained(module).items()}
    untrained = KeptState(module)
    trial.forward(x, training=True, watched=True)
    trained = trial.forward(x, training=True)
    first = trial.numbers()
    places = [(w, w.detach().clone()) for w in module.parameters() if w.requires_grad]
    # Each parameter moves a little, so that buffers that follow them move too.
    for w, value in places:
        w.data = value + 0.01
    trial.forward(x, training=True)
    second = trial.numbers()
    for w, value in places:
        w.data = value
    trial.check_outputs(trained)
    trial.check_trainable(trained)
    now = not_trained(module)  # a forward pass may have added buffers
    changing = [
        name for name, tensor in before.items() if not torch.equal(now[name].detach(), tensor)
    ]
    changing += [name for name in buffers_at_start(trial) if name not in changing]
    changing += [name for name in dropout_rates(module) if name not in changing]
    counted = [
        k for k, value in second.items() if k in start and (start[k], value) != (first[k], first[k])
    ]
    unevaluated = KeptState(module)
    alone = trial.forward(x, training=False, watched=True)
    trial.check_outputs(alone)
    check_evaluation(trial, unevaluated, alone)
    check_hidden_state(trial, untrained, counted, alone)
    check_probabilities(trial.name, trial.objective, trained)
    is_alone = trial.is_alone(alone)  # before the next call in training, which may change buffers
    losses = trial.losses()
    outside = trial.watch.outside()
    traits = Traits(
        changing=(*changing, *counted),
        least_rows=1 if trial.takes_one_row() else 2,
        alone=is_alone,
        widest=trial.widest,
        parameters=sum(w.numel() for w in module.parameters() if w.requires_grad),
        writes=trial.writes.found,
        draws=trial.watch.draws or bool(outside),
        host_draws=bool(outside),
        evaluation_draws=trial.watch.draws_in_evaluation or bool(outside),
        row_losses=losses.dim() > 0,
        at_start=at_start(trial, alone, losses),
        named=tuple(name for name, w in module.named_parameters() if w.requires_grad),
        scheduled=dropout_rates(module),
        probabilities=are_probabilities(trained),
    )
    reason = outside or trial.draws_in_augment() or _of_itself(module, counted, changing)
    unused = tuple[str, ...]()
    if not reason:
        reason, unused = _stacking_traits(trial, traits)
    if trial.watch.decides and not reason:
        reason = "it draws random numbers and decides by a number of a tensor"
    return replace(traits, unstackable=reason, unused=() if reason else unused)


def _of_itself(module: nn.Module, counted: Sequence[str], changing: Sequence[str]) -> str:
    """Return a reason why members cannot be stacked that is not about their outputs, or "".

    The reasons are numbers that the module counts in, changing complex tensors, and gradient hooks.
    """
    if counted:
        return f"its forward changes {counted[0]!r}, a Python number, which members would share"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_complex() and (tensor.requires_grad or name in changing):
            return f"its {name!r} holds complex numbers that change"
    hooked = (name for name, parameter in module.named_parameters() if has_gradient_hook(parameter))
    return next((f"its parameter {name!r} has a hook on its gradient" for name in hooked), "")


def _advice(says: str) -> str:
    """Return what to write instead of an operation that vmap refused with an error."""
    for parts, advice in _ADVICE.items():
        if any(part in says for part in parts):
            return f"{_VMAP}, {advice}"
    return f"{_VMAP}, which does not run this operation"


_DIFFERS = "when its members are stacked than alone"


def _stacking_traits(trial: ModuleTrial, traits: Traits) -> tuple[str, tuple[str, ...]]:
    """Return the reason why two members cannot be stacked, and the parameters that a step does not
    use.

    The reason is "" if stacked members do the same as the plain modules.
    """
    reason, unused = _rounded_traits(trial, traits)
    if _DIFFERS in reason and trial.shape.dtype == torch.float32:
        # Double precision decides: by rounding, a ReLU near 0 may be on in one way and off in the
        # other.
        with suppress(Exception):  # a module or a loss may support only single precision
            exactly, not_used = _rounded_traits(trial.in_double(), traits)
            if not exactly:
                return "", not_used
    if _DIFFERS in reason and traits.draws:
        reason = f"it draws random numbers, and {reason.removeprefix('it ')}"
    return reason, unused


def _rounded_traits(trial: ModuleTrial, traits: Traits) -> tuple[str, tuple[str, ...]]:
    """Return the result of ``_stacking_traits``, up to the rounding of the trial's dtype."""
    stacked = StackedModule(
        trial.builder,
        [trial.config] * 2,
        trial.shape,
        seed=0,
        traits=traits,
        objective=trial.objective,
    )
    flat = stacked.start()
    parameters = flat[: stacked.trained.size]
    # make the two members differ
    parameters += 0.01 * torch.linspace(-1, 1, len(parameters), dtype=flat.dtype)
    params = stacked.blocks.views(flat)
    alone = [_plain_results(stacked, stacked.member(params, 0, c), trial) for c in range(2)]
    trail = Trail(stacked.template)
    try:
        together = _stacked_results(stacked, flat, trial)
    except InputError:
        raise
    except Exception as error:
        # only the first sentence: the rest is for torch's developers
        says = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        return f"{trail.submodule or 'its forward'} says: {says}. {_advice(says)}", ()
    for c, (outputs, gradients, after) in enumerate(alone):
        for found, expected in zip(together[1], gradients):
            pairs = ((v[0, c], expected[k]) for k, v in found.items())
            if not _all_close(
                (own, torch.zeros_like(own) if slope is None else slope) for own, slope in pairs
            ):
                return f"it has another gradient {_DIFFERS}", ()
        if not _all_close(((v[0, c], after[k]) for k, v in together[2].items())):
            return f"it has other buffers after a step {_DIFFERS}", ()
        if not is_close(together[0][c], outputs.view(together[0][c].shape)):
            return f"it gives other outputs {_DIFFERS}", ()
    return "", tuple(
        k
        for k in stacked.first
        if all(g[k] is None for _, gradients, _ in alone for g in gradients)
    )


def _plain_results(
    stacked: StackedModule, module: nn.Module, trial: ModuleTrial
) -> tuple[Tensor, list[dict[str, Tensor | None]], Params]:
    """Return the results of a plain module that trains on two minibatches.

    They are the outputs afterwards, the gradients of each minibatch, and the state that changed.
    """
    objective = stacked.objective
    names = trial.shape.names
    gradients: list[dict[str, Tensor | None]] = []
    for rows in _minibatches(trial):
        inputs = trial.augmented(rows)
        with torch.enable_grad(), keyed_draws(_CPU, 0, "dropout", *_KEY):
            losses = objective.losses(
                module.train(), inputs, trial.y[rows], trial.config, names=names
            )
            losses.mean().backward()  # type: ignore[no-untyped-call]
        gradients.append({k: w.grad for k, w in module.named_parameters() if w.requires_grad})
        module.zero_grad()
    with torch.no_grad(), keyed_draws(_CPU, 0, "evaluation", *_EVALUATION):
        outputs = objective.outputs(module.eval(), trial.inputs, names)
    return outputs, gradients, state_of(module, tuple(stacked.kept))


def _stacked_results(
    stacked: StackedModule, flat: Tensor, trial: ModuleTrial
) -> tuple[Tensor, list[Params], Params]:
    """Return the results of ``_plain_results`` for two stacked members.

    Outputs are (2, B, ...), other tensors are (1, 2, ...).
    """
    params = stacked.blocks.views(flat)
    gradients = []
    with torch.no_grad():
        for rows in _minibatches(trial):
            grads = stacked.trained.views(torch.zeros(stacked.trained.size).to(flat))
            y = trial.y[rows]
            batch = Batch(
                tuple(x[None, rows] for x in trial.inputs), y[None], 1 / len(y), slice(0, 1), _KEY
            )
            with keyed_draws(_CPU, 0, "check"):
                stacked.alone_losses(batch)  # it must leave no state behind
            stacked.gradient(params, batch, grads)
            gradients.append(grads)
        outputs = stacked.outputs(params, 0, trial.inputs, _EVALUATION)
    return outputs, gradients, {k: params[k] for k in stacked.kept}


def _minibatches(trial: ModuleTrial) -> tuple[slice, slice]:
    """Return the rows of two minibatches. The second one is shorter if there are enough rows."""
    n = len(trial.y)
    return slice(0, n), slice(0, max(min(n, 2), 2 * n // 3))


def _all_close(pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Return whether pairs are equal up to rounding, relative to the largest number in any pair."""
    pairs = [(a.double(), b.double()) for a, b in pairs]
    largest = max(
        [float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()) for _, b in pairs if b.numel()], default=0.0
    )
    return all(
        torch.allclose(a.view(b.shape), b, rtol=1e-3, atol=1e-4 * largest, equal_nan=True)
        for a, b in pairs
    )


class StackedError(InputError):
    """Raised if a forward pass fails with stacked members, but fails on no row with a single
    member."""


_ROWS = 256  # rows that are tried at a time
# words in torch's errors that are not caused by a forward pass
_DEVICE = re.compile("memory|CUDA|CUBLAS|CUDNN|cuDNN")


def explain(
    error: Exception, network: Network, flat: Tensor, data: Dataset, epoch: int
) -> Exception:
    """Return an InputError that names the fold and row on which a member fails as the chunk did.

    If a forward pass raised, but a member fails on no row or on any row, the error names the
    configuration. Otherwise the result is the error itself. ``flat`` has the members' parameters
    after ``epoch`` epochs. Members run in evaluation mode.
    """
    cause = error.__cause__ if isinstance(error, InputError) else error
    if not isinstance(network, ModuleNetwork) or not isinstance(cause, Exception):
        return error
    if is_out_of_memory(cause) or _DEVICE.search(str(cause)):
        return error
    name = name_of(network.builder)
    raised = f"raised {type(cause).__name__}"
    says = str(cause) or "without a message"
    epochs = count(epoch, "epoch")
    params = network.blocks.views(flat)
    error_type: type[InputError] = InputError
    for f, fold in enumerate(data.folds):
        fails = _attempt(network, network.member(params, f, 0), data, f, type(cause))
        kinds = ("training", fold.train), ("validation", fold.valid)
        parts = ((kind, rows) for kind, whole in kinds for rows in torch.split(whole, _ROWS))
        if (found := next((part for part in parts if fails(part[1])), None)) is None:
            continue
        kind, rows = found
        # Halves of the failing rows are tried until one row is left, or both halves pass.
        while (
            len(rows) > 1
            and (half := next((part for part in rows.chunk(2) if fails(part)), None)) is not None
        ):
            rows = half
        place = f"some of rows {int(rows.min())} to {int(rows.max())}"
        if len(rows) == 1:
            place = f"row {int(rows[0])}"
            others = fold.train[fold.train != rows.to(fold.train.device)]
            few = torch.split(others[:: max(1, len(others) // 8)], 1)  # enough of them to decide
            if len(others) and all(map(fails, few)):
                finding = "No single row of X is at fault, others fail too"
                break
        return InputError(
            f"model: {name} {raised} in fold {f}, after {epochs}: {says}. It fails on {place} of "
            f"X, of the {kind} rows of that fold; mend the forward or the loss for such rows, or "
            "leave them out."
        )
    else:
        inside = (
            frame
            for frame, _ in traceback.walk_tb(cause.__traceback__)
            if frame.f_code.co_name == "forward"
        )
        if not any(isinstance(frame.f_locals.get("self"), nn.Module) for frame in inside):
            return error
        finding = "In evaluation mode it fails on no row of X"
        error_type = StackedError
    words = ", ".join(
        f"module__{key}={value!r}" for key, value in module_arguments(network.configs[0]).items()
    )
    remedy = "mend its forward" + ", or leave these values out of the space" * bool(words)
    return error_type(
        f"model: {name}({words}) {raised} after {epochs}: {says}. {finding}; {remedy}."
    )


def _attempt(
    network: ModuleNetwork, module: nn.Module, data: Dataset, fold: int, kind: type[Exception]
) -> Callable[[Tensor], bool]:
    """Return a function that says whether a member raises the given kind of error on rows of a
    fold."""
    targets = network.targets(data.y)

    def fails(rows: Tensor) -> bool:
        inputs = [x.cpu() for x in data.rows(fold, rows)]
        y = targets[fold % len(targets)][rows].cpu()
        try:
            with torch.no_grad(), keyed_draws(_CPU, 0, "check", host=True):
                network.objective.losses(
                    module, inputs, y, network.configs[0], names=network.shape.names
                )
        except Exception as found:
            return type(found) is kind
        return False

    return fails
