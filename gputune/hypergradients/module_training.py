"""A user's module, loss and minibatches as one member of an inner training."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from gputune.errors import InputError
from gputune.hypergradients.first_step import nodes
from gputune.hypergradients.inner import StepPosition
from gputune.modules.calls import Stateless
from gputune.modules.construction import layers_of
from gputune.modules.substitutes import differentiate_statistics, running_norms
from gputune.seeding import keyed_draws
from gputune.types import Params

Loss = Callable[[Any, Any], Tensor]
DataPair = tuple[Any, Any]


class ModuleTraining:
    """The inner training of a user's module: one minibatch per step, one member (P = 1).

    Steps run in training mode. The validation pair runs in evaluation mode.
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
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        with self.objective.substitute({}):
            names = differentiate_statistics(module)
        buffers = dict(module.named_buffers())
        self.running = {name: buffers.pop(name) for name in names}
        # A row of weights (1, N) has the parameters first, then the running statistics.
        self.entries = {**self.trained, **self.running}
        self.sizes = [p.numel() for p in self.entries.values()]
        self.kept = sum(self.sizes[len(self.trained) :])
        self.layers = layers_of(module)
        layers = [self.layers.index(name.rpartition(".")[0]) for name in self.trained] + [0] * len(
            self.running
        )
        like = next(iter(self.trained.values()))
        self.device = like.device
        self.dtype = like.dtype
        numbers, sizes = (torch.tensor(each, device="cpu") for each in (layers, self.sizes))
        self.layer = numbers.repeat_interleave(sizes).to(self.device)
        # These are clones, because a forward pass may write into them.
        frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self.fixed = {
            name: tensor.detach().clone() for name, tensor in {**frozen, **buffers}.items()
        }
        self.frozen = frozen.keys()

    def start(self) -> Tensor:
        """Return the module's parameters and running statistics, (1, N)."""
        return torch.cat([p.detach().flatten().to(self.dtype) for p in self.entries.values()])[None]

    def clock(self, step: int) -> StepPosition:
        return StepPosition(np.array([step]))

    def losses(self, weights: Tensor, step: int) -> Tensor:
        """Return the loss (1,) of one minibatch.

        Random draws such as dropout depend only on the seed and the step.
        """
        return self._loss(weights, step)[0]

    def statistics(self, weights: Tensor, step: int) -> Tensor:
        return self._loss(weights, step)[1]

    def validation(self, weights: Tensor) -> Tensor:
        return self._loss(weights, None)[0]

    def _loss(self, weights: Tensor, step: int | None) -> tuple[Tensor, Tensor]:
        """Return the loss (1,) and the running statistics (1, kept) of a minibatch.

        ``step`` None means the validation pair.
        """
        pair, name = (
            (self.valid, "valid") if step is None else (self.batches[step], f"batches[{step}]")
        )
        draws = keyed_draws(
            self.device, self.seed, "hypergradient", "valid" if step is None else step
        )
        state = {
            f"module.{key}": tensor
            for key, tensor in (self.parameters(weights) | self.fixed).items()
        }
        with draws, _module_errors(name, pair), self.objective.substitute(state) as objective:
            self.module.train(step is not None)
            differentiate_statistics(self.module)
            # The pair is copied for two reasons. The module or the loss may write into it, and
            # later
            # steps read it again. And autograd cannot save a tensor that was made in inference
            # mode.
            loss = objective(*tree_map_only(Tensor, Tensor.clone, pair))
            after = {**dict(objective.named_parameters()), **dict(objective.named_buffers())}
        for key, before in self.fixed.items():
            if after.get(f"module.{key}") is not before or before._version:
                kind = "parameter" if key in self.frozen else "buffer"
                raise InputError(
                    f"module: the {kind} {key!r} changes in {name}; what a module remembers from "
                    "step to step is no function of the hyperparameters. Keep no running state "
                    "in the forward (spectral_norm does)."
                )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(
                f"loss must return one number for {name}, got {shape}; reduce it, for example "
                "with .mean()."
            )
        if weights.requires_grad and torch.is_grad_enabled() and not loss.requires_grad:
            raise InputError(
                f"loss must depend on the parameters of the module, but for {name} it depends on "
                "none; it must use what the module returns, without .detach() or .item()."
            )
        running = [after[f"module.{key}"].flatten().to(self.dtype) for key in self.running]
        return loss.view(1), torch.cat([*running, weights.new_empty(0)])[None]

    def check_graph(self) -> None:
        """Raise InputError if a loss fails, or if the first minibatch uses parameters that training
        cannot reach.

        A module or loss that holds a parameter in its own variable always reads the starting value.
        Such a parameter would not change while the others are trained.
        """
        with torch.enable_grad():
            loss = self.losses(self.start().requires_grad_(), 0)
        with torch.no_grad():
            # This reports errors in the validation pair before the training begins.
            self.validation(self.start())
        read = {id(getattr(node, "variable", None)) for node in nodes(loss)}
        if behind := [name for name, p in self.trained.items() if id(p) in read]:
            raise InputError(
                f"loss or module reads the parameter {behind[0]!r} from a variable of its own, "
                "where training does not reach it; read it from the module when it is called, "
                "for example by module.parameters()."
            )

    def parameters(self, weights: Tensor) -> Params:
        """Return the named parameters and running statistics that are stored in a row (1, N)."""
        parts = torch.split(weights[0], self.sizes)
        return {name: part.view(p.shape) for (name, p), part in zip(self.entries.items(), parts)}


