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
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.ground.device import CPU, is_small_pass, on_one_thread
from gputune.ground.errors import InputError, option
from gputune.ground.seeding import keyed_draws
from gputune.ground.types import DECAY_FACTOR, LR_FACTOR, Config, Params, StepKey
from gputune.modules.calls import state_of
from gputune.modules.construction import Builder, call_arguments, dropout_rates
from gputune.modules.failures import StackedError
from gputune.modules.findings import (
    BARS,
    ERRORS,
    Evidence,
    at_start,
    augmented,
    check_dense,
    check_ids,
    draws_in_augment,
    draws_outside,
    fits,
    why_indivisible,
)
from gputune.modules.merged import MergedModule, why_not_merged
from gputune.modules.module import StackedModule
from gputune.modules.module_trial import ModuleTrial, Trail, are_probabilities, is_close
from gputune.modules.pretrained import pretrained_of
from gputune.population.batches import Batch
from gputune.population.outputs import in_mode
from gputune.population.population import arguments_text, module_arguments
from gputune.population.traits import FastestWay, Traits
from gputune.scoring.objective import Objective

DIFFERS = "for stacked members than for single members"
"""Part of the reason why members cannot be stacked if their results differ."""

_KEY = (0, 0)  # (epoch, step) of the tried minibatches
_EVALUATION = (0, 0, 0)  # the key of the tried evaluation
_VMAP = "Members are stacked with torch.func.vmap"
_ADVICE = {
    (".item()", "data-dependent", "as_tensor"): (
        "which cannot read a tensor's value in Python: use torch.where instead of if or .item()"
    ),
    ("inplace",): "which cannot write into that tensor: write x = x + y instead of x += y",
    ("dynamic", "nonzero"): (
        "which needs results of a fixed size: use torch.where instead of a mask as an index"
    ),
}
"""Maps parts of vmap's error messages to advice: the unsupported operation and its replacement."""

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
        return fits(trial, trial.forward(trial.inputs, training=False), len(trial.y))
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
    """Call a module in training, in evaluation and stacked, and return its properties (traits)."""
    check_dense(trial)
    evidence = Evidence(trial)
    # Now the width of every layer is known.
    with on_one_thread(if_small=is_small_pass(trial.module, trial.inputs, trial.record.widest)):
        for check in ERRORS:
            check(evidence)
        return _traits(evidence)


def _traits(evidence: Evidence) -> Traits:
    """Return the traits of a module without errors."""
    trial = evidence.trial
    module = trial.module
    record = trial.record
    reasons = [bar(evidence) for bar in BARS]
    draws_elsewhere = bool(draws_outside(evidence) or draws_in_augment(evidence))
    trainable = {name: w for name, w in module.named_parameters() if w.requires_grad}
    traits = Traits(
        changing=(*evidence.changing, *evidence.counted),
        least_rows=1 if evidence.takes_one_row else 2,
        alone=evidence.is_alone,
        widest=record.widest,
        parameters=sum(w.numel() for w in trainable.values()),
        frozen=sum(w.numel() for w in module.parameters() if not w.requires_grad),
        shared=0.0 if any(w.dim() > 2 for w in trainable.values()) else trial.trail.shared,
        convolves=trial.trail.convolves,
        writes=record.writes,
        draws=record.draws or draws_elsewhere,
        branches=record.branches,
        host_draws=draws_elsewhere,
        evaluation_draws=record.draws_in_evaluation or bool(record.generator),
        row_losses=evidence.losses.dim() > 0,
        at_start=at_start(evidence),
        named=tuple(trainable),
        scheduled=dropout_rates(module),
        probabilities=are_probabilities(evidence.trained),
    )
    reason = next(filter(None, reasons), "")
    unused = tuple[str, ...]()
    if not reason:
        traits, reason, unused = _best_stacking(trial, traits)
        if reason:
            traits = _with_merging(trial, replace(traits, unstackable=reason))
    indivisible = why_indivisible(evidence)
    settings = pretrained_of(trial.builder)
    if settings is not None:
        settings.check_traits(replace(traits, unused=unused), module)
        settings.check_config(trial.config, module)
    return replace(
        traits,
        unstackable=reason,
        unused=() if reason else unused,
        indivisible=indivisible,
    )


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


