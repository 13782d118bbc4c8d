"""The checks of a user's module. Each check is a small function.

``Evidence`` has the results of a few calls of the module on a few rows, and the record of what these
calls have done. There are two lists of checks:

- ``ERRORS``: functions that raise InputError, or warn, for a module that cannot train as it is.
- ``BARS``: functions that return why members cannot be stacked, or "". Such a module trains one by
  one, or on merged rows.

To add a check, write a function of ``Evidence`` and add it to one of the lists. A member is one
trial on one fold.
"""

from collections import deque
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from types import FunctionType

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset, outermost_rows
from gputune.data.table import quoted
from gputune.ground.device import is_small_pass, on_one_thread
from gputune.ground.errors import InputError, InputWarning, Verbatim, option, per_interface, warn
from gputune.modules.calls import named_tensors, not_trained, put_numbers, state_of
from gputune.modules.construction import (
    call_text,
    dropout_rates,
    has_gradient_hook,
    outputs_hint,
    start_from,
)
from gputune.modules.module_trial import (
    ModuleTrial,
    are_probabilities,
    describe_error,
    is_close,
    too_long,
)
from gputune.modules.pretrained import member_buffers, pretrained_of
from gputune.population.outputs import call_module, in_mode
from gputune.population.population import module_arguments
from gputune.scoring.losses import (
    is_cross_entropy,
    is_divergence,
    pairs_all_rows,
    refuse_one_number,
    takes_log_probabilities,
)
from gputune.scoring.objective import qualified_name

_LARGEST = 1 << 16  # most bytes of an array that is compared
_PLAIN = (bool, int, float, str, np.generic, type(None))
# Attributes that every module has.
_OF_MODULES = frozenset(vars(nn.Module()))


class Evidence:
    """The results of a few calls of a user's module on a few rows.

    Attributes:
        trial: The module and the rows. Its record has what all calls have done.
        trained: The outputs in training.
        alone: The outputs in evaluation mode, which follow the calls in training.
        losses: The losses of one step, per row or as a mean.
        hidden: The names of plain attributes that training changes and that gputune does not keep.
        changing: The names of buffers and frozen parameters that training changes.
        counted: The names of the Python numbers that training changes.
        counting: The names of containers and arrays whose numbers training changes.
        changed_by_prediction: The names of what a call in evaluation mode changes, if the next call
            returns other outputs.
        is_alone: Whether an output in evaluation mode depends only on its own row.
        takes_one_row: Whether the module can train on a minibatch of one row.
    """

    def __init__(self, trial: ModuleTrial) -> None:
        self.trial = trial
        module = trial.module
        x = trial.inputs
        start = _numbers(module)
        state = KeptState(module)
        tensors = {k: w.detach().clone() for k, w in not_trained(module).items()}
        self.frozen = {k for k, w in module.named_parameters() if not w.requires_grad}
        with on_one_thread(if_small=is_small_pass(module, x)):
            trial.forward(x, training=True)
        self.trained = trial.forward(x, training=True)
        first = _numbers(module)
        containers = KeptState(module, counts_only=True)
        places = [(w, w.detach().clone()) for w in module.parameters() if w.requires_grad]
        # Each parameter moves a little, so that buffers that follow them move too.
        for w, value in places:
            w.data = value + 0.01
        trial.forward(x, training=True)
        second = _numbers(module)
        self.counting = containers.changed(module)
        for w, value in places:
            w.data = value
        _check_outputs(trial, self.trained)
        # Tuples, because a NaN in a tuple equals itself.
        self.counted = [
            k
            for k, value in second.items()
            if k in start and (start[k], value) != (first[k], first[k])
        ]
        now = named_tensors(module)  # a forward pass may have added buffers
        # A buffer that these calls wrote counts, even with its old value: later rows may change it.
        written = state.changed(module)
        changing = [k for k, w in tensors.items() if k in written or not torch.equal(now[k], w)]
        changing += [*_buffers_at_start(trial), *dropout_rates(module), *member_buffers(module)]
        self.changing = list(dict.fromkeys(changing))
        before = KeptState(module)
        self.alone = trial.forward(x, training=False)
        _check_outputs(trial, self.alone)
        changed = before.changed(module)
        self.changed_by_prediction: list[str] = []
        # before the next call in training, which may change buffers
        if changed and not is_close(trial.forward(x, training=False), self.alone):
            self.changed_by_prediction = changed
        saved = {*self.counted, *dict(module.named_buffers())}
        self.hidden = [name for name in state.changed(module) if name not in saved]
        self.is_alone = _is_alone(trial, self.alone)
        self.losses = _losses(trial)
        self.takes_one_row = False
        with suppress(InputError):
            one = trial.forward(trial.rows(slice(1)), training=True)
            self.takes_one_row = fits(trial, one, 1)


