"""Calls a user's module on a few rows before training, and records its draws, writes and hooks.

``findings.py`` has the checks that read the record. A ModuleTrial is not a trial of the search.
"""

import copy
import pickle
import random
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gputune.data.dataset import Dataset
from gputune.ground.device import CPU
from gputune.ground.errors import InputError, option, per_interface
from gputune.ground.seeding import keyed_draws
from gputune.ground.types import Config
from gputune.modules.calls import Recorder, convert
from gputune.modules.construction import Builder, build_module, hint, name_of, note_of_cast
from gputune.modules.pretrained import dtype_of, pretrained_of
from gputune.modules.substitutes import counting_on_device
from gputune.modules.trace import Args, Function, Kwargs, clones
from gputune.population.outputs import in_mode
from gputune.population.population import Shape, module_arguments
from gputune.scoring.objective import Objective, make_objective

# Number of rows that are tried. It is prime, so a wrong view of their columns cannot divide it.
_EXAMPLES = 31
# The same for a pretrained module, for which a pass of a row takes long. In 16 bits, more rows are
# needed to tell a wrong gradient from rounding.
_FEW_EXAMPLES = 7
_FEW_ROUNDED_EXAMPLES = 13
_LIBRARIES = Path(torch.__file__).parent, Path(__file__).parents[1]
"""Folders whose code is not the user's: PyTorch and gputune."""
_GENERATORS = (random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator)


@dataclass
class Record:
    """The draws, reads, writes and hooks of all calls of a user's code so far.

    Attributes:
        draws: Whether a call in training drew from PyTorch's default generator.
        draws_in_evaluation: The same for a call in evaluation mode.
        generator: The name of another generator that a call drew from; "" if there was none.
        branches: Whether a call in training read a tensor's value into Python. The module may
            branch on this value.
        hooks: Whether a call in training registered a hook on the gradient of a tensor.
        writes: Whether a call wrote into its rows.
        likelihood: The name of a function that received logits or probabilities instead of
            log-probabilities; "" if none did.
        softmax: Whether that function received probabilities.
        widest: The most numbers that a submodule has returned for one row.
    """

    draws: bool = False
    draws_in_evaluation: bool = False
    generator: str = ""
    branches: bool = False
    hooks: bool = False
    writes: bool = False
    likelihood: str = ""
    softmax: bool = False
    widest: int = 1


