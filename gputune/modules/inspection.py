"""Tries a user's module on a few rows before training, and finds out if its members can be stacked.

A member is one trial on one fold. Two members train on two minibatches: stacked with
torch.func.vmap, and separately as plain modules. Their gradients, buffers and outputs must agree.
Otherwise the module trains member by member.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from gputune.data.dataset import Dataset
from gputune.ground.device import is_small_pass, on_one_thread
from gputune.ground.errors import InputError, option
from gputune.ground.types import DECAY_FACTOR, LR_FACTOR, Config
from gputune.modules.adapters import member_buffers
from gputune.modules.calls import named_tensors, not_trained
from gputune.modules.comparison import DIFFERS, backward, differences, minibatches
from gputune.modules.construction import Builder, call_arguments, dropout_rates, has_gradient_hook
from gputune.modules.divisible import why_indivisible
from gputune.modules.hidden_state import (
    KeptState,
    Untrained,
    buffers_at_start,
    check_evaluation,
    check_frozen,
    check_hidden_state,
    checked_losses,
)
from gputune.modules.id_ranges import check_ids
from gputune.modules.merged import MergedModule, why_not_merged
from gputune.modules.module import StackedModule
from gputune.modules.module_trial import ModuleTrial, at_start
from gputune.modules.pretrained import pretrained_of
from gputune.modules.probabilities import are_probabilities, check_probabilities
from gputune.population.population import arguments_text, module_arguments
from gputune.population.traits import FastestWay, Traits
from gputune.scoring.objective import Objective

_TRIED_STEPS = 8  # steps that show whether a module that draws uses all parameters in every step

# Traits by data, builder and arguments; seconds that compiled code saves, by builder and arguments.
_known: WeakKeyDictionary[Dataset, dict[Builder, dict[str, Traits]]] = WeakKeyDictionary()
_gains: WeakKeyDictionary[Builder, dict[str, float]] = WeakKeyDictionary()


def known_traits(builder: Builder | None, data: Dataset) -> dict[str, Traits]:
    """Return the known traits (properties) of a user's module on some data, as a dict. The key is
    the text of the module's arguments."""
    return {} if builder is None else dict(_known.get(data, {}).get(builder, {}))


def traits_of(
    builder: Builder,
    config: Config,
    data: Dataset,
    *,
    columns: str = "",
    objective: Objective | None = None,
) -> Traits:
    """Return a module's traits: properties found by trying the module on rows of the first fold.

    A module is tried once for each text of its arguments. Raises InputError for a module that
    fails, returns outputs of another shape, or has nothing to train. If shapes may be the cause,
    the message ends in ``columns``, a sentence on how the rows were made from the user's rows.
    """
    known = _known.setdefault(data, {}).setdefault(builder, {})
    key = arguments_text(config)
    if key not in known:
        tried = data.of(config)
        trial = ModuleTrial(builder, config, tried, columns, objective)
        check_ids(trial, tried)
        known[key] = inspect_module(trial)
    traits = known[key]
    if not traits.row_losses and data.weights is not None:
        loss = objective.in_words if objective else "the loss"
        raise InputError(
            None,
            f"{option('sample_weight')} and {option('class_weight')} weight rows, but {loss} "
            "returns the mean over the rows instead of one loss per row",
            remedy="Return row losses of shape (rows,), or leave the weights out.",
        )
    return traits


def returns_one_logit(builder: Builder, config: Config, data: Dataset) -> bool:
    """Return whether a module returns one value per row, (n,) or (n, 1), for a target of two
    classes.

    This concerns modules that do not ask for a number of outputs. The result is also False for a
    module that cannot be built or that fails: its inspection gives a better message.
    """
    data = data.of(config)
    arguments = module_arguments(config)
    sizes = ("n_features", "n_outputs", "input_shape", "feature_groups")
    added = call_arguments(builder, dict.fromkeys(sizes), arguments).keys() - arguments.keys()
    if data.task != "binary" or added & {"n_outputs", "num_classes"}:
        return False
    with suppress(InputError):
        trial = ModuleTrial(builder, config, data.with_one_logit())
        return trial.fits(trial.forward(trial.inputs, training=False), len(trial.y))
    return False