# Functions that raise InputError or warn.


def check_ids(trial: ModuleTrial, data: Dataset) -> None:
    """Raise InputError if the data has an id outside the range of an embedding.

    The module runs on the rows with the largest and the smallest value of each column. Other
    errors are ignored here, because the next calls report them.
    """
    embeddings = [
        (k, part) for k, part in trial.module.named_modules() if isinstance(part, nn.Embedding)
    ]
    if not embeddings:
        return
    base = pretrained_of(trial.builder)
    outermost = set[int]()
    for x, *_ in data.inputs:
        if base is not None and x.dim() == 2 and not x.is_floating_point():
            # The columns are the tokens of a text, whose ids belong to one vocabulary. Fewer
            # rows take less time.
            x = torch.stack([x.amin(1), x.amax(1)], 1)
        outermost.update(outermost_rows(x))
    rows = torch.tensor(sorted(outermost), dtype=torch.int64)
    inputs = [x.cpu() for x in data.rows(0, rows.to(data.device))]
    errors = list[InputError]()

    def check(path: str, embedding: nn.Embedding, arguments: tuple[object, ...]) -> None:
        ids = arguments[0]
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.numel() == 0:
            return  # the embedding raises an error itself
        size = embedding.num_embeddings
        number = int(ids.max())
        if number < size:
            number = int(ids.min())
        if 0 <= number < size:
            return
        row = ""
        searched = inputs
        if ids.dim() > 0 and len(ids) == len(rows):  # otherwise forward has made other rows
            place = int((ids == number).nonzero()[0, 0])
            row = f" in row {int(rows[place])}"
            searched = [x[place] for x in inputs]
        remedy = f"Give it num_embeddings={number + 1} or more."
        if base is not None:
            remedy = (
                f"The vocabulary of the pretrained {type(base.base).__name__} does not contain "
                "this id. Check that X comes from the tokenizer of the base, and that the rows "
                "are not too long for it."
            )
        if number < 0:
            remedy = "Give such ids other numbers."
        places = (
            f"{number}{row}, but the embedding {path.removeprefix('module.')!r} of {trial.name} "
            f"has {size} entries, for ids 0 to {size - 1}"
        )
        for label, x in zip(data.labels, searched):
            if bool((x == number).any()):
                errors.append(InputError(label, f"has the id {places}", remedy=remedy))
                return
        if base is None and any(x.is_floating_point() for x in searched):
            unscaled = f"or {option('numbers', 'none')}, which leaves codes unchanged."
            remedy += " gputune scales the numeric columns of a table. " + per_interface(
                f"Pass a tensor of integers, torch.as_tensor(X), {unscaled}",
                f"Pass a tensor of integers in a .pt file, {unscaled}",
            )
        rule = f"The forward pass of {trial.name} computes the id {places}"
        errors.append(InputError(None, rule, remedy=remedy))

    hooks = [part.register_forward_pre_hook(partial(check, k)) for k, part in embeddings]
    with torch.no_grad(), suppress(Exception):
        module = in_mode(trial.module, training=False)
        call_module(module, [x.clone() for x in inputs], data.names)
    for hook in hooks:
        hook.remove()
    if errors:
        raise too_long(trial.module, inputs, trial.name) or errors[0]


