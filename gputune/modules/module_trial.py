"""A user's module with the rows on which it is tried, and the words of what is wrong with it."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.errors import InputError, InputWarning, warn
from gputune.modules.calls import convert, not_trained
from gputune.modules.construction import Builder, build_module, name_of
from gputune.modules.hints import Trail, hint
from gputune.modules.substitutes import counting_on_device
from gputune.modules.trace import DispatchMode
from gputune.population.population import Shape, module_arguments
from gputune.scoring.losses import refuse_one_number, wants_log_probabilities
from gputune.scoring.objective import Objective, make_objective, pairs_all_rows, qualified_name
from gputune.seeding import keyed_draws
from gputune.types import Config

_CPU = torch.device("cpu")
_EXAMPLES = 31  # rows that are tried: a prime number, which a wrong view of their columns does not divide


class ModuleTrial:
    """A module, the rows on which it is tried, and the words of what is wrong with it."""

    def __init__(
        self, builder: Builder, config: Config, data: Dataset, columns: str = "", objective: Objective | None = None
    ) -> None:
        self.objective = objective or make_objective(None, None, None, data.task)
        self.builder, self.config, self.columns, self.name = builder, config, columns, name_of(builder)
        inputs, y = data.example(_EXAMPLES)
        self.inputs, self.y = [x.cpu() for x in inputs], y.cpu()
        self.shape = replace(Shape.of(data), folds=1, device=_CPU, present=None, rows=None)
        self.widest, self.loss_draws, self.loss_decides = 1, False, False
        module = build_module(builder, module_arguments(config), self.shape, seed=0, columns=columns)
        self.module = convert(module, data.dtype)
        self.trail = Trail(self.module)

    def in_double(self) -> Self:
        """Return this trial with floats of double precision; its module stays as it is."""

        def widen(x: Tensor) -> Tensor:
            return x.double() if x.is_floating_point() else x

        double = copy.copy(self)
        double.inputs, double.y = [widen(x) for x in self.inputs], widen(self.y)
        kinds = tuple((tuple(x.shape[1:]), x.dtype) for x in double.inputs)
        double.shape = replace(self.shape, dtype=torch.float64, inputs=kinds)
        return double

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the buffers and frozen parameters as they are."""
        return {name: tensor.detach().clone() for name, tensor in not_trained(self.module).items()}

    @contextmanager
    def moved(self) -> Iterator[None]:
        """Move the trained parameters a little inside, so that what follows them moves too."""
        trained = [(w, w.detach().clone()) for w in self.module.parameters() if w.requires_grad]
        for w, before in trained:
            w.data = before + 0.01
        yield
        for w, before in trained:
            w.data = before

    def numbers(self) -> dict[str, float]:
        """Return the Python numbers that the submodules hold."""
        return {
            f"{path}.{name}".lstrip("."): value
            for path, part in self.module.named_modules()
            for name, value in vars(part).items()
            if isinstance(value, int | float) and name != "training"
        }

    @contextmanager
    def _watch(self) -> Iterator["_ReadRecorder"]:
        """Yield what notes whether a number of a tensor is read inside, and whether torch's generator is drawn from."""
        with keyed_draws(_CPU, 0, "check"):
            state = torch.get_rng_state()
            with counting_on_device(self.module), (seen := _ReadRecorder()):
                yield seen
            seen.draws = not torch.equal(state, torch.get_rng_state())

    def draws(self) -> tuple[bool, bool]:
        """Whether a forward in training takes numbers from torch's generator, and whether it then reads numbers."""
        with self._watch() as seen:
            self._call(self.inputs, training=True)
        return seen.draws, seen.draws and seen.reads

    def forward(self, inputs: Sequence[Tensor], *, training: bool) -> Tensor:
        """Return the outputs on some rows, always with the same draws."""
        with keyed_draws(_CPU, 0, "check"):
            return self._call(inputs, training=training)

    def _call(self, inputs: Sequence[Tensor], *, training: bool) -> Tensor:
        self.trail.largest = 0  # of other numbers of rows
        try:
            with torch.set_grad_enabled(training):
                outputs = self.objective.outputs(self.module.train(training), inputs, self.shape.names)
        except Exception as error:
            takes = " and ".join(map(in_words, inputs))
            raise InputError(
                f"model: the forward of {self.name}{self.trail} raised {type(error).__name__}: {error}. It must take "
                f"{takes} and return (rows, {self.shape.n_outputs}).{hint(str(error), inputs)}{self.columns}"
            ) from error
        self.widest = max(self.widest, self.trail.largest // len(inputs[0]))
        return outputs

    def losses(self) -> Tensor:
        """Return the losses of one step, of rows or their mean. Raises InputError for a loss that fails."""
        name = self.objective.in_words
        refuse_one_number(self.objective.loss, self.y)
        try:
            with torch.enable_grad(), warnings.catch_warnings(), self._watch() as seen:
                warnings.filterwarnings("ignore", "Using a target size .* that is different to the input size")
                module, names = self.module.train(), self.shape.names
                losses = self.objective.losses(module, self.inputs, self.y, self.config, names=names)
            self.loss_draws, self.loss_decides = seen.draws, seen.draws and seen.reads
        except Exception as error:
            raise InputError(
                f"{name} raised {type(error).__name__}: {str(error).rstrip('.')}. {self._what_a_loss_gets()}"
            ) from error
        rows = len(self.inputs[0])
        found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        if found not in ((), (rows,)):
            raise InputError(
                f"{name} must return row losses of shape (rows,) or their mean, a tensor (), got {found} for "
                f"{rows} rows."
            )
        if not losses.requires_grad:
            raise InputError(
                f"{name} gives no gradient: what it returns does not depend on the parameters of {self.name}. Compute "
                "it of the module's outputs by operations of torch, without detach(), item() or torch.no_grad()."
            )
        if not self.objective.is_named and not bool(losses.isfinite().all()):
            raise InputError(f"{name} is not finite on the first rows; check its inputs and its formula.")
        if not self.objective.is_named and self.objective.step is None:
            outputs = self.forward(self.inputs, training=False)
            if pairs_all_rows(self.objective.member_loss(self.config), outputs, self.y):
                raise InputError(
                    f"{name} compares each output with the targets of all rows: the outputs of {self.name} have shape "
                    f"{tuple(outputs.shape)} and y {tuple(self.y.shape)}, which torch broadcasts to ({rows}, {rows}). "
                    "Take outputs[:, 0] or y[:, None] in the loss, or return (rows,) from the module."
                )
        return losses.detach()

    def _what_a_loss_gets(self) -> str:
        """Say how the loss was called, for an error that it raised."""
        y = f"{tuple(self.y.shape)} and {self.y.dtype}"
        if self.objective.step is not None:
            x = " and ".join(map(in_words, self.inputs))
            return f"It is called as training_step(module, (x, y)), x {x}, y {y}, and returns row losses or a mean."
        outputs, remedy = self.forward(self.inputs, training=False), ""
        if self.objective.binary and outputs.numel() == len(self.y):
            remedy = " One logit a row of two classes takes loss='bce'."
        elif not self.objective.any_outputs:
            other = ("numbers", "classification") if self.y.is_floating_point() else ("classes", "regression")
            remedy = " y is {} here; task='{}' takes it the other way.".format(*other)
        return (
            f"The outputs of {self.name} have shape {tuple(outputs.shape)} and type {outputs.dtype}, y {y}; make them "
            f"fit.{remedy}"
        )

    def augmented(self) -> list[Tensor]:
        """Return the inputs as the user changes minibatches of training. Raises InputError where that fails."""
        if self.objective.augment is None:
            return list(self.inputs)
        try:
            of_a_fold = [x[None] for x in self.inputs]
            return [x[0] for x in self.objective.augmented(of_a_fold, self.shape.names, 0, (0, 0))]
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"augment: {qualified_name(self.objective.augment)} raised {type(error).__name__}: {error}. It is "
                "called as augment(x, generator), with the inputs of a minibatch, and returns such inputs."
            ) from error

    def warn_of_probabilities(self, outputs: Tensor) -> None:
        """Warn where outputs, computed in training, end in a softmax or a sigmoid that the loss has, or lack one."""
        if wants_log_probabilities(self.objective.loss, outputs):
            warn(
                f"{self.name} returns no log-probabilities, which {self.objective.in_words} wants: end it in "
                "log_softmax(1), or leave loss out.",
                InputWarning,
            )
        loss, end = self.objective.loss if self.objective.is_named else None, ""
        if loss == "cross_entropy" and outputs.shape[1:] != (1,):
            end = "softmax" * are_probabilities(outputs)
        elif loss == "bce":
            end = "sigmoid" * _ends_in_sigmoid(outputs)
        if end:
            warn(
                f"{self.name} returns probabilities, and the cross-entropy wants logits: leave out the {end} at its "
                "end.",
                InputWarning,
            )

    def check_outputs(self, outputs: object) -> None:
        """Raise InputError for outputs of another shape than the loss takes."""
        rows, n_outputs = len(self.inputs[0]), self.shape.n_outputs
        if self.fits(outputs, rows):
            return
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        usual = _of_shape(found, n_outputs, binary=self.objective.binary)
        if self.objective.step is not None:
            usual += " With task='custom' and scoring=callable(outputs, y) a training_step may have any outputs."
        raise InputError(
            f"model: {self.name} must return a tensor of shape (rows, {n_outputs}), got {found} for {rows} "
            f"rows; its last layer must have n_outputs outputs (logits for classes).{usual}"
            f"{self.columns}"
        )

    def fits(self, outputs: object, rows: int) -> bool:
        """Whether outputs of so many rows have a shape that the loss takes."""
        shape, n_outputs = tuple(outputs.shape) if isinstance(outputs, Tensor) else None, self.shape.n_outputs
        if self.objective.any_outputs:
            return shape is not None and shape[:1] == (rows,)
        one = n_outputs == 1 or self.objective.may_be_one_logit
        return shape == (rows, n_outputs) or (one and shape in ((rows,), (rows, 1)))

    def check_trainable(self, outputs: Tensor) -> None:
        """Raise InputError where the outputs, computed in training, depend on no parameter."""
        if not outputs.requires_grad or not any(w.requires_grad for w in self.module.parameters()):
            raise InputError(
                f"model: {self.name} has nothing to train: its outputs depend on no parameter with requires_grad. "
                "Give it one, and do not detach what it returns."
            )

    def takes_one_row(self) -> bool:
        """Whether a minibatch of one row can be trained on."""
        try:
            return self.fits(self.forward([part[:1] for part in self.inputs], training=True), 1)
        except InputError:
            return False