def check_rates(name: str, config: Config, traits: Traits, *, usual: Config) -> None:
    """Raise InputError if a trial sets a rate, such as dropout, that no part of the module uses.

    ``name`` is the module's name. Keys for one part of the module are not checked if ``usual`` has
    them, because all trials have the keys of ``usual``.
    """
    parts = set(".".join(traits.named).split("."))
    for key in config.keys() - usual.keys():
        if key.startswith((LR_FACTOR, DECAY_FACTOR)) and key.partition("__")[2] not in parts:
            choices = ", ".join(sorted(parts))
            raise InputError(
                f"space[{key!r}]",
                f"must contain a part of a parameter's dotted name in {name}",
                remedy=f"The parts are {choices}.",
            )
    if config["dropout"] and not traits.scheduled:
        raise InputError(
            "space['dropout']",
            f"is the rate of gputune.models.Dropout, which {name} does not contain",
            remedy="Use gputune.models.Dropout instead of nn.Dropout, or pass the rate as an "
            "argument of the module (module__*).",
        )


def gain_of_code(builder: Builder, config: Config) -> float:
    """Return the seconds per step that compiled code saved, as measured before on any data. The
    result is 0.0 if it saved no time, or if nothing was measured yet."""
    gains = _gains.get(builder, {})
    by_default = {**config, "numbers": None}
    return gains.get(arguments_text(config)) or gains.get(arguments_text(by_default), 0.0)


def note_fastest(builder: Builder, data: Dataset, arguments: str, way: FastestWay) -> bool:
    """Remember the fastest way to train a module's members with these arguments.

    Returns whether this changes the known traits.
    """
    known = _known[data][builder]
    before = known[arguments]
    known[arguments] = replace(before, slow=way.slow, coded=way.gain > 0, uncoded=way.uncoded)
    _gains.setdefault(builder, {})[arguments] = way.gain
    return before != known[arguments]


def inspect_module(trial: ModuleTrial) -> Traits:
    """Run a module in training, in evaluation and stacked, and return its properties (traits)."""
    module = trial.module
    x = trial.inputs
    _refuse_sparse(trial)
    untrained = Untrained.of(trial)
    with on_one_thread(if_small=is_small_pass(module, x)):
        trial.forward(x, training=True, watched=True)
    # Now the width of every layer is known.
    with on_one_thread(if_small=is_small_pass(module, x, trial.widest)):
        return _traits_after_a_call(trial, untrained)


def _refuse_sparse(trial: ModuleTrial) -> None:
    """Raise InputError for a sparse buffer or parameter.

    The flat memory of members holds only dense tensors, and so do saved models.
    """
    parameters = dict(trial.module.named_parameters())
    for name, tensor in named_tensors(trial.module).items():
        if tensor.layout != torch.strided:
            kind = "parameter" if name in parameters else "buffer"
            raise InputError(
                None,
                f"The {kind} {name!r} of {trial.name} is sparse",
                remedy=f"Make it dense, or register its indices and values as two {kind}s and "
                "build the sparse tensor in forward.",
            )