def check_dense(trial: ModuleTrial) -> None:
    """Raise InputError for a sparse buffer or parameter.

    The flat memory of members holds only dense tensors, and so do saved models.
    """
    for name, tensor in named_tensors(trial.module).items():
        if tensor.layout != torch.strided:
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise InputError(
                None,
                f"The {kind} {name!r} of {trial.name} is sparse",
                remedy=f"Make it dense, or register its indices and values as two {kind}s and "
                "build the sparse tensor in forward.",
            )


def check_trainable(evidence: Evidence) -> None:
    """Raise InputError if the outputs in training depend on no parameter."""
    trial = evidence.trial
    has_parameters = any(w.requires_grad for w in trial.module.parameters())
    if not evidence.trained.requires_grad or not has_parameters:
        raise InputError(
            None,
            f"{trial.name} has nothing to train: its outputs depend on no parameter with "
            "requires_grad",
            remedy="Give the module a trained parameter, and do not detach its outputs.",
        )


def check_frozen(module: nn.Module, frozen: Container[str], name: str) -> None:
    """Raise InputError if a parameter in ``frozen`` has requires_grad now. ``name`` is the name of
    the module.

    The optimizer does not have this parameter.
    """
    for key, parameter in module.named_parameters():
        if parameter.requires_grad and key in frozen:
            raise InputError(
                None,
                f"{name} unfreezes its parameter {key!r} in training, but gputune trains only the "
                "parameters with requires_grad=True at the end of __init__",
                remedy="Leave requires_grad=True, and use the parameter's detach() in forward "
                "while it must not change.",
            )


def check_unfrozen(evidence: Evidence) -> None:
    """Raise InputError if the calls in training have unfrozen a parameter."""
    check_frozen(evidence.trial.module, evidence.frozen, evidence.trial.name)


def check_evaluation(evidence: Evidence) -> None:
    """Raise InputError if predictions depend on the rows that were predicted before."""
    trial = evidence.trial
    changed = evidence.changed_by_prediction
    if changed:
        raise InputError(
            None,
            f"{trial.name} changes {changed[0]!r} in evaluation mode, so each prediction would "
            "depend on the rows before it",
            remedy="Change it only if self.training is True.",
        )


def check_hidden_state(evidence: Evidence) -> None:
    """Raise InputError if predictions depend on values that training stored in plain attributes."""
    trial = evidence.trial
    for name in evidence.hidden[:1]:
        finding = f"keeps state in {name!r}, a plain attribute"
        # Later calls in training may have changed buffers, so the module predicts again.
        outputs = trial.forward(trial.inputs, training=False)
        _check_saved(trial, evidence.counted, outputs, finding, name)


def check_probabilities(evidence: Evidence) -> None:
    """Check that outputs have the form that the loss expects.

    Warns about probabilities if the loss takes logits. Raises InputError if the loss takes
    log-probabilities and the outputs are something else: the loss would then have no lower bound.
    """
    name = evidence.trial.name
    outputs = evidence.trained
    objective = evidence.trial.objective
    if objective.step is not None:
        return
    has_classes_apart = is_divergence(objective.loss) and outputs.dim() != 2
    if takes_log_probabilities(objective.loss) and not has_classes_apart and outputs.dim() > 1:
        if bool(((outputs.exp().sum(1) - 1).abs() <= 0.01).all()):
            return
        kind = "logits"
        softmax = ""
        if are_probabilities(outputs):
            kind = "probabilities"
            softmax = ", without the softmax at its end"
        loss = option("loss=torch.nn.CrossEntropyLoss")
        raise InputError(
            None,
            f"{name} returns {kind}, but {objective.in_words} takes the logarithms of "
            "probabilities",
            remedy=f"Pass {loss}{softmax}, or end the module in log_softmax(1).",
        )
    layer = ""
    if is_cross_entropy(objective.loss) and outputs.shape[1:] != (1,):
        layer = "softmax" if are_probabilities(outputs) else ""
    elif objective.loss == "bce" and _ends_in_sigmoid(outputs):
        layer = "sigmoid"
    if layer:
        warn(
            f"{name} returns probabilities, but the cross-entropy takes logits. Leave out the "
            f"{layer} at its end.",
            InputWarning,
        )


