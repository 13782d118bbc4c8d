"""The training objective of a module: a loss function, or a custom training step.

A named loss takes a standardized target and computes all members at once (a member is one trial on
one fold). A custom loss takes the outputs of one member as the module's forward returns them, and
the target in its own units.

In shapes, C counts configurations (trials), F folds, B rows of a minibatch, and K outputs per row.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from gputune.ground.errors import InputError, Verbatim, option, per_interface
from gputune.ground.seeding import stream_seed
from gputune.ground.text import did_you_mean
from gputune.ground.types import Config, StepKey, Task
from gputune.population.outputs import call_module, first_output
from gputune.scoring.losses import (
    LOSS_OF_TASK,
    LOSSES,
    NUMBERS_INSTEAD,
    SAY_REGRESSION,
    by_rows,
    loss_fitting,
    parse_loss,
    refuse_parameters,
)

LOSS_PREFIX = "loss__"


@dataclass(frozen=True)
class Objective:
    """The training objective of a module, which computes the loss of a minibatch.

    If ``step`` is given, it replaces ``loss``.

    Attributes:
        loss: The name of a loss, or a callable(outputs, y, **values of loss__*). The callable
            returns the row losses (B,) or their mean.
        step: A callable(module, (x, y)) that returns row losses or their mean. None uses the loss
            of the outputs.
        augment: A callable(x, generator) that returns x in the same shape. It is applied to
            training minibatches. None leaves minibatches unchanged.
    """

    loss: str | Callable[..., Tensor]
    step: Callable[..., Tensor] | None = None
    augment: Callable[..., object] | None = None
    any_outputs: bool = False
    """True if a module may return outputs of any shape (n, ...), as for a custom target."""
    binary: bool = False
    """True if the target has two classes, so that one logit per row is enough."""
    copies: bool = field(default=False, compare=False)
    """True if the user's code receives copies of the rows, because the code may write into its
    arguments."""
    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)
    """The parameter values in the text of a loss, such as 0.9 in "quantile:0.9", by argument name.
    """
    fixed: Config = field(default_factory=dict, compare=False)
    """The ``loss__*`` arguments of the training loss with the same value in all trials.

    The score ``neg_loss`` uses these values. For the other arguments it uses the defaults, which
    ``varied`` holds.
    """
    varied: Config = field(default_factory=dict, compare=False)

    def of_space(self, space: Sequence[Mapping[str, Any]]) -> Self:
        """Return a copy of the objective that can rank all trials of a search space by the same
        loss.

        Each part of ``space`` maps a hyperparameter to its choices or its distribution.
        """
        fixed = {}
        varied = {}
        defaults = loss_defaults(self.loss) | _with_prefix(self.numbers)
        names = {key for part in space for key in part if key.startswith(LOSS_PREFIX)}
        for name in sorted(names):
            choices = [part.get(name) for part in space]
            first = choices[0]
            # One value, the same in all parts of the space.
            if isinstance(first, list) and len(first) == 1 and len(set(map(repr, choices))) == 1:
                fixed[name] = first[0]
            else:
                varied[name] = defaults.get(name, inspect.Parameter.empty)
        return replace(self, fixed=fixed, varied=varied)

    def remarks_on_neg_loss(self) -> tuple[str, ...]:
        """Return a remark if the score "neg_loss" ranks trials that train with different losses."""
        if not self.varied:
            return ()
        defaults = ", ".join(f"{name}={value!r}" for name, value in self.varied.items())
        return (
            f"neg_loss scores each trial by the loss with {defaults}, the default. Losses with "
            "other values cannot be compared. To score by another value, search only this value, or "
            "in Python pass a function as scoring",
        )

    def like(self, dtype: torch.dtype, device: torch.device) -> Self:
        """Return the objective with its loss's tensors, such as class weights, in a dtype and on a
        device."""
        if not isinstance(self.loss, nn.Module):
            return self
        tensors = (*self.loss.parameters(), *self.loss.buffers())
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        if dtypes <= {dtype} and {tensor.device for tensor in tensors} <= {device}:
            return self
        return replace(self, loss=copy.deepcopy(self.loss).to(device, dtype))

    @property
    def name(self) -> str:
        """The name of the objective in a study: the loss or training step, and the augmentation."""
        augment = "" if self.augment is None else f", augment={qualified_name(self.augment)}"
        return f"{self.in_words.removeprefix('the loss ')}{augment}"

    @property
    def in_words(self) -> str:
        """The loss or the training step as named in error messages, such as "the loss mse"."""
        if self.step is not None:
            return f"training_step={qualified_name(self.step)}"
        if not isinstance(self.loss, str):
            return f"the loss {qualified_name(self.loss)}"
        numbers = "".join(f":{number:g}" for number in self.numbers.values())
        return f"the loss {self.loss}{numbers}"

    def name_unless_default(self, task: Task) -> str:
        """Return the name of the objective, or "" if the objective is the default loss of the
        task."""
        is_default = self == Objective(LOSS_OF_TASK.get(task, ""), binary=task == "binary")
        return "" if is_default else self.name

    @property
    def number(self) -> float:
        """The parameter of the loss that ranks all trials, such as delta, or 0 for a loss without
        one."""
        if not isinstance(self.loss, str) or self.loss not in LOSSES:
            return 0.0
        for name, parameter in LOSSES[self.loss].arguments.items():
            default = self.numbers.get(name, parameter.default)
            number: float = self.fixed.get(LOSS_PREFIX + name, default)
            return number
        return 0.0

    @property
    def one_logit(self) -> bool:
        """True if the loss requires that a module returns one logit per row for two classes."""
        of_one = self.loss == "bce" or isinstance(self.loss, nn.BCEWithLogitsLoss)
        return self.binary and self.step is None and of_one

    @property
    def may_be_one_logit(self) -> bool:
        """True if the loss permits that a module returns one logit per row for two classes.

        Every loss except the cross-entropy leaves this choice to the module.
        """
        return self.binary and (self.step is not None or self.loss != "cross_entropy")

    @property
    def is_named(self) -> bool:
        """True if the loss has a name. A named loss computes all members at once."""
        return self.step is None and isinstance(self.loss, str)

    def check(self, config: Config) -> None:
        """Raise InputError for a ``loss__*`` value that the loss does not accept."""
        for name, value in loss_arguments(config).items():
            if reason := self._refusal(name, value):
                raise InputError(f"{LOSS_PREFIX}{name}", reason)

    def _refusal(self, name: str, value: object) -> str:
        """Return the reason why the loss rejects a value of its argument, or "" if the value is
        valid."""
        if self.step is not None:
            return "has no effect, because training_step replaces the loss. Leave it out"
        if isinstance(self.loss, str):
            arguments = LOSSES[self.loss].arguments
            if name not in arguments:
                names = ", ".join(arguments) or "no numbers"
                return f"is not an argument of {option('loss', self.loss)}, which takes {names}"
            if arguments[name].includes(value):
                return ""
            return f"must be {arguments[name].rule()}, got {value!r}"
        if isinstance(self.loss, nn.Module):
            name = type(self.loss).__name__
            by_class = option("loss", Verbatim(name))
            return f"has no effect, because the loss is an instance of {name}. Pass {by_class}"
        signature = inspect.signature(self.loss)
        parameters = signature.parameters.values()
        if name in signature.parameters or any(p.kind is p.VAR_KEYWORD for p in parameters):
            return ""
        loss = qualified_name(self.loss)
        return f"is not an argument of the loss {loss}{signature}. Remove it or rename it"

    def values(self, configs: Sequence[Config], like: Tensor) -> dict[str, Tensor]:
        """Return the parameters of a named loss, such as delta, for C trials: a dict from name to
        tensor (C, 1).

        The tensors have the dtype and the device of ``like``.

        The dict leaves out a parameter that is 0 for all configurations.
        """
        values: dict[str, Tensor] = {}
        if self.step is not None or not isinstance(self.loss, str):
            return values
        for name, parameter in LOSSES[self.loss].arguments.items():
            default = self.numbers.get(name, parameter.default)
            row = [float(config.get(LOSS_PREFIX + name, default)) for config in configs]
            if any(row):
                values[name] = like.new_tensor(row)[:, None]
        return values

    def rows(self, outputs: Tensor, y: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Compute a named loss for each of B rows and C trials, (..., C, B).

        The outputs are (..., C, B, K), with K values per row.
        """
        assert isinstance(self.loss, str)
        return LOSSES[self.loss].rows(outputs, y, **values)

    def outputs(
        self, module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str] | None
    ) -> Tensor:
        """Run a module on its inputs, and return its predictions.

        With a custom training step, a module may have several heads. In this case the predictions
        are the outputs of the first head.
        """
        outputs = call_module(module, self._to_give(inputs), names)
        return outputs if self.step is None else first_output(outputs)

    def _to_give(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the tensors to pass to the user's code: copies of them if ``copies`` is set."""
        return [tensor.clone() for tensor in tensors] if self.copies else tensors

    def losses(
        self,
        module: nn.Module,
        inputs: Sequence[Tensor],
        y: Tensor,
        config: Config,
        *,
        names: Sequence[str] | None,
        absent: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each of the B rows of a minibatch, (B,), or the mean over the rows.

        Args:
            module: The module.
            inputs: The input tensors of the minibatch, each (B, ...).
            y: The targets of the minibatch.
            config: The configuration with the ``loss__*`` values.
            names: The names of the inputs if the module takes them by name, else None.
            absent: A mask (K classes,) of the absent classes, whose outputs become -inf. None if no
                class is absent.
        """
        inputs = self._to_give(inputs)
        if self.step is not None:
            (y,) = self._to_give([y])
            return self.step(module, (_as_argument(inputs, names), y))
        outputs = call_module(module, inputs, names)
        if not self.is_named:
            (y,) = self._to_give([y])
            return self.member_loss(config)(outputs, y)
        outputs = outputs if outputs.dim() > 1 else outputs[:, None]
        if outputs.dtype == torch.bfloat16:  # from autocast: the loss is computed in float32
            outputs = outputs.float()
        if absent is not None:
            outputs = outputs.masked_fill(absent, -torch.inf)
        values = self.values([config], outputs)
        if values:  # (C, 1) for C members, so the rows get the same axis: (B, K) -> (1, B, K)
            return self.rows(outputs[None], y[None], values)[0]
        return self.rows(outputs, y, values)

    def augmented(
        self, inputs: Sequence[Tensor], names: Sequence[str] | None, seed: int, key: StepKey
    ) -> Sequence[Tensor]:
        """Apply the user's augmentation to a minibatch, with the same random numbers for all folds.

        The minibatch is (F folds, B rows, ...). Raises InputError if ``augment`` returns another
        shape.
        """
        if self.augment is None:
            return inputs
        folds = []
        for fold in range(len(inputs[0])):
            # augment gets copies, so that it may write into its argument.
            minibatch = [x[fold].clone() for x in inputs]
            generator = torch.Generator(inputs[0].device).manual_seed(
                stream_seed(seed, "augment", *key)
            )
            folds.append(self.augmented_rows(minibatch, names, generator))
        return [torch.stack(parts) for parts in zip(*folds)]

    def augmented_rows(
        self, minibatch: Sequence[Tensor], names: Sequence[str] | None, generator: torch.Generator
    ) -> Sequence[Tensor]:
        """Apply the user's augmentation to the minibatch of one fold, (B, ...) for each input."""
        assert self.augment is not None
        expected = list(map(_shape, minibatch))
        result: Any = self.augment(_as_argument(minibatch, names), generator)
        if isinstance(result, Mapping):
            result = [result.get(name) for name in names or result]
        augmented = list(result) if isinstance(result, tuple | list) else [result]
        shapes = list(map(_shape, augmented))
        if shapes != expected:
            raise InputError(
                "augment",
                f"must return inputs of the same shapes as it receives, {expected}",
                got=Verbatim(f"{shapes} from {qualified_name(self.augment)}"),
            )
        return augmented

    def neg_loss(self, outputs: Tensor, y: Tensor) -> float:
        """Return the score "neg_loss" of one trial on one fold: minus the mean loss of its outputs.

        All trials are scored with the same loss, see ``of_space``.
        """
        if self.is_named:
            losses = self.rows(
                outputs[None, None], y[None, None], self.values([self.fixed], outputs)
            )
        else:
            objective = self.like(outputs.dtype, outputs.device)
            losses = objective.member_loss(self.fixed)(outputs, y)
        return -float(losses.double().mean())

    def member_loss(self, config: Config) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the custom loss function with its ``loss__*`` arguments set to a configuration's
        values.

        The returned function takes the outputs of one member (one trial on one fold) and y. It
        returns row losses or their mean.
        """
        loss = self.loss
        values = loss_arguments(config)
        if isinstance(loss, type):
            loss = loss(**values)
            refuse_parameters("loss", loss)
            values = {}
        assert not isinstance(loss, str)
        if not isinstance(loss, nn.Module):
            return partial(loss, **values)
        ignored = getattr(loss, "ignore_index", None)
        # A mean without the ignored rows differs from the mean of the row losses. A negative
        # ignore_index ignores no class, because classes count from 0. A custom target may hold any
        # number.
        return loss if ignored is not None and (self.any_outputs or ignored >= 0) else by_rows(loss)


def _shape(value: object) -> object:
    """Return the shape of a tensor for error messages, or the type name of any other value."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _as_argument(inputs: Sequence[Tensor], names: Sequence[str] | None) -> object:
    """Return a module's inputs as one object for a custom training step or augmentation.

    One input is passed as a tensor, several as a tuple, and named inputs as a dict.
    """
    if names is not None:
        return dict(zip(names, inputs, strict=True))
    return inputs[0] if len(inputs) == 1 else tuple(inputs)


def loss_arguments(config: Config) -> Config:
    """Return the arguments of the loss from a configuration, without the prefix ``loss__``."""
    return {k.removeprefix(LOSS_PREFIX): v for k, v in config.items() if k.startswith(LOSS_PREFIX)}


def loss_defaults(loss: object) -> Config:
    """Return the default values of a loss's arguments by name, such as ``loss__delta``.

    The names have the prefix ``loss__``, as in a configuration. The defaults come from the
    signature of a custom loss, or from all named losses.
    """
    if isinstance(loss, str):
        loss, numbers = parse_loss(loss)
        return loss_defaults(None) | _with_prefix(numbers)
    defaults: Config = {}
    if callable(loss) and not isinstance(loss, nn.Module):
        for name, parameter in inspect.signature(loss).parameters.items():
            if parameter.default is not parameter.empty:
                defaults[name] = parameter.default
    else:
        for named in LOSSES.values():
            defaults |= {name: number.default for name, number in named.arguments.items()}
    return _with_prefix(defaults)


def _with_prefix(arguments: Mapping[str, object]) -> Config:
    """Add the prefix ``loss__`` to the names of a loss's arguments, as in a configuration."""
    return {LOSS_PREFIX + name: value for name, value in arguments.items()}


def qualified_name(value: object) -> str:
    """Return the name "module:name" of a function or class, or of an object's class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '')}:{named.__qualname__}"


def make_objective(loss: Any, step: Any, augment: Any, task: Task) -> Objective:
    """Check the loss, training step and augmentation of a search, and return them as one objective.

    Without a loss, the objective has the default loss of the task.

    Raises InputError if there is no loss, or if the loss does not fit the task.
    """
    for name, value in (("training_step", step), ("augment", augment)):
        if value is not None and not callable(value):
            raise InputError(name, "must be a function", got=value)
    if step is not None and loss is not None:
        raise InputError(
            "training_step",
            f"returns the loss itself, so {option('loss')} has no effect",
            remedy="Leave one of them out.",
        )
    refuse_parameters("loss", loss)
    refuse_parameters("training_step", step)
    numbers: dict[str, float] = {}
    if isinstance(loss, str):
        loss, numbers = parse_loss(loss)
    loss = loss_fitting(loss, task)
    if loss is None and step is None and task == "custom":
        raise InputError(
            None,
            "A custom target has no default loss",
            remedy=per_interface(
                f"Give {option('loss', Verbatim('callable(outputs, y)'))}, or "
                "training_step=callable(module, batch).",
                "Tune it from Python.",
            ),
        )
    if loss is None:
        loss = LOSS_OF_TASK.get(task, "")
    elif not (loss in LOSSES if isinstance(loss, str) else callable(loss)):
        near = did_you_mean(loss, LOSSES) if isinstance(loss, str) else ""
        names = ", ".join(map(repr, LOSSES))
        others = per_interface(", a torch.nn loss, or callable(outputs, y)", "")
        raise InputError("loss", f"must be one of {names}{others}", got=loss, remedy=near.strip())
    elif isinstance(loss, str) and task not in LOSSES[loss].tasks:
        fitting = [repr(name) for name, named in LOSSES.items() if task in named.tasks]
        remedy = f"Choose {', '.join(fitting) or 'your own loss'}."
        if task in NUMBERS_INSTEAD and "regression" in LOSSES[loss].tasks:
            remedy = f"{remedy} {SAY_REGRESSION}"
        raise InputError(f"loss={loss!r}", f"does not fit a {task} target", remedy=remedy)
    return Objective(
        loss, step, augment, any_outputs=task == "custom", binary=task == "binary", numbers=numbers
    )