def _traits_after_a_call(trial: ModuleTrial, untrained: Untrained) -> Traits:
    """Return the traits of a module that has been called once in training."""
    module = trial.module
    x = trial.inputs
    trained = trial.forward(x, training=True)
    first = trial.numbers()
    counts = KeptState(module, counts_only=True)
    places = [(w, w.detach().clone()) for w in module.parameters() if w.requires_grad]
    # Each parameter moves a little, so that buffers that follow them move too.
    for w, value in places:
        w.data = value + 0.01
    trial.forward(x, training=True)
    second = trial.numbers()
    counting = counts.changed(module)
    for w, value in places:
        w.data = value
    trial.check_outputs(trained)
    trial.check_trainable(trained)
    check_frozen(module, untrained.tensors, trial.name)
    now = not_trained(module)  # a forward pass may have added buffers
    # A buffer that these calls wrote counts, even with its old value: later rows may change it.
    written = set(untrained.kept.changed(module))
    changing = [
        name
        for name, w in untrained.tensors.items()
        if name in written or not torch.equal(now[name].detach(), w)
    ]
    changing = list(dict.fromkeys([*changing, *buffers_at_start(trial)]))
    changing += [*dropout_rates(module), *member_buffers(module)]
    changing = list(dict.fromkeys(changing))
    start = untrained.numbers
    # Tuples, because a NaN in a tuple equals itself.
    counted = [
        k for k, value in second.items() if k in start and (start[k], value) != (first[k], first[k])
    ]
    unevaluated = KeptState(module)
    alone = trial.forward(x, training=False, watched=True)
    trial.check_outputs(alone)
    check_evaluation(trial, unevaluated, alone)
    check_hidden_state(trial, untrained.kept, counted, alone)
    check_probabilities(trial.name, trial.objective, trained)
    is_alone = trial.is_alone(alone)  # before the next call in training, which may change buffers
    losses = checked_losses(trial)
    outside = trial.watch.outside()
    trainable = {name: w for name, w in module.named_parameters() if w.requires_grad}
    traits = Traits(
        changing=(*changing, *counted),
        least_rows=1 if trial.takes_one_row() else 2,
        alone=is_alone,
        widest=trial.widest,
        parameters=sum(w.numel() for w in trainable.values()),
        frozen=sum(w.numel() for w in module.parameters() if not w.requires_grad),
        shared=0.0 if any(w.dim() > 2 for w in trainable.values()) else trial.trail.shared,
        convolves=trial.trail.convolves,
        writes=trial.writes.has_written,
        draws=trial.watch.draws or bool(outside),
        branches=trial.watch.branches,
        host_draws=bool(outside),
        evaluation_draws=trial.watch.draws_in_evaluation or bool(outside),
        row_losses=losses.dim() > 0,
        at_start=at_start(trial, alone, losses),
        named=tuple(trainable),
        scheduled=dropout_rates(module),
        probabilities=are_probabilities(trained),
    )
    reason = (
        outside
        or trial.draws_in_augment()
        or _module_reason(trial, [*counted, *counting], changing)
    )
    unused = tuple[str, ...]()
    if not reason:
        traits, reason, unused = _best_stacking(trial, traits)
        if reason:
            traits = _with_merging(trial, replace(traits, unstackable=reason))
    traits = replace(traits, unstackable=reason, unused=() if reason else unused)
    traits = replace(traits, indivisible=why_indivisible(trial, traits, trained))
    settings = pretrained_of(trial.builder)
    if settings is not None:
        settings.check_traits(replace(traits, unused=unused), module)
        settings.check_config(trial.config, module)
    return traits


def _module_reason(trial: ModuleTrial, counted: Sequence[str], changing: Sequence[str]) -> str:
    """Return the property of a module that makes stacked members impossible, as text, or "".

    The properties are complex tensors that change, gradient hooks, and ``counted``: attributes with
    numbers that the module changes.
    """
    if counted:
        return f"its forward changes {counted[0]!r}, which members would share"
    module = trial.module
    for name, tensor in named_tensors(module).items():
        if tensor.is_complex() and (tensor.requires_grad or name in changing):
            return f"its {name!r} holds complex numbers that change"
    for name, parameter in module.named_parameters():
        if has_gradient_hook(parameter):
            return f"its parameter {name!r} has a hook on its gradient"
    # vmap ignores hooks on tensors. The tried steps cannot show this if a hook acts only later.
    for name, part in module.named_modules():
        if part._backward_hooks or part._backward_pre_hooks:
            layer = f"its layer {name!r}" if name else "it"
            return f"{layer} has a hook on gradients"
    if trial.watch.hooks:
        return "a training step registers a hook on the gradient of a tensor"
    return ""


