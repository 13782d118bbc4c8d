"""Tries a user's module on a few rows, and describes the module's problems in messages.

Draws are random numbers, for example of dropout. A ModuleTrial is not a trial of the search.
"""

import copy
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.ground.device import CPU
from gputune.ground.errors import InputError, Verbatim, option, per_interface
from gputune.ground.seeding import keyed_draws
from gputune.ground.types import Config
from gputune.modules.broadcasts import BroadcastWatch, Shapes, in_one_shape
from gputune.modules.calls import convert
from gputune.modules.construction import (
    Builder,
    build_module,
    call_text,
    hint,
    name_of,
    note_of_cast,
    outputs_hint,
)
from gputune.modules.draw_watch import DrawWatch, Trail
from gputune.modules.error_places import describe_error
from gputune.modules.output_shapes import check_fields, describe_tensor, shape_hint, shape_of
from gputune.modules.pretrained import dtype_of, pretrained_of
from gputune.modules.probabilities import LikelihoodWatch
from gputune.modules.token_limits import too_long
from gputune.modules.write_watch import WriteWatch
from gputune.population.outputs import in_mode
from gputune.population.population import Shape, module_arguments
from gputune.scoring.losses import pairs_all_rows, refuse_one_number
from gputune.scoring.objective import Objective, make_objective, qualified_name

# Number of rows that are tried. It is prime, so a wrong view of their columns cannot divide it.
_EXAMPLES = 31
# The same for a pretrained module, for which a pass of a row takes long. In 16 bits, more rows are
# needed to tell a wrong gradient from rounding.
_FEW_EXAMPLES = 7
_FEW_ROUNDED_EXAMPLES = 13