@contextmanager
def _module_errors(name: str, pair: DataPair) -> Iterator[None]:
    """Turn errors of a module or a loss into an InputError that names the pair (x, y)."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except NotImplementedError as error:
        # The words of torch's own error message.
        if not re.search("not implemented for '(Long|Int|Short|Char|Byte|Bool)'", str(error)):
            raise
        raise InputError(
            f"{name}: the module or the loss computes with whole numbers ({error}). It is called "
            "as loss(module(x), y): check the order of its arguments, and that x is of floats."
        ) from error
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        text = str(error).split("\n")[0]
        remedy = "Check the shapes and dtypes of x and y."
        if all(isinstance(part, tuple | list) for part in pair):
            remedy = f"If {name} holds several pairs (x, y), put them into one with torch.cat."
        if any(isinstance(part, np.ndarray) for part in pair):
            remedy = "Make x and y tensors with torch.from_numpy."
        raise InputError(
            f"{name}: the module or the loss raised {type(error).__name__}: {text}. {remedy}"
        ) from error


class _Objective(nn.Module):
    """The loss of a module's output as one module.

    If the loss reads the module's parameters, it sees the trained ones.
    """

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, x: object, y: object) -> Tensor:
        return self.loss(self.module(x), y)


def check_module(module: nn.Module) -> None:
    """Raise InputError if a module cannot be trained as a function of its parameters."""
    if not isinstance(module, nn.Module):
        raise InputError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    if lazy := [
        name
        for name, held in (*module.named_parameters(), *module.named_buffers())
        if is_lazy(held)
    ]:
        raise InputError(
            f"module must have its parameters, but {lazy[0]!r} waits for a first minibatch; call "
            "module(x) once before."
        )
    kinds = {(p.dtype, p.device) for p in module.parameters() if p.requires_grad}
    if not kinds:
        raise InputError("module has no parameter with requires_grad: there is nothing to train.")
    if len(kinds) > 1 or not next(iter(kinds))[0].is_floating_point:
        kinds_words = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise InputError(
            "module must have its trained parameters in one floating dtype on one device, got "
            f"{kinds_words}; use module.to(device, dtype)."
        )
    known = running_norms(module)
    for name, part in module.named_modules():
        if name not in known and getattr(part, "running_mean", None) is not None:
            raise InputError(
                f"module: the submodule {name!r} ({type(part).__name__}) keeps running statistics "
                "that are no known function of its input; use nn.BatchNorm2d and its like, "
                "nn.GroupNorm, or track_running_stats=False."
            )