def _best_stacking(trial: ModuleTrial, traits: Traits) -> tuple[Traits, str, tuple[str, ...]]:
    """Return the traits with the better way to stack members, the reason why members cannot be
    stacked, and the parameters that a step does not use.

    Members of a module with frozen parameters share the rows of a fold if possible. Everything
    before the first trained parameter is then computed once. Other modules share rows only if vmap
    refuses separate rows, because a step then calls the module once for each fold. With common
    rows, a module may branch on their values, for example on a padding mask.
    """
    common = replace(traits, common_rows=True)
    refusals = []
    for way in (common, traits) if traits.frozen else (traits, common):
        reason, unused = _stacking_traits(trial, way)
        if not reason:
            return way, _uneven_use(trial, traits), unused
        refusals.append(reason)
    return traits, refusals[0], ()


def _uneven_use(trial: ModuleTrial, traits: Traits) -> str:
    """Return the reason if some training steps do not use a parameter that others use, or "".

    A plain loop leaves a parameter unchanged in a step that does not use it. Stacked members would
    apply momentum and weight decay. Only a module that reads values may do this.
    """
    if not traits.branches:
        return ""
    uses: list[set[str]] = []
    for key in range(_TRIED_STEPS if traits.draws else 2):
        rows = minibatches(trial)[key % 2]
        module = trial.fresh()
        backward(trial, module, trial.objective, rows, (0, key))
        named = module.named_parameters()
        uses.append({name for name, w in named if w.grad is not None})
    for used in uses:
        for name in sorted(used ^ uses[0]):
            return f"it uses its parameter {name!r} only in some training steps"
    return ""


def _with_merging(trial: ModuleTrial, traits: Traits) -> Traits:
    """Return the traits of a module that cannot be stacked, with the result of trying merged
    rows."""
    if reason := why_not_merged(trial, traits):
        return replace(traits, unmergeable=reason)
    merged = MergedModule(
        trial.builder,
        [trial.config] * 2,
        trial.shape,
        seed=0,
        traits=replace(traits, common_rows=False, unused=()),
        objective=trial.objective,
    )
    reason, unused = differences(merged, trial)
    if not reason and unused:
        reason = f"a training step does not use its parameter {unused[0]!r}"
    if reason:
        return replace(traits, unmergeable=reason)
    return replace(traits, merges=tuple(merged.patterns.items()), common_rows=False)


def _stacking_traits(trial: ModuleTrial, traits: Traits) -> tuple[str, tuple[str, ...]]:
    """Return the reason why members cannot be stacked, and the parameters that a step does not use.

    The reason is "" if stacked members give the same results as plain modules.
    """
    reason, unused = _rounded_traits(trial, traits)
    if DIFFERS in reason and trial.shape.dtype == torch.float32:
        # Double precision decides: by rounding, a ReLU near 0 may be on in one way and off in the
        # other.
        with suppress(Exception):  # a module or a loss may support only single precision
            double_reason, double_unused = _rounded_traits(trial.in_double(), traits)
            if not double_reason:
                return "", double_unused
    if DIFFERS in reason and traits.draws:
        reason = f"it draws random numbers, and {reason.removeprefix('it ')}"
    return reason, unused


def _rounded_traits(trial: ModuleTrial, traits: Traits) -> tuple[str, tuple[str, ...]]:
    """Return why members cannot be stacked, and the unused parameters. Tensors are compared up to
    rounding in the trial's dtype."""
    stacked = StackedModule(
        trial.builder,
        [trial.config] * 2,
        trial.shape,
        seed=0,
        traits=replace(traits, branches=False),
        objective=trial.objective,
    )
    return differences(stacked, trial)
