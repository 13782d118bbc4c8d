"""A trial of a user's module on a few rows, and the messages about its problems."""

import copy
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset, outermost_rows
from gputune.errors import InputError
from gputune.modules.broadcasts import BroadcastWatch, Shapes, in_one_shape
from gputune.modules.calls import convert
from gputune.modules.construction import (
    Builder,
    build_module,
    hint,
    name_of,
    note_of_cast,
    outputs_hint,
)
from gputune.modules.draw_watch import DrawWatch, Trail
from gputune.modules.probabilities import LikelihoodWatch
from gputune.modules.write_watch import WriteWatch
from gputune.population.population import Shape, call_module, module_arguments
from gputune.scoring.losses import refuse_one_number
from gputune.scoring.objective import Objective, make_objective, pairs_all_rows, qualified_name
from gputune.seeding import keyed_draws
from gputune.types import Config

_CPU = torch.device("cpu")
# Number of rows that are tried. It is prime, so a wrong view of their columns cannot divide it.
_EXAMPLES = 31


class ModuleTrial:
    """A module, the rows on which it is tried, and the messages about its problems."""

    def __init__(
        self,
        builder: Builder,
        config: Config,
        data: Dataset,
        columns: str = "",
        objective: Objective | None = None,
    ) -> None:
        objective = objective or make_objective(None, None, None, data.task)
        self.objective = objective.like(data.dtype, _CPU)
        self.builder = builder
        self.config = config
        self.columns = columns
        self.name = name_of(builder)
        inputs, y = data.example(_EXAMPLES)
        self.inputs = [x.cpu() for x in inputs]
        self.y = y.cpu()
        self.shape = replace(Shape.of(data), folds=1, device=_CPU, present=None, rows=None)
        self.writes = WriteWatch()
        self.widest = 1  # most numbers that a submodule has returned for one row
        module = build_module(
            builder, module_arguments(config), self.shape, seed=0, columns=columns
        )
        # a sentence about a tensor of the module with a dtype chosen by its builder
        self.cast = note_of_cast(module, data.dtype)
        self.module = convert(module, data.dtype)
        self.trail = Trail(self.module)
        loss = self.objective.loss
        step = self.objective.step
        augment = self.objective.augment
        self.watch = DrawWatch(self.module, loss, step, augment)

    def fresh(self) -> nn.Module:
        """Return a new module from the builder."""
        module = build_module(self.builder, module_arguments(self.config), self.shape, seed=0)
        return convert(module, self.shape.dtype)

    def of_module(self, module: nn.Module) -> Self:
        """Return this trial with another module."""
        other = copy.copy(self)
        other.module = module
        return other

    def in_double(self) -> Self:
        """Return this trial with floats in double precision. Its module does not change."""
        double = copy.copy(self)
        *double.inputs, double.y = (
            x.double() if x.is_floating_point() else x for x in (*self.inputs, self.y)
        )
        kinds = tuple((tuple(x.shape[1:]), x.dtype) for x in double.inputs)
        double.shape = replace(self.shape, dtype=torch.float64, inputs=kinds)
        return double

    def check_ids(self, data: Dataset) -> None:
        """Raise InputError if a row of the data has an id that an embedding has no place for.

        The module runs on the rows with the largest and the smallest number of each column. Other
        errors are ignored here, because other checks report them.
        """
        embeddings = [
            (path, part)
            for path, part in self.module.named_modules()
            if isinstance(part, nn.Embedding)
        ]
        if not embeddings:
            return
        rows = torch.tensor(
            sorted({row for x in data.inputs for row in outermost_rows(x[0])}), dtype=torch.int64
        )
        inputs = [x.cpu() for x in data.rows(0, rows.to(data.device))]
        wrong = list[str]()

        def check(path: str, part: nn.Embedding, arguments: tuple[object, ...]) -> None:
            ids = arguments[0]
            size = part.num_embeddings
            if (
                not isinstance(ids, Tensor)
                or ids.is_floating_point()
                or ids.dim() == 0
                or ids.numel() == 0
            ):
                return  # the embedding raises an error itself
            number = most if (most := int(ids.max())) >= size else int(ids.min())
            if 0 <= number < size:
                return
            row = ""
            own = inputs
            if len(ids) == len(rows):  # otherwise the forward pass has made other rows
                place = int((ids == number).nonzero()[0, 0])
                row = f" in row {int(rows[place])}"
                own = [x[place] for x in inputs]
            holder = next(
                (label for label, x in zip(data.labels, own) if bool((x == number).any())), None
            )
            where = (
                f"the forward of {self.name} makes the id"
                if holder is None
                else f"{holder} has the id"
            )
            remedy = (
                "give such ids other numbers"
                if number < 0
                else f"give it num_embeddings={number + 1} or more"
            )
            scaled = holder is None and any(x.is_floating_point() for x in own)
            wrong.append(
                f"model: {where} {number}{row}, and the embedding {path!r} of {self.name} has "
                f"{size} places, for ids 0 to {size - 1}; {remedy}.{_SCALED * scaled}"
            )

        hooks = [part.register_forward_pre_hook(partial(check, path)) for path, part in embeddings]
        with torch.no_grad(), suppress(Exception):
            call_module(self.module.eval(), [x.clone() for x in inputs], data.names)
        for hook in hooks:
            hook.remove()
        if wrong:
            raise InputError(wrong[0])

    def numbers(self) -> dict[str, float]:
        """Return the Python numbers in the attributes of the submodules."""
        return {
            f"{path}.{name}".lstrip("."): value
            for path, part in self.module.named_modules()
            for name, value in vars(part).items()
            if isinstance(value, int | float) and name != "training"
        }

    def forward(self, inputs: Sequence[Tensor], *, training: bool, watched: bool = False) -> Tensor:
        """Return the outputs on some rows, always with the same draws.

        With ``watched``, the draws are noted.
        """
        self.trail.largest = 0  # reset, because earlier calls may have had other numbers of rows
        try:
            draws = (
                self.watch.watching(training=training)
                if watched
                else keyed_draws(_CPU, 0, "check", host=True)
            )
            with self.writes.copies(inputs) as own, draws, torch.set_grad_enabled(training):
                outputs = self.objective.outputs(self.module.train(training), own, self.shape.names)
        except Exception as error:
            takes = " and ".join(map(in_words, inputs))
            place = self.trail.submodule and f" ({self.trail.submodule})"
            raise InputError(
                f"model: the forward of {self.name}{place} raised {type(error).__name__}: "
                f"{error}. It must take {takes} and return (rows, "
                f"{self.shape.n_outputs}).{hint(str(error), inputs)}"
                f"{self.cast if 'dtype' in str(error) else ''}{self.columns}"
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
        found = _found(losses)
        if found not in ((), (rows,)):
            what = (
                f"row losses of shape (rows,) or their mean, a tensor (), got {found} for {rows} "
                "rows"
            )
            raise InputError(f"{name} must return {what}.")
        if not losses.requires_grad:
            raise InputError(
                f"{name} gives no gradient: what it returns does not depend on the parameters of "
                f"{self.name}. Compute it of the module's outputs by operations of torch, without "
                "detach(), item() or torch.no_grad()."
            )
        if self.objective.is_named:
            return losses.detach()
        if not bool(losses.isfinite().all()):
            raise InputError(
                f"{name} is not finite on the first rows; check its inputs and its formula."
            )
        # Without a step, the loss itself is tried on outputs and targets of different rows.
        if self.objective.step is None and pair is None:
            outputs = self.forward(self.inputs, training=False)
            if pairs_all_rows(self.objective.member_loss(self.config), outputs, self.y):
                pair = tuple(outputs.shape), tuple(self.y.shape)
        elif pair is not None:  # unless its sizes are equal by chance
            _, of_fewer_rows = self._try_loss([x[1:] for x in self.inputs], self.y[1:])
            pair = None if of_fewer_rows is None else pair
        if pair is not None:
            place = "training_step" if self.objective.step else "loss"
            raise InputError(
                f"{name} compares each output with the targets of all rows: the outputs of "
                f"{self.name} have shape {pair[0]} and y {pair[1]}, which torch broadcasts to "
                f"({rows}, {rows}). {in_one_shape(pair, place)}"
            )
        return losses.detach()

    def _try_loss(self, inputs: Sequence[Tensor], y: Tensor) -> tuple[Tensor, Shapes | None]:
        """Return the losses of some rows, and the shapes that were compared across rows, if any."""
        copies = self.writes.copies([*inputs, y])
        try:
            watching = self.watch.watching(training=True)
            with copies as (*own, own_y), torch.enable_grad(), warnings.catch_warnings(), watching:
                warnings.filterwarnings(
                    "ignore", "Using a target size .* that is different to the input size"
                )
                watch = BroadcastWatch(own_y)
                likelihoods = LikelihoodWatch()
                watches = ExitStack()
                if not self.objective.is_named:
                    watches.enter_context(watch)
                    watches.enter_context(likelihoods)
                with watches:
                    step = self.module.train(), own, own_y, self.config
                    losses = self.objective.losses(*step, names=self.shape.names)
        except Exception as error:
            says = str(error).rstrip(".")
            name = self.objective.in_words
            raise InputError(
                f"{name} raised {type(error).__name__}: {says}. {self._what_a_loss_gets()}"
            ) from error
        if likelihoods.found:
            raise InputError(self._wrong_likelihood(likelihoods))
        return losses, watch.pair

    def _wrong_likelihood(self, watch: LikelihoodWatch) -> str:
        """Return an error message for a loss that passes logits or probabilities to a
        likelihood."""
        end = ", without the softmax before it" * (watch.found == "probabilities")
        remedy = "Use torch.nn.functional.cross_entropy there"
        return (
            f"{self.objective.in_words} passes {watch.found} to {watch.function}, which takes the "
            f"logarithms of probabilities. {remedy}{end}, or take log_softmax(1) before."
        )

    def _what_a_loss_gets(self) -> str:
        """Return a sentence about the arguments of the loss, for an error that it raised."""
        y = f"{tuple(self.y.shape)} and {self.y.dtype}"
        if self.objective.step is not None:
            x = " and ".join(map(in_words, self.inputs))
            return (
                f"It is called as training_step(module, (x, y)), x {x}, y {y}, and returns row "
                "losses or a mean."
            )
        outputs = self.forward(self.inputs, training=False)
        remedy = ""
        if self.objective.binary and outputs.numel() == len(self.y):
            remedy = " One logit a row of two classes takes loss='bce'."
        elif not self.objective.any_outputs:
            kind, other = (
                ("numbers", "classification")
                if self.y.is_floating_point()
                else ("classes", "regression")
            )
            remedy = f" y is {kind} here; task='{other}' takes it the other way."
        return (
            f"The outputs of {self.name} have shape {tuple(outputs.shape)} and type "
            f"{outputs.dtype}, y {y}; make them fit.{remedy}"
        )

    def augmented(self, rows: slice) -> list[Tensor]:
        """Return some rows of the inputs, changed by the user's ``augment``.

        Raises InputError if that fails. The rows are selected before the call, because the numbers
        that torch.randn draws depend on their count.
        """
        inputs = [x[rows] for x in self.inputs]
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
            raise InputError(
                f"augment: {qualified_name(self.objective.augment)} raised "
                f"{type(error).__name__}: {error}. It is called as augment(x, generator), with "
                "the inputs of a minibatch, and returns such inputs."
            ) from error

    def draws_in_augment(self) -> str:
        """Return the reason why two calls of augment change the same rows differently, or ""."""
        if self.objective.augment is None:
            return ""
        rows = slice(0, len(self.y))
        first = self.augmented(rows)
        second = self.augmented(rows)
        if all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second)):
            return ""
        return (
            f"augment={qualified_name(self.objective.augment)} draws random numbers without the "
            "generator that it is given; pass generator=generator to each operation that draws"
        )

    def check_outputs(self, outputs: object) -> None:
        """Raise InputError for outputs with a shape that the loss does not take."""
        rows = len(self.inputs[0])
        n_outputs = self.shape.n_outputs
        if self.fits(outputs, rows):
            return
        usual = _of_shape(found := _found(outputs), n_outputs, binary=self.objective.binary)
        if isinstance(found, tuple) and len(found) == 2:
            usual += outputs_hint(self.builder, module_arguments(self.config), found[1], n_outputs)
        if not self.objective.is_named:
            place = "training_step" if self.objective.step else "loss of your own"
            usual += (
                f" With task='custom' and scoring=callable(outputs, y) a {place} may have any "
                "outputs."
            )
        raise InputError(
            f"model: {self.name} must return a tensor of shape (rows, {n_outputs}), got {found} "
            f"for {rows} rows; its last layer must have n_outputs outputs (logits for "
            f"classes).{usual}{self.columns}"
        )

    def fits(self, outputs: object, rows: int) -> bool:
        """Return whether outputs for ``rows`` rows have a shape that the loss takes."""
        found = _found(outputs)
        n_outputs = self.shape.n_outputs
        if self.objective.any_outputs:
            return found[:1] == (rows,)
        one = n_outputs == 1 or self.objective.may_be_one_logit
        return found == (rows, n_outputs) or (one and found in ((rows,), (rows, 1)))

    def check_trainable(self, outputs: Tensor) -> None:
        """Raise InputError if the outputs, computed in training, depend on no parameter."""
        if not outputs.requires_grad or not any(w.requires_grad for w in self.module.parameters()):
            raise InputError(
                f"model: {self.name} has nothing to train: its outputs depend on no parameter "
                "with requires_grad. Give it one, and do not detach what it returns."
            )

    def is_alone(self, outputs: Tensor) -> bool:
        """Return whether an output in evaluation mode depends only on its own row.

        ``outputs`` are the outputs of all tried rows.
        """
        if not self.watch.draws_in_evaluation:
            few = self.forward([part[:2] for part in self.inputs], training=False)
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
            return self.fits(self.forward([part[:1] for part in self.inputs], training=True), 1)
        return False


