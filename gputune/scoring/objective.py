"""What a module is trained on: a loss of its outputs and the target, or a step of the user's own.

A loss that has a name is of a standardised target and knows all members at once; one of the user's
own sees the outputs of one member as its forward returns them, and the target in its own units.
"""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from gputune.errors import InputError
from gputune.population.population import call_module, first_output
from gputune.scoring.losses import LOSS_OF_TASK, LOSSES, by_rows, loss_fitting, parse_loss
from gputune.seeding import keyed_draws, stream_seed
from gputune.text import did_you_mean
from gputune.types import Config, Task

LOSS_PREFIX = "loss__"


@dataclass(frozen=True)
class Objective:
    """How a module's minibatches become a loss: ``loss`` is a name, or what the user gave; ``step``
    comes before it.

    loss     name, or callable(outputs, y, **values of loss__*) -> row losses (B,) or their mean
    step     callable(module, (x, y)) -> row losses or their mean, in place of the loss; None: the
             loss of the outputs
    augment  callable(x, generator) -> x of the same shape, for the minibatches of training; None:
             as they are
    """

    loss: str | Callable[..., Tensor]
    step: Callable[..., Tensor] | None = None
    augment: Callable[..., object] | None = None
    any_outputs: bool = False
    """Whether a module may return outputs of any shape (n, ...): for a custom target."""
    binary: bool = False
    """Whether the target is two classes, which one logit a row can tell apart."""
    copies: bool = field(default=False, compare=False)
    """Whether the user's code gets copies of the rows, as it writes, or may write, into what it is
    given."""
    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)
    """The numbers that the loss was given with, as in "quantile:0.9", by the names that the loss
    knows."""
    fixed: Config = field(default_factory=dict, compare=False)
    """The ``loss__*`` that a search has one value of: ``neg_loss`` is of them, and of the defaults
    of ``varied``."""
    varied: Config = field(default_factory=dict, compare=False)

    def of_space(self, space: Sequence[Mapping[str, Any]]) -> Self:
        """Return it as it ranks all trials of a space by one loss; a part has choices, or a
        distribution, by key."""
        fixed = {}
        varied = {}
        defaults = loss_defaults(self.loss) | {
            LOSS_PREFIX + name: value for name, value in self.numbers.items()
        }
        for name in sorted({key for part in space for key in part if key.startswith(LOSS_PREFIX)}):
            choices = [part.get(name) for part in space]
            values = [one[0] for one in choices if isinstance(one, list) and len(one) == 1]
            if len(values) == len(space) and len(set(map(repr, values))) == 1:
                fixed[name] = values[0]
            else:
                varied[name] = defaults.get(name, inspect.Parameter.empty)
        return replace(self, fixed=fixed, varied=varied)

    def remarks_on_neg_loss(self) -> tuple[str, ...]:
        """Return what to know of a ranking by the loss where trials are trained on several, a
        sentence each."""
        defaults = ", ".join(f"{name}={value!r}" for name, value in self.varied.items())
        remark = (
            f"neg_loss of each trial is of the loss with {defaults}, its default: losses of other "
            "values do not compare. Search one value alone to score with it, or in Python give a "
            "function as scoring"
        )
        return (remark,) if defaults else ()

    def like(self, dtype: torch.dtype, device: torch.device) -> Self:
        """Return the objective with the numbers of its loss, such as class weights, in a dtype and
        on a device."""
        if not isinstance(self.loss, nn.Module):
            return self
        tensors = (*self.loss.parameters(), *self.loss.buffers())
        if all(
            (x.dtype == dtype or not x.is_floating_point()) and x.device == device for x in tensors
        ):
            return self
        return replace(self, loss=copy.deepcopy(self.loss).to(device, dtype))

    @property
    def name(self) -> str:
        """What a study calls it."""
        augment = "" if self.augment is None else f", augment={qualified_name(self.augment)}"
        return f"{self.in_words.removeprefix('the loss ')}{augment}"

    @property
    def in_words(self) -> str:
        """What makes a loss of a minibatch, as errors call it."""
        if self.step is not None:
            return f"training_step={qualified_name(self.step)}"
        numbers = "".join(f":{number:g}" for number in self.numbers.values())
        return (
            "the loss "
            f"{self.loss + numbers if isinstance(self.loss, str) else qualified_name(self.loss)}"
        )

    def name_unless_default(self, task: Task) -> str:
        """Return its name, "" where it is the task's own loss and nothing else."""
        return (
            ""
            if self == Objective(LOSS_OF_TASK.get(task, ""), binary=task == "binary")
            else self.name
        )

    @property
    def number(self) -> float:
        """The number by which a loss of numbers ranks all trials: its delta or its level; 0 if it
        takes none."""
        if not isinstance(self.loss, str) or self.loss not in LOSSES:
            return 0.0
        for name, of in LOSSES[self.loss].arguments.items():
            default = self.numbers.get(name, of.default)
            number: float = self.fixed.get(LOSS_PREFIX + name, default)
            return number
        return 0.0

    @property
    def one_logit(self) -> bool:
        """Whether a module is asked for one logit a row of two classes."""
        of_one = self.loss == "bce" or isinstance(self.loss, nn.BCEWithLogitsLoss)
        return self.binary and self.step is None and of_one

    @property
    def may_be_one_logit(self) -> bool:
        """Whether a module may return one logit a row of two classes: all but the cross-entropy
        leave that to it."""
        return self.binary and (self.step is not None or self.loss != "cross_entropy")

    @property
    def is_named(self) -> bool:
        """Whether it is a loss that has a name, which knows all members at once."""
        return self.step is None and isinstance(self.loss, str)

    def check(self, config: Config) -> None:
        """Raise InputError for a ``loss__*`` value that the loss does not take."""
        for name, value in loss_arguments(config).items():
            if words := self._refusal(name, value):
                raise InputError(f"space: {LOSS_PREFIX}{name} {words}.")

    def _refusal(self, name: str, value: object) -> str:
        """Return why the loss does not take a value; "" where it does."""
        if self.step is not None:
            return "has no loss to go to beside training_step; leave it out"
        if isinstance(self.loss, str):
            arguments = LOSSES[self.loss].arguments
            if name not in arguments:
                return (
                    f"is none of loss={self.loss!r}, which takes "
                    f"{', '.join(arguments) or 'no numbers'}"
                )
            return (
                ""
                if arguments[name].holds(value)
                else f"must be {arguments[name].rule()}, got {value!r}"
            )
        if isinstance(self.loss, nn.Module):
            name = type(self.loss).__name__
            return (
                f"has nowhere to go, since the loss is an instance of {name}; pass the class, "
                f"loss={name}"
            )
        signature = inspect.signature(self.loss)
        if name in signature.parameters or any(
            p.kind is p.VAR_KEYWORD for p in signature.parameters.values()
        ):
            return ""
        return (
            f"is no argument of the loss {qualified_name(self.loss)}{signature}; remove it or "
            "rename it"
        )

    def values(self, configs: Sequence[Config], like: Tensor) -> dict[str, Tensor]:
        """Return the numbers that a loss takes, by name, each (C, 1) as ``like`` is; none that are
        all 0."""
        numbers = {}
        for name, of in (
            LOSSES[self.loss].arguments.items()
            if self.step is None and isinstance(self.loss, str)
            else ()
        ):
            default = self.numbers.get(name, of.default)
            row = [float(config.get(LOSS_PREFIX + name, default)) for config in configs]
            if any(row):
                numbers[name] = like.new_tensor(row)[:, None]
        return numbers

    def rows(self, outputs: Tensor, y: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Return the row losses (..., C, B) of outputs (..., C, B, K), by a loss that has a
        name."""
        assert isinstance(self.loss, str)
        return LOSSES[self.loss].rows(outputs, y, **values)

    def outputs(
        self, module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str] | None
    ) -> Tensor:
        """Return what a module predicts of its inputs: of several heads, for a step of the user's
        own, the first."""
        outputs = call_module(module, self._to_give(inputs), names)
        return outputs if self.step is None else first_output(outputs)

    def _to_give(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the tensors that the user's code gets in the place of these."""
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
        """Return the losses of a module on a minibatch, (B,) or a mean; ``absent`` (K,) are classes
        without a part."""
        inputs = self._to_give(inputs)
        if self.step is not None:
            (y,) = self._to_give([y])
            return self.step(module, (_as_argument(inputs, names), y))
        outputs = call_module(module, inputs, names)
        if not self.is_named:
            (y,) = self._to_give([y])
            return self.member_loss(config)(outputs, y)
        outputs = outputs if outputs.dim() > 1 else outputs[:, None]
        if outputs.dtype == torch.bfloat16:  # of autocast: the loss is of single precision
            outputs = outputs.float()
        if absent is not None:
            outputs = outputs.masked_fill(absent, -torch.inf)
        return self.rows(outputs[None], y[None], self.values([config], outputs))[0]

    def augmented(
        self, inputs: Sequence[Tensor], names: Sequence[str] | None, seed: int, key: tuple[int, int]
    ) -> Sequence[Tensor]:
        """Return a minibatch (F, B, ...), each fold's augmented with the same draws; InputError for
        other shapes."""
        if self.augment is None:
            return inputs
        folds = []
        for fold in range(len(inputs[0])):
            # Copies: steps that augment are not recorded, so that it may write into any minibatch,
            # or into some.
            minibatch = [x[fold].clone() for x in inputs]
            generator = torch.Generator(inputs[0].device).manual_seed(
                stream_seed(seed, "augment", *key)
            )
            augmented = self.augment(_as_argument(minibatch, names), generator)
            if isinstance(augmented, Mapping):
                augmented = [augmented.get(name) for name in names or augmented]
            augmented = list(augmented) if isinstance(augmented, tuple | list) else [augmented]
            shapes = [
                tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in augmented
            ]
            if shapes != (expected := [tuple(x.shape) for x in minibatch]):
                raise InputError(
                    f"augment: {qualified_name(self.augment)} must return inputs of the shapes "
                    f"that it is given, {expected}, got {shapes}."
                )
            folds.append(augmented)
        return [torch.stack(parts) for parts in zip(*folds)]

    def neg_loss(self, outputs: Tensor, y: Tensor) -> float:
        """Return minus the mean loss of one member's outputs, the same loss for each trial; see
        ``of_space``."""
        if self.is_named:
            losses = self.rows(
                outputs[None, None], y[None, None], self.values([self.fixed], outputs)
            )
        else:
            own = self.like(outputs.dtype, outputs.device)
            losses = own.member_loss(self.fixed)(outputs, y)
        return -float(losses.double().mean())

    def member_loss(self, config: Config) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the user's loss of one member's outputs, with a configuration's values: row losses
        or a mean."""
        loss = self.loss
        values = loss_arguments(config)
        if isinstance(loss, type):
            loss = loss(**values)
            values = {}
        assert not isinstance(loss, str)
        if not isinstance(loss, nn.Module):
            return partial(loss, **values)
        ignored = getattr(loss, "ignore_index", None)
        # A mean without ignored rows is not that of row losses. Classes count from 0, a custom
        # target has any numbers.
        return loss if ignored is not None and (self.any_outputs or ignored >= 0) else by_rows(loss)


def _as_argument(inputs: Sequence[Tensor], names: Sequence[str] | None) -> object:
    """Return inputs as a user's function gets them: one alone, a tuple of several, a dict of those
    with names."""
    if names is not None:
        return dict(zip(names, inputs, strict=True))
    return inputs[0] if len(inputs) == 1 else tuple(inputs)


def pairs_all_rows(
    function: Callable[[Tensor, Tensor], object], outputs: Tensor, y: Tensor
) -> bool:
    """Whether a loss or score compares each output with all of y, as torch broadcasts (B, 1) and
    (B,) to (B, B).

    It then does not change with the order of y, and is another one of outputs and y of the same
    shape.
    """
    rows = len(y)
    shapes = {tuple(outputs.shape), tuple(y.shape)}
    if shapes != {(rows,), (rows, 1)} or rows < 2:
        return False
    # rows that are all equal would not change with any order
    steps = torch.arange(len(y), device=y.device) % 2
    outputs = outputs.double() + 0.01 * steps.view(outputs.shape) * bool(
        (outputs == outputs[:1]).all()
    )
    y = steps.view(y.shape).to(y.dtype) if bool((y == y[:1]).all()) else y
    y = y.double() if y.is_floating_point() else y

    def mean(outputs: Tensor, y: Tensor) -> Tensor | None:
        with (
            contextlib.suppress(Exception),
            torch.no_grad(),
            warnings.catch_warnings(action="ignore"),
            keyed_draws(torch.device("cpu"), 0, "check"),
        ):
            return torch.as_tensor(function(outputs.clone(), y.clone())).double().mean()
        return None  # it takes no such shapes

    def same(other: Tensor | None) -> bool:
        return (
            whole is not None
            and other is not None
            and torch.allclose(whole, other, rtol=1e-12, atol=1e-14)
        )

    whole = mean(outputs, y)
    n = len(y)
    aligned = [mean(outputs.view(shape), y.view(shape)) for shape in ((n,), (n, 1))]
    return same(mean(outputs, y.roll(1, 0))) and not any(map(same, aligned))


def loss_arguments(config: Config) -> Config:
    """Return the ``loss__*`` values of a configuration under the names that the loss knows."""
    return {k.removeprefix(LOSS_PREFIX): v for k, v in config.items() if k.startswith(LOSS_PREFIX)}


def loss_defaults(loss: object) -> Config:
    """Return the default of each ``loss__*`` value: those of a loss's signature, or of all losses
    that have a name."""
    if isinstance(loss, str):
        loss, numbers = parse_loss(loss)
        named = {LOSS_PREFIX + name: value for name, value in numbers.items()}
        return loss_defaults(None) | named
    if callable(loss) and not isinstance(loss, nn.Module):
        parameters = inspect.signature(loss).parameters.items()
        return {LOSS_PREFIX + name: p.default for name, p in parameters if p.default is not p.empty}
    return {
        LOSS_PREFIX + name: a.default for of in LOSSES.values() for name, a in of.arguments.items()
    }


def qualified_name(value: object) -> str:
    """Return the module and name of a function or class, of an object that of its class."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '')}:{named.__qualname__}"


def make_objective(loss: Any, step: Any, augment: Any, task: Task) -> Objective:
    """Return the checked objective, by default the task's own loss; InputError for none, or one
    that does not fit."""
    for name, value in (("training_step", step), ("augment", augment)):
        if value is not None and not callable(value):
            raise InputError(f"{name} must be a function, got {value!r}.")
    if step is not None and loss is not None:
        raise InputError(
            "training_step returns the loss itself, so loss has nothing to do; leave one of them "
            "out."
        )
    numbers: dict[str, float] = {}
    if isinstance(loss, str):
        loss, numbers = parse_loss(loss)
    loss = loss_fitting(loss, task)
    if loss is None and step is None and task == "custom":
        remedy = "give loss=callable(outputs, y), or training_step=callable(module, batch)"
        raise InputError(f"a custom target has no loss of its own; {remedy}.")
    if loss is None:
        loss = LOSS_OF_TASK.get(task, "")
    elif not (loss in LOSSES if isinstance(loss, str) else callable(loss)):
        near = did_you_mean(loss, LOSSES) if isinstance(loss, str) else ""
        names = ", ".join(map(repr, LOSSES))
        raise InputError(
            f"loss must be one of {names}, a torch.nn loss, or callable(outputs, y), got "
            f"{loss!r}.{near}"
        )
    elif isinstance(loss, str) and task not in LOSSES[loss].tasks:
        fitting = ", ".join(repr(name) for name, of in LOSSES.items() if task in of.tasks)
        raise InputError(
            f"loss={loss!r} does not fit a {task} target; choose {fitting or 'a loss of your own'}."
        )
    return Objective(
        loss, step, augment, any_outputs=task == "custom", binary=task == "binary", numbers=numbers
    )