def check_likelihood(evidence: Evidence) -> None:
    """Raise InputError if a custom loss passes logits or probabilities to a function of
    log-probabilities."""
    record = evidence.trial.record
    if not record.likelihood or evidence.trial.objective.is_named:
        return
    kind = "probabilities" if record.softmax else "logits"
    softmax = ", without the softmax before it" if record.softmax else ""
    raise InputError(
        None,
        f"{evidence.trial.objective.in_words} passes {kind} to {record.likelihood}, which takes "
        "the logarithms of probabilities",
        remedy=f"Use torch.nn.functional.cross_entropy there{softmax}, or take log_softmax(1) "
        "before.",
    )


def check_losses(evidence: Evidence) -> None:
    """Raise InputError if a loss has the wrong shape, has no gradient or is not finite."""
    trial = evidence.trial
    losses = evidence.losses
    name = trial.objective.in_words
    rows = len(trial.y)
    shape = _shape_of(losses)
    if shape not in ((), (rows,)):
        raise InputError(
            None,
            f"{name} must return row losses of shape (rows,), or their mean of shape ()",
            got=Verbatim(f"{shape} for {rows} rows"),
        )
    if not losses.requires_grad:
        raise InputError(
            None,
            f"{name} gives no gradient: its result does not depend on the parameters of "
            f"{trial.name}",
            remedy="Compute it from the outputs of the module with PyTorch operations, without "
            "detach(), item() or torch.no_grad().",
        )
    if not trial.objective.is_named and not bool(losses.isfinite().all()):
        rule = f"{name} is not finite on the first rows"
        raise InputError(None, rule, remedy="Check its inputs and its formula.")


def check_pairs(evidence: Evidence) -> None:
    """Raise InputError if a custom loss or step compares each output with the targets of all rows.

    The cause is that PyTorch broadcasts outputs (n, 1) and a target (n,) to a matrix (n, n).
    """
    trial = evidence.trial
    objective = trial.objective
    if objective.is_named or not isinstance(evidence.alone, Tensor):
        return
    place = "loss"
    if objective.step is None:
        compare = objective.member_loss(trial.config)
    else:
        place = "training_step"

        precise = trial.in_double()
        precise.module = precise.fresh()

        def compare(outputs: Tensor, y: Tensor) -> Tensor:
            # The step makes its own outputs, so only the target can get their shape.
            is_aligned = outputs.shape == y.shape
            return precise.losses(y.view(evidence.alone.shape) if is_aligned else y)

    if not pairs_all_rows(compare, evidence.alone, trial.y):
        return
    rows = len(trial.y)
    remedy = f"Take outputs[:, None] or y[:, 0] in the {place}, or pass y of shape (rows,)."
    if evidence.alone.dim() == 2:
        remedy = (
            f"Take outputs[:, 0] or y[:, None] in the {place}, or return (rows,) from the module."
        )
    raise InputError(
        None,
        f"{objective.in_words} compares each output with the targets of all rows: the outputs of "
        f"{trial.name} have shape {tuple(evidence.alone.shape)} and y has shape "
        f"{tuple(trial.y.shape)}, which PyTorch broadcasts to ({rows}, {rows})",
        remedy=remedy,
    )


ERRORS: tuple[Callable[[Evidence], None], ...] = (
    check_trainable,
    check_unfrozen,
    check_evaluation,
    check_hidden_state,
    check_probabilities,
    check_likelihood,
    check_losses,
    check_pairs,
)