class ModuleTrial:
    """Calls a user's module and its loss on a few rows, with an error message for a failed call.

    ``record`` collects the draws, writes and hooks of the calls.
    """

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
        self.record = Record()
        module = build_module(
            builder, module_arguments(config), self.shape, seed=0, columns=columns
        )
        # a sentence about a tensor of the module with a dtype chosen by its builder
        self.cast_note = note_of_cast(module, data.dtype)
        self.module = convert(module, data.dtype)
        self.trail = Trail(self.module)

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

    def forward(self, inputs: Sequence[Tensor], *, training: bool) -> Tensor:
        """Return the module's outputs for some rows. Every call uses the same random numbers."""
        self.trail.largest = 0  # reset, because earlier calls may have had other numbers of rows
        try:
            with self._recording(inputs, training=training) as copies:
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
        self.record.widest = max(self.record.widest, self.trail.largest // len(inputs[0]))
        return outputs

    def losses(self, y: Tensor) -> Tensor:
        """Return the losses of one step on all rows with the targets ``y``, per row or as a mean.

        Raises InputError if the loss or the training step fails.
        """
        try:
            with (
                self._recording([*self.inputs, y], training=True) as (*copies, copied_y),
                warnings.catch_warnings(),
            ):
                warnings.filterwarnings(
                    "ignore", "Using a target size .* that is different to the input size"
                )
                module = in_mode(self.module, training=True)
                return self.objective.losses(
                    module, copies, copied_y, self.config, names=self.shape.names
                )
        except InputError:
            raise
        except Exception as error:
            rule = f"{self.objective.in_words} raised {describe_error(error)}"
            raise InputError(None, rule, remedy=self._loss_remedy()) from error

    @contextmanager
    def _recording(self, originals: Sequence[Tensor], *, training: bool) -> Iterator[list[Tensor]]:
        """Yield copies of tensors for a call of the user's code, and update the record."""
        copies = clones(originals)
        record = self.record
        with keyed_draws(CPU, 0, "check", host=True):
            default = torch.get_rng_state()
            others = self._generator_states()
            with (
                torch.set_grad_enabled(training),
                counting_on_device(self.module),
                Recorder(copies) as operations,
                _CallRecorder(record, training),
                self.trail.following(),
            ):
                yield copies
            drew = not torch.equal(default, torch.get_rng_state())
            for name, state in self._generator_states().items():
                if others.get(name, state) != state and not record.generator:
                    record.generator = name.rstrip("0123456789 ")
        if operations.has_generator and not record.generator:
            record.generator = "a torch.Generator of its own"
        if training:
            record.draws |= drew
            record.branches |= operations.has_read
        else:
            record.draws_in_evaluation |= drew
        # Operations show writes that change no number on these rows. Writes by NumPy show only in
        # the numbers.
        is_same = all(map(_is_same, copies, originals))
        record.writes |= operations.has_written or not is_same

    def _generator_states(self) -> dict[str, object]:
        """Return the states of the random generators of Python and NumPy, by name.

        These are the global generators, and the generators that the module or a function of a step
        holds: as an attribute, in a container there, or as a name of its file.
        """
        states: dict[str, object] = {
            "Python's random": random.getstate(),
            "numpy.random": pickle.dumps(np.random.get_state(legacy=False)),
        }
        parts = list(self.module.modules())
        holders = [vars(part) for part in parts]
        functions = [getattr(kind, "forward", None) for kind in {type(part) for part in parts}]
        functions += [self.objective.loss, self.objective.step, self.objective.augment]
        for function in functions:
            holders.append(getattr(function, "__globals__", {}))
            holders.append(getattr(function, "__dict__", {}))
        for number, generator in enumerate(_generators_in(holders)):
            package = "random" if isinstance(generator, random.Random) else "numpy.random"
            name = f"a {package}.{type(generator).__name__} of its own {number}"
            states[name] = pickle.dumps(generator)
        return states

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


class _CallRecorder(TorchFunctionMode):
    """Records hooks on gradients, and losses of log-probabilities that receive something else.

    Outputs count as logits if one row has values above and below 0. Other values pass, even if
    their exponentials do not have the sum 1: a focal loss and a policy gradient weigh the
    log-probabilities of a row.
    """

    def __init__(self, record: Record, training: bool) -> None:
        super().__init__()
        self.record = record
        self.training = training

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is Tensor.register_hook:
            self.record.hooks |= self.training
        if func in (functional.nll_loss, functional.kl_div) and not self.record.likelihood:
            outputs = args[0] if args else kwargs.get("input")
            if isinstance(outputs, Tensor) and outputs.requires_grad and outputs.dim() > 1:
                rows = outputs.detach().flatten(1)
                # (B,): rows with numbers above and below 0, up to rounding
                has_both = (rows > 1e-3).any(1) & (rows < -1e-3).any(1)
                self.record.softmax = are_probabilities(outputs)
                if self.record.softmax or bool(has_both.any()):
                    self.record.likelihood = f"torch.nn.functional.{func.__name__}"
        return func(*args, **kwargs)


class Trail:
    """Remembers the running submodule, for error messages, and the size of the largest result.

    In a module with frozen parameters, only results that depend on trained tensors count. All
    members share the others.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.open: list[str] = []
        self.largest = 0
        # numbers in the weights of the called layers, and of those before the first trained layer
        self._weights = 0
        self._shared_weights = 0
        self._is_shared = True
        self.convolves = False
        """Whether a convolution was called behind the first trained layer, or is such a layer."""
        self._has_frozen = not all(w.requires_grad for w in module.parameters())

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the calls of the module inside the ``with`` block.

        The hooks are removed afterwards, because a part of the module may also belong to the user,
        such as an activation that the user passes to the builder.
        """
        self.open.clear()
        handles = []
        for name, part in self.module.named_modules():
            if isinstance(part, torch.jit.ScriptModule):  # a scripted module takes no hooks
                continue
            handles.append(part.register_forward_pre_hook(partial(self._enter, name)))
            handles.append(part.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, _args: object) -> None:
        """Forward hook: note the begin of a submodule's call."""
        self.open.append(name)
        if not name:
            self._weights = 0
            self._shared_weights = 0
            self._is_shared = True
        if any(w.requires_grad for w in module.parameters(recurse=False)):
            self._is_shared = False

    def _leave(self, module: nn.Module, _args: object, result: object) -> None:
        """Forward hook: note the end of a submodule's call and the size of its ``result``."""
        self.open.pop()
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):  # which has no product
            weights = [w for w in module.parameters(recurse=False) if w.dim() > 1]
            numbers = sum(w.numel() for w in weights)
            self._weights += numbers
            self._shared_weights += numbers if self._is_shared else 0
            self.convolves |= not self._is_shared and any(w.dim() > 2 for w in weights)
        if isinstance(result, Tensor) and (result.requires_grad or not self._has_frozen):
            self.largest = max(self.largest, result.numel())

    @property
    def shared(self) -> float:
        """The share of weights in frozen layers before the first trained layer, in the last call.

        Embeddings do not count.
        """
        return self._shared_weights / max(1, self._weights)

    @property
    def submodule(self) -> str:
        """The submodule that was running, as text for messages, such as submodule 'layers.0'. It is
        "" for the module itself."""
        name = next((name for name in reversed(self.open) if name), "")
        return f"submodule {name!r}" if name else ""


