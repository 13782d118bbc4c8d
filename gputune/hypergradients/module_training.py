"""The differentiable training of a user's module with a loss and minibatches, for
``gputune.hypergradient``."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from gputune.ground.errors import InputError, Verbatim
from gputune.ground.seeding import keyed_draws
from gputune.ground.types import Params
from gputune.hypergradients.first_step import nodes
from gputune.hypergradients.inner import StepPosition
from gputune.modules.calls import Stateless, named_tensors, not_trained
from gputune.modules.construction import layers_of
from gputune.modules.substitutes import differentiate_statistics, running_norms

Loss = Callable[[Any, Any], Tensor]
DataPair = tuple[Any, Any]


class ModuleTraining:
    """The differentiable training of one user's module (P = 1), with one minibatch per step.

    Steps run in training mode. The validation data runs in evaluation mode.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        batches: Sequence[DataPair],
        valid: DataPair,
        *,
        seed: int,
    ) -> None:
        self.module = module
        self.batches = batches
        self.valid = valid
        self.seed = seed
        self.objective = Stateless(_Objective(module, loss))
        self.steps = len(batches)
        self.totals = np.array([len(batches)])
        parameters = dict(module.named_parameters())
        self.trained = {name: p for name, p in parameters.items() if p.requires_grad}
        with self.objective.substitute({}):
            names = differentiate_statistics(module)
        fixed = not_trained(module)
        self.running = {name: fixed.pop(name) for name in names}
        # A row of weights (1, N) has the parameters first, then the running statistics.
        self.entries: Params = {**self.trained, **self.running}
        self.sizes = [p.numel() for p in self.entries.values()]
        self.kept = sum(self.sizes[len(self.trained) :])
        self.layers = layers_of(module)
        numbers = [self.layers.index(name.rpartition(".")[0]) for name in self.trained]
        numbers += [0] * len(self.running)
        like = next(iter(self.trained.values()))
        self.device = like.device
        self.dtype = like.dtype
        self.layer = torch.tensor(np.repeat(numbers, self.sizes), device=self.device)
        # These are clones, because a forward pass may write into them.
        self.fixed = {name: tensor.detach().clone() for name, tensor in fixed.items()}
        self.frozen = parameters.keys() - self.trained.keys()

    def start(self) -> Tensor:
        """Return the module's starting parameters and running statistics as one row (1, N)."""
        return torch.cat([p.detach().flatten().to(self.dtype) for p in self.entries.values()])[None]

    def clock(self, step: int) -> StepPosition:
        return StepPosition(np.array([step]))

    def losses(self, weights: Tensor, step: int) -> Tensor:
        """Return the loss of the minibatch of one training step, (1,).

        Random draws such as dropout depend only on the seed and the step.
        """
        return self._loss(weights, step)[0]

    def statistics(self, weights: Tensor, step: int) -> Tensor:
        return self._loss(weights, step)[1]

    def validation(self, weights: Tensor) -> Tensor:
        return self._loss(weights, None)[0]

    def _loss(self, weights: Tensor, step: int | None) -> tuple[Tensor, Tensor]:
        """Compute the loss (1,) of a minibatch, and BatchNorm's running statistics (1, kept) after
        it.

        If ``step`` is None, the minibatch is the validation data.
        """
        if step is None:
            name = "valid"
            pair = self.valid
        else:
            name = f"batches[{step}]"
            pair = self.batches[step]
        key_of_draws = "valid" if step is None else step
        draws = keyed_draws(self.device, self.seed, "hypergradient", key_of_draws)
        tensors = self.parameters(weights) | self.fixed
        state = {f"module.{key}": tensor for key, tensor in tensors.items()}
        with draws, _module_errors(name, pair), self.objective.substitute(state) as objective:
            self.module.train(step is not None)
            differentiate_statistics(self.module)
            # The pair is copied for two reasons. The module or the loss may write into it, and
            # later steps read it again. And autograd cannot save a tensor that was made in
            # inference mode.
            loss = objective(*tree_map_only(Tensor, Tensor.clone, pair))
            after = named_tensors(objective)
        for key, before in self.fixed.items():
            if after.get(f"module.{key}") is not before or before._version:
                kind = "parameter" if key in self.frozen else "buffer"
                raise InputError(
                    "module",
                    f"must not change its state when it is called, but the {kind} {key!r} changes "
                    f"in {name}",
                    remedy="Keep no running state in forward (spectral_norm keeps some).",
                )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(
                "loss",
                f"must return one number for {name}",
                got=Verbatim(shape),
                remedy="Reduce it, for example with .mean().",
            )
        if weights.requires_grad and torch.is_grad_enabled() and not loss.requires_grad:
            raise InputError(
                "loss",
                "must depend on the parameters of the module, but it depends on no parameter for "
                f"{name}",
                remedy="Compute the loss from the module's output, without .detach() or .item().",
            )
        running = [after[f"module.{key}"].flatten().to(self.dtype) for key in self.running]
        return loss.view(1), torch.cat([*running, weights.new_empty(0)])[None]

    def check_graph(self) -> None:
        """Check that the first minibatch has a loss, and that training changes all parameters in
        this loss.

        Raises InputError otherwise. A module or loss that stores a parameter in its own variable
        always reads the starting value. This parameter would not change while the other parameters
        train.
        """
        with torch.enable_grad():
            loss = self.losses(self.start().requires_grad_(), 0)
        with torch.no_grad():
            # This reports errors in the validation pair before the training begins.
            self.validation(self.start())
        read = {id(getattr(node, "variable", None)) for node in nodes(loss)}
        for name, parameter in self.trained.items():
            if id(parameter) in read:
                raise InputError(
                    "loss or module",
                    f"reads the parameter {name!r} from a separate variable, whose value does not "
                    "change in training",
                    remedy="Read the parameter from the module in each call, for example with "
                    "module.parameters().",
                )

    def parameters(self, weights: Tensor) -> Params:
        """Split a row of N weights, (1, N), into the named parameters and running statistics."""
        parts = zip(self.entries.items(), torch.split(weights[0], self.sizes))
        return {name: part.view(entry.shape) for (name, entry), part in parts}