# Functions that return why members cannot be stacked, or "".


def draws_outside(evidence: Evidence) -> str:
    """A generator of Python or NumPy, or a generator of the user, makes random numbers."""
    generator = evidence.trial.record.generator
    if not generator:
        return ""
    return (
        f"it draws from {generator}, and a stacked or recorded step would repeat the first random "
        "number"
    )


def draws_in_augment(evidence: Evidence) -> str:
    """Two calls of ``augment`` on the same rows give different results."""
    trial = evidence.trial
    augment = trial.objective.augment
    if augment is None:
        return ""
    pairs = zip(augmented(trial, slice(None)), augmented(trial, slice(None)))
    if all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
        return ""
    return (
        f"augment={qualified_name(augment)} draws random numbers without its "
        "argument generator; pass generator=generator to each operation that draws"
    )


def changes_numbers(evidence: Evidence) -> str:
    """The forward pass changes Python numbers, such as counters."""
    for name in (*evidence.counted, *evidence.counting):
        return f"its forward changes {name!r}, which members would share"
    return ""


def changes_complex_tensor(evidence: Evidence) -> str:
    """A complex tensor changes in training."""
    for name, tensor in named_tensors(evidence.trial.module).items():
        if tensor.is_complex() and (tensor.requires_grad or name in evidence.changing):
            return f"its {name!r} holds complex numbers that change"
    return ""


def hooks_gradients(evidence: Evidence) -> str:
    """A hook reads or changes gradients. vmap ignores hooks on tensors."""
    module = evidence.trial.module
    for name, parameter in module.named_parameters():
        if has_gradient_hook(parameter):
            return f"its parameter {name!r} has a hook on its gradient"
    for name, part in module.named_modules():
        if part._backward_hooks or part._backward_pre_hooks:
            layer = f"its layer {name!r}" if name else "it"
            return f"{layer} has a hook on gradients"
    if evidence.trial.record.hooks:
        return "a training step registers a hook on the gradient of a tensor"
    return ""


BARS: tuple[Callable[[Evidence], str], ...] = (
    draws_outside,
    draws_in_augment,
    changes_numbers,
    changes_complex_tensor,
    hooks_gradients,
)


def why_indivisible(evidence: Evidence) -> str:
    """Return the property of a module that excludes pieces of minibatches, as a clause, or "".

    If the gradients of pieces add up to the gradient of the minibatch, trials with different batch
    sizes train together (``population/pieces.py``).
    """
    trial = evidence.trial
    changing = {*evidence.changing, *evidence.counted} - set(member_buffers(trial.module))
    if trial.record.draws or trial.record.generator:
        return "the module draws random numbers in training"
    if trial.objective.augment is not None:
        return "augment changes whole minibatches"
    if not trial.objective.is_named:
        return "only losses with a name are added up over pieces of a minibatch"
    if changing:
        return f"a training step of the module changes {min(changing)!r}"
    if trial.record.branches:
        return "the module branches on a tensor's value"
    if not evidence.takes_one_row or not evidence.is_alone or not is_alone_in_training(trial):
        return "a row may affect the outputs of other rows"
    return ""


def at_start(evidence: Evidence) -> str:
    """Return a warning text about outputs or losses that are not finite before training.

    The text is "" if all are finite. An output of -inf for a class is allowed.
    """
    trial = evidence.trial
    outputs = evidence.alone
    is_finite = not bool((outputs.isnan() | (outputs == torch.inf)).any())
    if is_finite and bool(evidence.losses.isfinite().all()):
        return ""
    results = "a loss that is" if bool(outputs.isfinite().all()) else "outputs that are"
    return (
        f"{call_text(trial.name, module_arguments(trial.config))} returns {results} not finite on "
        "the first training rows, before any training. Look in its forward pass for a division by "
        "zero, and for the logarithm or root of 0. If inputs are too large, "
        f"{option('numbers', 'standard')} scales them."
    )


# Functions that the checks use.