def at_start(trial: ModuleTrial, outputs: Tensor, losses: Tensor) -> str:
    """Return what is not finite before anything is trained, in words; "" where all is, or -inf for a class."""
    if bool(losses.isfinite().all()) and not bool((outputs.isnan() | (outputs == torch.inf)).any()):
        return ""
    what = "outputs that are" if not bool(outputs.isfinite().all()) else "a loss that is"
    arguments = ", ".join(f"{k}={v!r}" for k, v in module_arguments(trial.config).items())
    return (
        f"{trial.name}({arguments}) gives {what} not finite on the first training rows, before anything has trained; "
        "look in its forward for a division by zero, the logarithm of 0 or a root of it, and for inputs that are too "
        "large, which numbers='standard' scales."
    )


def _of_shape(found: object, n_outputs: int, *, binary: bool) -> str:
    """Return what such outputs usually come from, a sentence."""
    if not isinstance(found, tuple):
        several = found in ("tuple", "list", "dict")
        return " Of several outputs return the first, or train them by training_step." * several
    if binary and n_outputs == 2 and (len(found) == 1 or found[1:] == (1,)):
        return " A target of two classes takes two logits a row, or one with loss='bce'."
    if binary and n_outputs == 1 and found[1:] == (2,):
        return " Two logits a row of two classes take loss='cross_entropy'."
    if len(found) > 2:
        return " Axes beside the rows are to be pooled or flattened away."
    return ""