def _generators_in(holders: Iterable[Mapping[str, object]]) -> list[object]:
    """Return the random generators among the values of dicts, also inside of containers there."""
    generators = dict[int, object]()
    for holder in holders:
        for value in list(holder.values()):
            items = [value]
            if type(value) in (list, tuple, set):
                items = list(value)  # type: ignore[call-overload]
            elif type(value) is dict:
                items = list(value.values())
            for item in items:
                # isinstance() would run code of the user in objects with a ``__class__``.
                kind = type(item)
                if issubclass(kind, _GENERATORS) and not issubclass(kind, random.SystemRandom):
                    generators[id(item)] = item
    return list(generators.values())


def _n_examples(builder: Builder) -> int:
    """Return the number of rows on which gputune tries the modules of a builder."""
    pretrained = pretrained_of(builder)
    if pretrained is None:
        return _EXAMPLES
    is_rounded = dtype_of(pretrained.base).itemsize < 4
    return _FEW_ROUNDED_EXAMPLES if is_rounded else _FEW_EXAMPLES


def is_close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding. NaN equals NaN."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


def are_probabilities(outputs: Tensor) -> bool:
    """Return whether the outputs (B, K) are probabilities: not negative, with the sum 1 per row."""
    real = outputs.dim() == 2 and not outputs.is_complex()
    return real and bool((outputs >= 0).all() and ((outputs.sum(1) - 1).abs() < 1e-3).all())


def describe_tensor(x: Tensor) -> str:
    """Describe the type and shape of an input for messages. For integers, also their range."""
    name = str(x.dtype).removeprefix("torch.")
    shape = ", ".join(["rows", *map(str, x.shape[1:])])
    if x.is_floating_point():
        return f"a float tensor of shape ({shape})"
    kind = f"{'an' if name.startswith('i') else 'a'} {name} tensor of shape ({shape})"
    return f"{kind} of values from {int(x.min())} to {int(x.max())}"


def describe_error(error: Exception) -> str:
    """Return the type, the message and the line of an error, as text.

    The line is the last line of the traceback outside of PyTorch and gputune. Without such a line,
    the text has only the type and the message.
    """
    text = type(error).__name__
    if str(error):
        text += f": {str(error).rstrip('.')}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if frame.line and not any(map(path.is_relative_to, _LIBRARIES)):
            return f"{text} ({path.name}, line {frame.lineno}: {frame.line})"
    return text


def too_long(module: nn.Module, inputs: Sequence[Tensor], name: str) -> InputError | None:
    """Return the error for rows of more tokens than a module has positions, or None.

    Token ids are integers of shape (n rows, T tokens). ``name`` is the module's name in messages.
    Call this function after the forward pass has failed.
    """
    limit = _positions(module)
    if limit is None:
        return None
    lengths = [x.shape[1] for x in inputs if x.dim() == 2 and not x.is_floating_point()]
    if max(lengths, default=0) <= limit:
        return None
    return InputError(
        "X",
        f"has rows of {max(lengths)} tokens, but {name} has positions for at most {limit} tokens",
        remedy=f"Make the rows shorter, for example with tokenizer(texts, truncation=True, "
        f"max_length={limit}).",
    )


def _positions(module: nn.Module) -> int | None:
    """Return the number of tokens for which a model of transformers has position embeddings, or
    None."""
    parts = list(module.modules())
    sizes = {getattr(getattr(part, "config", None), "max_position_embeddings", 0) for part in parts}
    limits = []
    for part in parts:
        if isinstance(part, nn.Embedding) and part.num_embeddings in sizes:
            # RoBERTa's positions begin behind the entry for padding.
            unused = 0 if part.padding_idx is None else part.padding_idx + 1
            limits.append(part.num_embeddings - unused)
    return min(limits, default=None)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape have the same bits, also in NaN."""
    a = a.contiguous().view(-1).view(torch.uint8)
    return torch.equal(a, b.contiguous().view(-1).view(torch.uint8))