def fits(trial: ModuleTrial, outputs: object, rows: int) -> bool:
    """Return whether outputs for ``rows`` rows have a shape that the loss accepts."""
    shape = _shape_of(outputs)
    n_outputs = trial.shape.n_outputs
    if trial.objective.any_outputs:
        return shape[:1] == (rows,)
    may_be_one = n_outputs == 1 or trial.objective.may_be_one_logit
    return shape == (rows, n_outputs) or (may_be_one and shape in ((rows,), (rows, 1)))


def _check_outputs(trial: ModuleTrial, outputs: object) -> None:
    """Raise InputError if the outputs have a shape that the loss does not accept."""
    rows = len(trial.y)
    n_outputs = trial.shape.n_outputs
    if fits(trial, outputs, rows):
        return
    # A model output of transformers is a dict with a class of its own.
    if isinstance(outputs, dict) and type(outputs) is not dict:
        missing = "no logits" if "loss" in outputs else "neither logits nor a loss"
        raise InputError(
            None,
            f"{trial.name} returns {type(outputs).__name__} with {quoted(list(outputs))}, but "
            f"{missing}",
            remedy="Use a model with a head, such as AutoModelForSequenceClassification, or put a "
            "head on this model with gputune.frozen(...).",
        )
    shape = _shape_of(outputs)
    cause = _shape_hint(shape, n_outputs, binary=trial.objective.binary)
    if isinstance(shape, tuple) and len(shape) == 2:
        cause += outputs_hint(trial.builder, module_arguments(trial.config), shape[1], n_outputs)
    if not trial.objective.is_named:
        function = "training_step" if trial.objective.step else "custom loss"
        custom = "With task='custom' and scoring=callable(outputs, y)"
        custom = per_interface(custom, custom, "In gputune.sklearn.NeuralNet")
        cause += f" {custom}, the module of a {function} may return any outputs."
    last_layer = ""
    if isinstance(shape, tuple):
        logits = "" if trial.shape.regression else " (logits for classes)"
        last_layer = f"Its last layer must have n_outputs outputs{logits}."
    raise InputError(
        None,
        f"{trial.name} must return a tensor of shape (rows, {n_outputs})",
        got=Verbatim(f"{shape} for {rows} rows"),
        remedy=f"{last_layer}{cause}{trial.columns}".strip(),
    )


def _shape_hint(shape: tuple[int, ...] | str, n_outputs: int, *, binary: bool) -> str:
    """Return a sentence on how to correct outputs of a wrong shape or type, or "" if none fits."""
    if shape in ("tuple", "list", "dict"):
        step = option("training_step")
        return f" If there are several outputs, return only the first, or pass a {step}."
    if isinstance(shape, str):
        return ""
    if binary and n_outputs == 2 and (len(shape) == 1 or shape[1:] == (1,)):
        loss = option("loss", "bce")
        return f" For two classes return two logits per row, or one logit with {loss}."
    if binary and n_outputs == 1 and shape[1:] == (2,):
        return f" For two logits per row and two classes pass {option('loss', 'cross_entropy')}."
    return " Pool or flatten the axes after the rows." if len(shape) > 2 else ""