def are_probabilities(outputs: Tensor) -> bool:
    """Whether the outputs (B, K) of each row are positive and have the sum 1."""
    real = outputs.dim() == 2 and not outputs.is_complex()
    return real and bool((outputs >= 0).all() and ((outputs.sum(1) - 1).abs() < 1e-3).all())


def _ends_in_sigmoid(outputs: Tensor) -> bool:
    """Whether the last operation that computed outputs was a sigmoid, views of them aside."""
    node, views = outputs.grad_fn, ("View", "Squeeze", "Select", "Slice", "Reshape", "UnsafeView", "ToCopy")
    while node is not None and node.name().startswith(views):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("Sigmoid")


def in_words(x: Tensor) -> str:
    """Return the type, the shape and, of integers, the values of an input."""
    name, shape = str(x.dtype).removeprefix("torch."), ", ".join(["rows", *map(str, x.shape[1:])])
    if x.is_floating_point():
        return f"a float tensor of shape ({shape})"
    article = "an" if name.startswith("i") else "a"
    return f"{article} {name} tensor of shape ({shape}) of values from {int(x.min())} to {int(x.max())}"


class _ReadRecorder(DispatchMode):
    """Notes whether a number of a tensor is read into Python, which may decide by it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = self.draws = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads |= torch.Tag.data_dependent_output in func.tags
        return func(*args, **(kwargs or {}))