_SCALED = (
    " The numbers of a table are scaled: pass a tensor of integers, torch.as_tensor(X), or "
    "numbers='none', which leaves codes as they are."
)


def is_close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding. NaN equals NaN."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


def at_start(trial: ModuleTrial, outputs: Tensor, losses: Tensor) -> str:
    """Return a sentence about outputs or losses that are not finite before training, or "".

    An output of -inf for a class is allowed.
    """
    if bool(losses.isfinite().all()) and not bool((outputs.isnan() | (outputs == torch.inf)).any()):
        return ""
    what = "outputs that are" if not bool(outputs.isfinite().all()) else "a loss that is"
    arguments = ", ".join(f"{k}={v!r}" for k, v in module_arguments(trial.config).items())
    return (
        f"{trial.name}({arguments}) gives {what} not finite on the first training rows, before "
        "anything has trained; look in its forward for a division by zero, the logarithm of 0 or "
        "a root of it, and for inputs that are too large, which numbers='standard' scales."
    )


def _of_shape(found: tuple[int, ...] | str, n_outputs: int, *, binary: bool) -> str:
    """Return a sentence about the usual cause of such outputs."""
    if isinstance(found, str):
        several = found in ("tuple", "list", "dict")
        return " Of several outputs return the first, or train them by training_step." * several
    if binary and n_outputs == 2 and (len(found) == 1 or found[1:] == (1,)):
        return " A target of two classes takes two logits a row, or one with loss='bce'."
    if binary and n_outputs == 1 and found[1:] == (2,):
        return " Two logits a row of two classes take loss='cross_entropy'."
    return " Axes beside the rows are to be pooled or flattened away." * (len(found) > 2)


def _found(value: object) -> tuple[int, ...] | str:
    """Return the shape of a tensor, or the name of the type of another value."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def in_words(x: Tensor) -> str:
    """Return the type and the shape of an input in words. Integers include their range."""
    name = str(x.dtype).removeprefix("torch.")
    shape = ", ".join(["rows", *map(str, x.shape[1:])])
    if x.is_floating_point():
        return f"a float tensor of shape ({shape})"
    kind = f"{'an' if name.startswith('i') else 'a'} {name} tensor of shape ({shape})"
    return f"{kind} of values from {int(x.min())} to {int(x.max())}"