def _shape_of(value: object) -> tuple[int, ...] | str:
    """Return the shape of a tensor, or the name of the type of another value."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _is_alone(trial: ModuleTrial, outputs: Tensor) -> bool:
    """Return whether an output in evaluation mode depends only on its own row.

    ``outputs`` are the outputs of all tried rows.
    """
    if not trial.record.draws_in_evaluation:
        return is_close(trial.forward(trial.rows(slice(2)), training=False), outputs[:2])
    # With fewer rows, the draws would differ. Therefore the number of rows stays the same, and
    # the rows after the second are copies of the first.
    others = [
        torch.cat([part[:2], part[:1].expand(len(part) - 2, *part.shape[1:])])
        for part in trial.inputs
    ]
    return is_close(trial.forward(others, training=False)[:2], outputs[:2])


def is_alone_in_training(trial: ModuleTrial) -> bool:
    """Return whether an output in training depends only on its own row."""
    outputs = trial.forward(trial.inputs, training=True)
    return is_close(trial.forward(trial.rows(slice(2)), training=True), outputs[:2])


def augmented(trial: ModuleTrial, rows: slice) -> list[Tensor]:
    """Return some rows of the inputs, changed by the user's ``augment``.

    Raises InputError if ``augment`` fails. The rows are selected before the call, because the
    random values of torch.randn depend on how many it draws.
    """
    inputs = trial.rows(rows)
    objective = trial.objective
    if objective.augment is None:
        return inputs
    try:
        changed = objective.augmented([x[None] for x in inputs], trial.shape.names, 0, (0, 0))
        return [x[0] for x in changed]
    except InputError:
        raise
    except Exception as error:
        function = qualified_name(objective.augment)
        raise InputError(
            None,
            f"{option(f'augment={function}')} raised {describe_error(error)}",
            remedy="gputune calls augment(x, generator) with the inputs of a minibatch. It "
            "must return inputs of the same form.",
        ) from error


def _losses(trial: ModuleTrial) -> Tensor:
    """Return the losses of one step of a trial's module.

    Raises InputError if the loss or the training step changes its own attributes. All members would
    share such state, and a stacked step would put a tensor of functorch into it. A value that the first
    call makes and later calls only read, such as a cache, is no state.
    """
    refuse_one_number(trial.objective.loss, trial.y)
    function = trial.objective.step or trial.objective.loss
    before = KeptState(function)
    losses = trial.losses(trial.y)
    if not before.changed(function):
        return losses
    before = KeptState(function)
    trial.losses(trial.y)
    for name in before.changed(function):
        remedy = "Keep it in a buffer of the module"
        if trial.objective.step is None:
            remedy += ", and compute the loss in a training_step"
        raise InputError(
            None,
            f"{trial.objective.in_words} keeps state in {name!r}, which all trials and folds would "
            "share",
            remedy=f"{remedy}.",
        )
    return losses


def _ends_in_sigmoid(outputs: Tensor) -> bool:
    """Return whether a sigmoid computed the outputs. Views of its result are skipped."""
    node = outputs.grad_fn
    views = ("View", "Squeeze", "Select", "Slice", "Reshape", "UnsafeView", "ToCopy")
    while node is not None and node.name().startswith(views):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("Sigmoid")


def _buffers_at_start(trial: ModuleTrial) -> list[str]:
    """Return the names of the buffers with ``persistent=False`` that a module's ``start_from``
    changes.

    Raises InputError if predictions depend on values that ``start_from`` stores in plain
    attributes.
    """
    if not hasattr(trial.module, "start_from"):
        return []
    started = trial.fresh()
    before = KeptState(started)
    start_from(started, trial.inputs, trial.y, seed=0)
    buffers = dict(started.named_buffers())
    changed = before.changed(started)
    for name in changed:
        if name not in buffers:
            begun = trial.of_module(started)
            outputs = begun.forward(trial.inputs, training=False)
            finding = f"sets {name!r}, a plain attribute, in start_from"
            _check_saved(begun, (), outputs, finding, name)
            break
    persistent = started.state_dict().keys()
    return [name for name in changed if name in buffers and name not in persistent]


def _check_saved(
    trial: ModuleTrial, counted: Sequence[str], outputs: Tensor, finding: str, name: str
) -> None:
    """Raise InputError if a new module with the complete state of the tried module predicts
    differently.

    The state consists of all tensors and the Python numbers ``counted``. The new module lacks only
    the plain attribute ``name``.
    """
    other = trial.fresh()
    tensors = named_tensors(trial.module)
    with torch.no_grad():
        for key, tensor in named_tensors(other).items():
            if key in tensors and tensors[key].shape == tensor.shape:
                tensor.copy_(tensors[key])
    put_numbers(other, state_of(trial.module, counted))
    if is_close(trial.of_module(other).forward(trial.inputs, training=False), outputs):
        return
    value = attrgetter(name)(trial.module)
    call = f"self.register_buffer({name.rpartition('.')[2]!r}, "
    if isinstance(value, Tensor):
        remedy = f"Make it a buffer in __init__: {call}tensor)."
    elif isinstance(value, np.ndarray):
        remedy = f"Make it a tensor and a buffer in __init__: {call}torch.from_numpy(array))."
    else:
        remedy = (
            f"Store the numbers of this {type(value).__name__} in tensors of a fixed shape, and "
            "register each in __init__ with self.register_buffer(name, tensor)."
        )
    raise InputError(
        None,
        f"{trial.name} {finding}, and its predictions depend on it. A saved model would lose "
        "this attribute",
        remedy=remedy,
    )


def _numbers(module: nn.Module) -> dict[str, float]:
    """Return the attributes of the submodules that are numbers of Python or NumPy, such as
    counters."""
    numbers = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            is_number = isinstance(value, int | float | np.integer | np.floating | np.bool_)
            if is_number and name != "training":
                numbers[f"{path}.{name}".lstrip(".")] = value
    return numbers


class KeptState:
    """A snapshot of an object's plain attributes and buffers, by name, to find values that change
    later.

    The object is a module, or any object of a class in Python code. Functions have no state here.

    With ``counts_only``, only lists, dicts, sets, NumPy arrays and objects in attributes count. They
    change if a number or text in them changes, or their length. Tensors in them do not count.
    """

    def __init__(self, owner: object, *, counts_only: bool = False) -> None:
        self._counts_only = counts_only
        # keeps objects alive, so that no other object gets their ids
        self._alive: list[object] = []
        self._marks = self._marks_of(owner)

    def changed(self, owner: object) -> list[str]:
        """Return the names of the buffers and attributes that changed since the snapshot, in
        submodule order."""
        marks = self._marks_of(owner)
        return [name for name, mark in marks.items() if self._marks.get(name) != mark]

    def _marks_of(self, owner: object) -> dict[str, object]:
        """Return a comparable value for each buffer and plain attribute of an object, by name."""
        if not isinstance(owner, nn.Module):
            if isinstance(owner, type | FunctionType):
                return {}
            attributes = getattr(owner, "__dict__", {})
            return {name: self._mark(value, 3) for name, value in attributes.items()}
        marks = dict[str, object]()
        if not self._counts_only:
            marks = {name: self._mark(tensor, 0) for name, tensor in owner.named_buffers()}
        for path, part in owner.named_modules():
            if isinstance(part, torch.jit.ScriptModule):
                continue
            for name, value in vars(part).items():
                is_plain = isinstance(value, _PLAIN)
                if name not in _OF_MODULES and not (self._counts_only and is_plain):
                    marks[f"{path}.{name}".lstrip(".")] = self._mark(value, 3)
        return marks

    def _mark(self, value: object, depth: int) -> object:
        """Return a comparable value that changes if ``value`` is replaced or written into."""
        if isinstance(value, _PLAIN):
            return repr(value)
        if self._counts_only and (isinstance(value, Tensor | nn.Module | type) or callable(value)):
            return None
        self._alive.append(value)
        if isinstance(value, Tensor):
            # PyTorch increases the version of a tensor with every write into it.
            return id(value), value._version
        if isinstance(value, np.ndarray):
            return value.tobytes() if value.nbytes <= _LARGEST else id(value)
        identity = None if self._counts_only else id(value)
        if depth == 0 or isinstance(value, nn.Module | type) or callable(value):
            return identity
        if isinstance(value, dict):
            return [(repr(key), self._mark(item, depth - 1)) for key, item in value.items()]
        if isinstance(value, list | tuple | set | deque):
            return [self._mark(item, depth - 1) for item in value]
        return identity, self._mark(dict(getattr(value, "__dict__", {})), depth - 1)