def differences(stacked: StackedModule, trial: ModuleTrial) -> tuple[str, tuple[str, ...]]:
    """Return how two stacked members differ from plain modules, or "", and the parameters that a
    step does not use."""
    stacked.checks_use = False  # which parameters a step uses is not known yet
    flat = stacked.start()
    parameters = flat[: stacked.trained.size]
    # make the two members differ
    parameters += 0.01 * torch.linspace(-1, 1, len(parameters), dtype=flat.dtype)
    params = stacked.blocks.views(flat)
    expected = [_plain_results(stacked, stacked.member(params, 0, c), trial) for c in range(2)]
    trail = Trail(stacked.template)
    try:
        with trail.following():
            outputs, gradients, buffers = _stacked_results(stacked, flat, trial)
    except StackedError as error:
        return error.rule, ()
    except InputError:
        raise
    except Exception as error:
        # only the first sentence: the rest is for torch's developers
        says = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        return f"{trail.submodule or 'its forward'} says: {says}. {_advice(says)}", ()
    unused = set(stacked.trainable)
    rounding = _rounding_of(stacked.template)
    for c, (plain_outputs, plain_gradients, plain_buffers) in enumerate(expected):
        for stacked_step, plain_step in zip(gradients, plain_gradients):
            unused -= plain_step.keys()
            pairs = []
            for name, gradient in stacked_step.items():
                zero = torch.zeros_like(gradient[0, c])
                pairs.append((gradient[0, c], plain_step.get(name, zero)))
            if not _all_close(pairs, rounding):
                return f"it has another gradient {DIFFERS}", ()
        buffer_pairs = [(w[0, c], plain_buffers[name]) for name, w in buffers.items()]
        if not _all_close(buffer_pairs, rounding):
            return f"it has other buffers after a step {DIFFERS}", ()
        output_pair = outputs[c], plain_outputs.view(outputs[c].shape)
        if not (is_close(*output_pair) or (rounding > 1 and _all_close([output_pair], rounding))):
            return f"it gives other outputs {DIFFERS}", ()
    return "", tuple(name for name in stacked.trainable if name in unused)


def _plain_results(
    stacked: StackedModule, module: nn.Module, trial: ModuleTrial
) -> tuple[Tensor, list[Params], Params]:
    """Return the outputs, gradients and state of a plain module that trains on two minibatches.

    The outputs are computed after training. There are gradients for each minibatch. The state has
    the tensors that changed. Parameters that a step does not use have no gradient.
    """
    objective = stacked.objective
    names = trial.shape.names
    gradients = []
    for rows in minibatches(trial):
        backward(trial, module, objective, rows, _KEY)
        gradients.append({k: w.grad for k, w in module.named_parameters() if w.grad is not None})
        module.zero_grad()
    with torch.no_grad(), keyed_draws(CPU, 0, "evaluation", *_EVALUATION):
        outputs = objective.outputs(in_mode(module, training=False), trial.inputs, names)
    return outputs, gradients, state_of(module, stacked.mutable)


def backward(
    trial: ModuleTrial, module: nn.Module, objective: Objective, rows: slice, key: StepKey
) -> None:
    """Add the gradients of one training step of a plain module to its parameters."""
    inputs = augmented(trial, rows)
    with torch.enable_grad(), keyed_draws(CPU, 0, "dropout", *key):
        module = in_mode(module, training=True)
        losses = objective.losses(
            module, inputs, trial.y[rows], trial.config, names=trial.shape.names
        )
        losses.mean().backward()  # type: ignore[no-untyped-call]


def _stacked_results(
    stacked: StackedModule, flat: Tensor, trial: ModuleTrial
) -> tuple[Tensor, list[Params], Params]:
    """Return the outputs, the gradients and the state of two stacked members.

    Outputs are (2 members, B rows, ...). Other tensors are (1 fold, 2 trials, ...).
    """
    params = stacked.blocks.views(flat)
    gradients: list[Params] = []
    with torch.no_grad():
        for rows in minibatches(trial):
            grads = stacked.trained.views(torch.zeros(stacked.trained.size).to(flat))
            y = trial.y[rows]
            batch = Batch(
                tuple(x[None, rows] for x in trial.inputs), y[None], 1 / len(y), slice(0, 1), _KEY
            )
            if not gradients:
                with keyed_draws(CPU, 0, "check"):
                    stacked.plain_losses(batch)  # it must leave no state behind
            stacked.gradient(params, batch, grads)
            gradients.append(grads)
        outputs = stacked.outputs(params, 0, trial.inputs, _EVALUATION)
    return outputs, gradients, {k: params[k] for k in stacked.mutable}


def minibatches(trial: ModuleTrial) -> tuple[slice, slice]:
    """Return the row slices of two minibatches. The second is shorter if there are enough rows."""
    n = len(trial.y)
    return slice(0, n), slice(0, max(min(n, 2), 2 * n // 3))


def _rounding_of(module: nn.Module) -> float:
    """Return the factor by which results may differ more than in single precision: 1, or more for
    frozen parameters in 16 bits."""
    coarse = (torch.bfloat16, torch.float16)
    return 50.0 if any(w.dtype in coarse for w in module.parameters()) else 1.0


def _all_close(pairs: Sequence[tuple[Tensor, Tensor]], rounding: float) -> bool:
    """Return whether pairs of tensors are equal up to rounding, relative to the largest value in
    any pair."""
    largest = 0.0
    for _, b in pairs:
        if b.numel():
            largest = max(largest, float(b.double().nan_to_num(0.0, 0.0, 0.0).abs().max()))
    for a, b in pairs:
        a = a.double().view(b.shape)
        rtol = rounding * 1e-3
        atol = rounding * 1e-4 * largest
        if not torch.allclose(a, b.double(), rtol=rtol, atol=atol, equal_nan=True):
            return False
    return True


def _advice(message: str) -> str:
    """Return advice for a vmap error: the unsupported operation, and its replacement."""
    for parts, advice in _ADVICE.items():
        if any(part in message for part in parts):
            return f"{_VMAP}, {advice}"
    return f"{_VMAP}, which does not support this operation"