@contextmanager
def _module_errors(name: str, pair: DataPair) -> Iterator[None]:
    """Convert errors of a module or a loss to an InputError that names the minibatch (x, y)."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except NotImplementedError as error:
        # This is torch's own error message.
        if not re.search("not implemented for '(Long|Int|Short|Char|Byte|Bool)'", str(error)):
            raise
        raise InputError(
            None,
            f"The module or the loss computes with integers for {name} ({error})",
            remedy="gputune calls loss(module(x), y). Check the order of the arguments, and that x "
            "has a floating dtype.",
        ) from error
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        message = str(error).split("\n")[0]
        remedy = "Check the shapes and dtypes of x and y."
        if all(isinstance(part, tuple | list) for part in pair):
            remedy = f"If {name} holds several pairs (x, y), put them into one with torch.cat."
        if any(isinstance(part, np.ndarray) for part in pair):
            remedy = "Make x and y tensors with torch.from_numpy."
        kind = type(error).__name__
        raise InputError(
            None, f"The module or the loss raised {kind} for {name}: {message}", remedy=remedy
        ) from error


class _Objective(nn.Module):
    """A user's module and loss function, joined into one module that returns the loss.

    If the loss reads the module's parameters, it reads their trained values.
    """

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, x: object, y: object) -> Tensor:
        return self.loss(self.module(x), y)


def check_module(module: nn.Module) -> None:
    """Raise InputError if gputune cannot train a module as a function of its parameters."""
    if not isinstance(module, nn.Module):
        kind = Verbatim(type(module).__name__)
        raise InputError("module", "must be a torch.nn.Module", got=kind)
    for name, tensor in named_tensors(module).items():
        if is_lazy(tensor):
            raise InputError(
                "module",
                f"must have all its parameters, but {name!r} is created by the first minibatch",
                remedy="Call module(x) once before.",
            )
    kinds = {(p.dtype, p.device) for p in module.parameters() if p.requires_grad}
    if not kinds:
        rule = "must have a parameter with requires_grad, or there is nothing to train"
        raise InputError("module", rule)
    if len(kinds) > 1 or not next(iter(kinds))[0].is_floating_point:
        raise InputError(
            "module",
            "must have its trained parameters in one floating dtype on one device",
            got=Verbatim(", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))),
            remedy="Use module.to(device, dtype).",
        )
    supported = running_norms(module)
    for name, part in module.named_modules():
        if name not in supported and getattr(part, "running_mean", None) is not None:
            raise InputError(
                "module",
                f"must not keep running statistics in {name!r} ({type(part).__name__}), because "
                "gputune cannot compute them from its input",
                remedy="Use nn.BatchNorm1d, 2d or 3d, nn.GroupNorm, or track_running_stats=False.",
            )