class ModuleTrial:
    """Tries a user's module on a few rows before training, and raises errors that describe its
    problems."""

    def __init__(
        self,
        builder: Builder,
        config: Config,
        data: Dataset,
        columns: str = "",
        objective: Objective | None = None,
    ) -> None:
        objective = objective or make_objective(None, None, None, data.task)
        self.objective = objective.like(data.dtype, CPU)
        self.builder = builder
        self.config = config
        self.columns = columns
        self.name = name_of(builder)
        inputs, y = data.example(_n_examples(builder))
        self.inputs = [x.cpu() for x in inputs]
        self.y = y.cpu()
        self.shape = replace(Shape.of(data).of_one_fold(), device=CPU)
        self.writes = WriteWatch()
        self.widest = 1  # most numbers that a submodule has returned for one row
        module = build_module(
            builder, module_arguments(config), self.shape, seed=0, columns=columns
        )
        # a sentence about a tensor of the module with a dtype chosen by its builder
        self.cast_note = note_of_cast(module, data.dtype)
        self.module = convert(module, data.dtype)
        self.trail = Trail(self.module)
        loss = self.objective.loss
        step = self.objective.step
        augment = self.objective.augment
        self.watch = DrawWatch(self.module, loss, step, augment)

    def fresh(self) -> nn.Module:
        """Build and return a new, untrained module."""
        module = build_module(self.builder, module_arguments(self.config), self.shape, seed=0)
        return convert(module, self.shape.dtype)

    def of_module(self, module: nn.Module) -> Self:
        """Return a copy of this ModuleTrial that tries another module."""
        other = copy.copy(self)
        other.module = module
        return other

    def in_double(self) -> Self:
        """Return a copy of this ModuleTrial in double precision. The original module does not
        change."""

        def double(x: Tensor) -> Tensor:
            return x.double() if x.is_floating_point() else x

        trial = copy.copy(self)
        trial.inputs = list(map(double, self.inputs))
        trial.y = double(self.y)
        kinds = tuple((tuple(x.shape[1:]), x.dtype) for x in trial.inputs)
        trial.shape = replace(self.shape, dtype=torch.float64, inputs=kinds)
        return trial

    def rows(self, part: slice) -> list[Tensor]:
        """Return a slice of the tried rows, one tensor for each input of the module."""
        return [x[part] for x in self.inputs]

    def numbers(self) -> dict[str, float]:
        """Return the attributes of the submodules that are numbers of Python or NumPy, such as
        counters."""
        numbers = {}
        for path, part in self.module.named_modules():
            for name, value in vars(part).items():
                is_number = isinstance(value, int | float | np.integer | np.floating | np.bool_)
                if is_number and name != "training":
                    numbers[f"{path}.{name}".lstrip(".")] = value
        return numbers

    def forward(self, inputs: Sequence[Tensor], *, training: bool, watched: bool = False) -> Tensor:
        """Return the module's outputs for some rows. Every call uses the same random numbers.

        With ``watched``, ``watch`` notes how the call makes random numbers.
        """
        self.trail.largest = 0  # reset, because earlier calls may have had other numbers of rows
        try:
            draws = keyed_draws(CPU, 0, "check", host=True)
            if watched:
                draws = self.watch.watching(training=training)
            with (
                self.writes.copies(inputs) as copies,
                draws,
                torch.set_grad_enabled(training),
                self.trail.following(),
            ):
                module = in_mode(self.module, training=training)
                outputs = self.objective.outputs(module, copies, self.shape.names)
        except Exception as error:
            if long := too_long(self.module, inputs, self.name):
                raise long from error
            says = str(error)
            place = self.trail.submodule and f" ({self.trail.submodule})"
            cast_note = self.cast_note if "dtype" in says else ""
            raise InputError(
                None,
                f"The forward pass of {self.name}{place} raised {describe_error(error)}",
                remedy=f"It must take {' and '.join(map(describe_tensor, inputs))} and return "
                f"(rows, {self.shape.n_outputs}).{hint(says, inputs)}{cast_note}{self.columns}",
            ) from error
        self.widest = max(self.widest, self.trail.largest // len(inputs[0]))
        return outputs

    def losses(self) -> Tensor:
        """Return the losses of one step, per row or as a mean. Raises InputError for a loss that
        fails."""
        name = self.objective.in_words
        refuse_one_number(self.objective.loss, self.y)
        losses, pair = self._try_loss(self.inputs, self.y)
        rows = len(self.inputs[0])
        shape = shape_of(losses)
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
                f"{self.name}",
                remedy="Compute it from the outputs of the module with PyTorch operations, without "
                "detach(), item() or torch.no_grad().",
            )
        if self.objective.is_named:
            return losses.detach()
        if not bool(losses.isfinite().all()):
            rule = f"{name} is not finite on the first rows"
            raise InputError(None, rule, remedy="Check its inputs and its formula.")
        # Without a step, the loss itself is tried on outputs and targets of different rows.
        if self.objective.step is None and pair is None:
            outputs = self.forward(self.inputs, training=False)
            if pairs_all_rows(self.objective.member_loss(self.config), outputs, self.y):
                pair = tuple(outputs.shape), tuple(self.y.shape)
        elif pair is not None:  # unless its sizes are equal by chance
            _, of_fewer_rows = self._try_loss(self.rows(slice(1, None)), self.y[1:])
            pair = None if of_fewer_rows is None else pair
        if pair is not None:
            place = "training_step" if self.objective.step else "loss"
            raise InputError(
                None,
                f"{name} compares each output with the targets of all rows: the outputs of "
                f"{self.name} have shape {pair[0]} and y has shape {pair[1]}, which PyTorch "
                f"broadcasts to ({rows}, {rows})",
                remedy=in_one_shape(pair, place),
            )
        return losses.detach()

    def _try_loss(self, inputs: Sequence[Tensor], y: Tensor) -> tuple[Tensor, Shapes | None]:
        """Compute the losses of some rows. If outputs and targets broadcast across rows by mistake,
        also return their shapes."""
        copies = self.writes.copies([*inputs, y])
        try:
            watching = self.watch.watching(training=True)
            with (
                copies as (*copied, copied_y),
                torch.enable_grad(),
                warnings.catch_warnings(),
                watching,
                self.trail.following(),
            ):
                warnings.filterwarnings(
                    "ignore", "Using a target size .* that is different to the input size"
                )
                watch = BroadcastWatch(copied_y)
                likelihoods = LikelihoodWatch()
                watches = ExitStack()
                if not self.objective.is_named:
                    watches.enter_context(watch)
                    watches.enter_context(likelihoods)
                with watches:
                    module = in_mode(self.module, training=True)
                    losses = self.objective.losses(
                        module, copied, copied_y, self.config, names=self.shape.names
                    )
        except InputError:
            raise
        except Exception as error:
            rule = f"{self.objective.in_words} raised {describe_error(error)}"
            raise InputError(None, rule, remedy=self._loss_remedy()) from error
        if likelihoods.kind:
            softmax = ""
            if likelihoods.kind == "probabilities":
                softmax = ", without the softmax before it"
            raise InputError(
                None,
                f"{self.objective.in_words} passes {likelihoods.kind} to {likelihoods.function}, "
                "which takes the logarithms of probabilities",
                remedy=f"Use torch.nn.functional.cross_entropy there{softmax}, or take "
                "log_softmax(1) before.",
            )
        return losses, watch.pair

    def _loss_remedy(self) -> str:
        """Return sentences that tell the user how gputune calls a loss that has raised an error."""
        y = f"y has shape {tuple(self.y.shape)} and type {self.y.dtype}"
        if self.objective.step is not None:
            x = " and ".join(map(describe_tensor, self.inputs))
            return (
                f"gputune calls training_step(module, (x, y)), where x is {x} and {y}. It must "
                "return row losses or their mean."
            )
        outputs = self.forward(self.inputs, training=False)
        remedy = ""
        if self.objective.binary and outputs.numel() == len(self.y):
            remedy = f" For one logit per row and two classes pass {option('loss', 'bce')}."
        elif not self.objective.any_outputs:
            kind = "classes"
            other = "regression"
            estimator = "NeuralNetRegressor"
            if self.y.is_floating_point():
                kind = "numbers"
                other = "classification"
                estimator = "NeuralNetClassifier"
            passed = f"Pass {option('task', other)}"
            change = per_interface(passed, passed, f"Use {estimator}")
            remedy = f" y is read as {kind}. {change} if it is not."
        return (
            f"The outputs of {self.name} have shape {tuple(outputs.shape)} and type "
            f"{outputs.dtype}, and {y}. Make them fit.{remedy}"
        )

    def augmented(self, rows: slice) -> list[Tensor]:
        """Return some rows of the inputs, changed by the user's ``augment``.

        Raises InputError if ``augment`` fails. The rows are selected before the call, because the
        random values of torch.randn depend on how many it draws.
        """
        inputs = self.rows(rows)
        if self.objective.augment is None:
            return inputs
        try:
            changed = self.objective.augmented(
                [x[None] for x in inputs], self.shape.names, 0, (0, 0)
            )
            return [x[0] for x in changed]
        except InputError:
            raise
        except Exception as error:
            function = qualified_name(self.objective.augment)
            raise InputError(
                None,
                f"{option(f'augment={function}')} raised {describe_error(error)}",
                remedy="gputune calls augment(x, generator) with the inputs of a minibatch. It "
                "must return inputs of the same form.",
            ) from error

    def draws_in_augment(self) -> str:
        """Call ``augment`` twice on the same rows. Return the reason if the results differ,
        otherwise ""."""
        if self.objective.augment is None:
            return ""
        rows = slice(0, len(self.y))
        first = self.augmented(rows)
        second = self.augmented(rows)
        if all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second)):
            return ""
        return (
            f"augment={qualified_name(self.objective.augment)} draws random numbers without its "
            "argument generator; pass generator=generator to each operation that draws"
        )

    def check_outputs(self, outputs: object) -> None:
        """Raise InputError if the outputs have a shape that the loss does not accept."""
        rows = len(self.inputs[0])
        n_outputs = self.shape.n_outputs
        if self.fits(outputs, rows):
            return
        check_fields(self.name, outputs)
        shape = shape_of(outputs)
        cause = shape_hint(shape, n_outputs, binary=self.objective.binary)
        if isinstance(shape, tuple) and len(shape) == 2:
            cause += outputs_hint(self.builder, module_arguments(self.config), shape[1], n_outputs)
        if not self.objective.is_named:
            function = "training_step" if self.objective.step else "custom loss"
            custom = "With task='custom' and scoring=callable(outputs, y)"
            custom = per_interface(custom, custom, "In gputune.sklearn.NeuralNet")
            cause += f" {custom}, the module of a {function} may return any outputs."
        last_layer = ""
        if isinstance(shape, tuple):
            logits = "" if self.shape.regression else " (logits for classes)"
            last_layer = f"Its last layer must have n_outputs outputs{logits}."
        raise InputError(
            None,
            f"{self.name} must return a tensor of shape (rows, {n_outputs})",
            got=Verbatim(f"{shape} for {rows} rows"),
            remedy=f"{last_layer}{cause}{self.columns}".strip(),
        )

    def fits(self, outputs: object, rows: int) -> bool:
        """Return whether outputs for ``rows`` rows have a shape that the loss accepts."""
        shape = shape_of(outputs)
        n_outputs = self.shape.n_outputs
        if self.objective.any_outputs:
            return shape[:1] == (rows,)
        may_be_one = n_outputs == 1 or self.objective.may_be_one_logit
        return shape == (rows, n_outputs) or (may_be_one and shape in ((rows,), (rows, 1)))

    def check_trainable(self, outputs: Tensor) -> None:
        """Raise InputError if the outputs in training mode depend on no parameter."""
        if not outputs.requires_grad or not any(w.requires_grad for w in self.module.parameters()):
            raise InputError(
                None,
                f"{self.name} has nothing to train: its outputs depend on no parameter with "
                "requires_grad",
                remedy="Give the module a trained parameter, and do not detach its outputs.",
            )

    def is_alone(self, outputs: Tensor) -> bool:
        """Return whether an output in evaluation mode depends only on its own row.

        ``outputs`` are the outputs of all tried rows.
        """
        if not self.watch.draws_in_evaluation:
            few = self.forward(self.rows(slice(2)), training=False)
            return is_close(few, outputs[:2])
        # With fewer rows, the draws would differ. Therefore the number of rows stays the same, and
        # the rows after the second are copies of the first.
        others = [
            torch.cat([part[:2], part[:1].expand(len(part) - 2, *part.shape[1:])])
            for part in self.inputs
        ]
        return is_close(self.forward(others, training=False)[:2], outputs[:2])

    def takes_one_row(self) -> bool:
        """Return whether the module can train on a minibatch of one row."""
        with suppress(InputError):
            return self.fits(self.forward(self.rows(slice(1)), training=True), 1)
        return False


def _n_examples(builder: Builder) -> int:
    """Return the number of rows on which gputune tries the modules of a builder."""
    pretrained = pretrained_of(builder)
    if pretrained is None:
        return _EXAMPLES
    is_rounded = dtype_of(pretrained.base).itemsize < 4
    return _FEW_ROUNDED_EXAMPLES if is_rounded else _FEW_EXAMPLES


def is_close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding. NaN equals NaN."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


def at_start(trial: ModuleTrial, outputs: Tensor, losses: Tensor) -> str:
    """Return a warning text about outputs or losses that are not finite before training.

    The text is "" if all are finite. An output of -inf for a class is allowed.
    """
    if bool(losses.isfinite().all()) and not bool((outputs.isnan() | (outputs == torch.inf)).any()):
        return ""
    results = "a loss that is" if bool(outputs.isfinite().all()) else "outputs that are"
    return (
        f"{call_text(trial.name, module_arguments(trial.config))} returns {results} not finite on "
        "the first training rows, before any training. Look in its forward pass for a division by "
        "zero, and for the logarithm or root of 0. If inputs are too large, "
        f"{option('numbers', 'standard')} scales them."
    )
