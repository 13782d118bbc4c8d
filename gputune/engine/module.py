"""Any nn.Module as a stacked model: its parameters stacked, its forward mapped over members by torch.func.

The module must treat rows independently of what it saw before: modules with running statistics, or with
control flow that depends on data, are refused by the name of the submodule.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from gputune.engine.batches import Batch, for_members
from gputune.engine.blocks import Block, Blocks
from gputune.engine.losses import row_losses
from gputune.engine.network import Shape, call_module
from gputune.engine.population import ModelKind, module_arguments
from gputune.engine.stateless import Stateless
from gputune.errors import InputError
from gputune.seeding import GLOBAL_DRAWS, keyed_draws, stream_seed
from gputune.types import Config, Params

EXAMPLES = 31
"""Rows on which a user's module is tried: a prime number, which a wrong view of their columns does not divide."""

_CPU = torch.device("cpu")


def build_module(
    module_class: type[nn.Module],
    arguments: Config,
    *,
    n_features: int,
    n_outputs: int,
    seed: int,
    columns: str = "",
) -> nn.Module:
    """Construct a user's module under its own keyed stream; InputError, ending in ``columns``, where that fails."""
    _check_arguments(module_class, arguments)
    with GLOBAL_DRAWS, torch.random.fork_rng(), _single_precision():
        torch.manual_seed(stream_seed(seed, "module"))
        try:
            module = module_class(n_features=n_features, n_outputs=n_outputs, **arguments)
            materialise(module, n_features)
            return module
        except Exception as error:
            raise InputError(
                f"model: {module_class.__name__}(n_features={n_features}, n_outputs={n_outputs}"
                f"{''.join(f', {k}={v!r}' for k, v in arguments.items())}) raised "
                f"{type(error).__name__}: {error}. Mend the class, or the module__* values of the "
                f"space.{columns}"
            ) from error


@contextmanager
def _single_precision() -> Iterator[None]:
    """Construct in float32 inside: what a constructor draws must not depend on torch.set_default_dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def materialise(module: nn.Module, n_features: int) -> None:
    """Give lazy submodules, such as ``nn.LazyLinear``, the parameters that a first batch would give them."""
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        with torch.no_grad():
            module.eval()(torch.zeros(1, n_features))
        module.train()


def _check_arguments(module_class: type[nn.Module], arguments: Config) -> None:
    parameters = inspect.signature(module_class).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in ("n_features", "n_outputs"):
        if name not in parameters:
            raise InputError(
                f"model: {module_class.__name__} must accept the keyword {name}, got the signature "
                f"{inspect.signature(module_class)}; add {name} to its __init__."
            )
    for name in arguments:
        if name not in parameters:
            raise InputError(
                f"space: module__{name} is no argument of {module_class.__name__}"
                f"{inspect.signature(module_class)}; remove it or rename it."
            )


class StackedModule:
    """F x C members of a user's module, all with the same ``module__*`` values."""

    exact = True
    kind: ModelKind = "module"

    def __init__(
        self, module_class: type[nn.Module], configs: Sequence[Config], shape: Shape, *, seed: int
    ) -> None:
        self.module_class, self.configs, self.shape, self.seed = module_class, tuple(configs), shape, seed
        self.template = self._plain(shape.device)
        self.stateless = Stateless(self.template)
        self.attends = any(isinstance(part, nn.MultiheadAttention) for part in self.template.modules())
        trained = {k: w for k, w in self.template.named_parameters() if w.requires_grad}
        self.fixed = {k: w.detach() for k, w in self.template.named_parameters() if not w.requires_grad}
        self.fixed |= {k: b.detach() for k, b in self.template.named_buffers()}
        self.first = {k: w.detach() for k, w in trained.items()}
        members = (shape.folds, len(configs))
        self.blocks = Blocks([Block(k, (*members, *w.shape), 1) for k, w in self.first.items()])

    def _plain(self, device: torch.device) -> nn.Module:
        """Return the user's module at its start, with the trials' common arguments."""
        return build_module(
            self.module_class,
            module_arguments(self.configs[0]),
            n_features=self.shape.n_features,
            n_outputs=self.shape.n_outputs,
            seed=self.seed,
        ).to(dtype=self.shape.dtype, device=device)

    def start(self) -> Tensor:
        flat = torch.empty(self.blocks.size, dtype=self.shape.dtype, device=self.shape.device)
        for name, view in self.blocks.views(flat).items():
            view.copy_(self.first[name])
        return flat

    def targets(self, y: Tensor) -> Tensor:
        return y.to(self.shape.dtype) if y.is_floating_point() else y[None]

    def subset(self, keep: list[int]) -> "StackedModule":
        return StackedModule(self.module_class, [self.configs[c] for c in keep], self.shape, seed=self.seed)

    def draws(self, rows: Sequence[int]) -> None:
        return None  # its own, by the key of the minibatch

    def gradient(self, params: Params, batch: Batch, grads: Params) -> None:
        trials = len(self.configs)
        leaves = {k: w[batch.folds].flatten(0, 1).detach().requires_grad_() for k, w in params.items()}
        inputs = [for_members(x, trials) for x in batch.inputs]
        with torch.enable_grad(), keyed_draws(self.shape.device, self.seed, "dropout", *batch.key):
            outputs = self._forward(leaves, inputs, training=True)
            outputs = outputs.view(-1, trials, *outputs.shape[1:])  # (F, C, B, K)
            if self.shape.present is not None:
                outputs = outputs.masked_fill(~self.shape.present[batch.folds, None, None], -torch.inf)
            share = batch.share.squeeze(-1) if isinstance(batch.share, Tensor) else batch.share
            loss = (row_losses(outputs, batch.y[:, None]) * share).sum()
            slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, slope in zip(leaves, slopes):
            part = grads[name][batch.folds]
            if slope is None:  # a parameter that the output does not depend on
                part.zero_()
            else:
                part.copy_(slope.view(part.shape))

    def outputs(self, params: Params, fold: int, inputs: Sequence[Tensor]) -> Tensor:
        members = {k: w[fold] for k, w in params.items()}
        trials = len(self.configs)
        return self._forward(members, [x.expand(trials, *x.shape) for x in inputs], training=False)

    def differentiable(self, params: Params, inputs: Sequence[Tensor], key: tuple[int, int] | None) -> Tensor:
        if key is None:
            return self._forward(params, inputs, training=False)
        with keyed_draws(self.shape.device, self.seed, "dropout", *key):
            return self._forward(params, inputs, training=True)

    def layers(self) -> dict[str, int]:
        owners = layers_of(self.template)
        return {name: owners.index(name.rpartition(".")[0]) for name in self.first}

    def _forward(self, params: Params, inputs: Sequence[Tensor], *, training: bool) -> Tensor:
        """Outputs (P, B, K) of stacked parameters (P, ...) on rows (P, B, ...) of each input."""
        slow = self.attends and not training

        def forward(own: Params, *rows: Tensor) -> Tensor:
            with self.stateless.holding({**own, **self.fixed}) as module:
                return call_module(module.train(training), rows, self.shape.names)

        try:
            with _SlowAttention() if slow else nullcontext():
                outputs: Tensor = vmap(forward, randomness="same")(params, *inputs)
        except IndexError as error:
            raise InputError(
                f"model: {self.module_class.__name__} raised IndexError: {error}, on other rows than it was tried on; "
                "an embedding must have a place for every code that the data hold."
            ) from error
        return outputs if outputs.dim() == 3 else outputs[..., None]

    def member(self, params: Params, fold: int, trial: int) -> nn.Module:
        # Not a copy of the template, since what is no parameter or buffer of it cannot always be copied.
        module = self._plain(_CPU)
        values = {name: w[fold, trial] for name, w in params.items()} | self.fixed
        with torch.no_grad():
            for name, own in (*module.named_parameters(), *module.named_buffers()):
                if not torch.equal(own, values[name].cpu()):
                    own.copy_(values[name])
        return module.eval()


class _SlowAttention(TorchFunctionMode):
    """Keeps attention from its fast path of evaluation, which has no derivative and no batching rule.

    torch takes it where it sees no tensor that requires a gradient, and through vmap it sees none. This is per thread;
    ``torch.backends.mha.set_fastpath_enabled`` is not.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def layers_of(module: nn.Module) -> list[str]:
    """Return the names of the submodules that own trained parameters: the layers, in ``named_modules()`` order."""
    # named_parameters() goes through the modules in that order, and gives a shared parameter to its first owner.
    trained = (name for name, p in module.named_parameters() if p.requires_grad)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in trained))


def check_module(
    module_class: type[nn.Module],
    config: Config,
    inputs: Sequence[Tensor],
    *,
    n_outputs: int,
    columns: str = "",
    names: tuple[str, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Try a user's class once: two members stacked must equal the plain module. InputError says what does not.

    ``inputs`` (B, ...) are some of the rows that it will train on; ``columns`` is a sentence on how they came from the
    user's, for messages about shapes; ``dtype`` is that of the parameters, by default that of the first input. Returns
    the number of parameters that are trained.
    """
    x = tuple(part.cpu() for part in inputs)
    dtype = dtype or x[0].dtype
    shape = Shape(
        1,
        x[0].shape[-1] if x[0].dim() > 1 else 1,
        n_outputs,
        dtype,
        _CPU,
        False,
        None,
        tuple(x[0].shape[1:]),
        names,
    )
    size = {"n_features": shape.n_features, "n_outputs": n_outputs}
    module = build_module(module_class, module_arguments(config), **size, seed=0, columns=columns).to(dtype)
    _refuse_running_statistics(module)
    trail = _Trail(module)
    buffers = {k: b.clone() for k, b in module.named_buffers()}
    with torch.no_grad(), keyed_draws(_CPU, 0, "check"):
        try:
            call_module(module.train(), x, names)
            plain = call_module(module.eval(), x, names)
        except Exception as error:
            takes = " and ".join(f"a {_kind(part)} tensor of shape {_any_rows(part)}" for part in x)
            raise InputError(
                f"model: the forward of {module_class.__name__}{trail} raised {type(error).__name__}: {error}. "
                f"It must take {takes} and return (rows, {n_outputs}).{columns}"
            ) from error
    _check_outputs(module_class, plain, (len(x[0]), n_outputs), columns)
    for name, before in buffers.items():
        if not torch.equal(before, dict(module.named_buffers())[name]):
            raise InputError(
                f"model: the buffer {name!r} of {module_class.__name__} changes in training, so members cannot "
                "be stacked; keep no running state in the forward."
            )
    _check_rows_alone(module_class, module, x, plain, names)
    _check_stacked(module_class, config, shape, x, plain)
    _check_trainable(module_class, module, x, names)
    return sum(w.numel() for w in module.parameters() if w.requires_grad)


def _kind(x: Tensor) -> str:
    return "float" if x.is_floating_point() else str(x.dtype).removeprefix("torch.")


def _any_rows(x: Tensor) -> str:
    return f"({', '.join(['rows', *map(str, x.shape[1:])])})"


def _check_rows_alone(
    module_class: type[nn.Module],
    module: nn.Module,
    x: Sequence[Tensor],
    plain: Tensor,
    names: Sequence[str] | None,
) -> None:
    with torch.no_grad():
        fewer = call_module(module, [part[:2] for part in x], names)
    if not _close(fewer, plain[:2]):
        raise InputError(
            f"model: {module_class.__name__} gives a row other outputs in the company of other rows; its forward must "
            "treat every row by itself, in eval mode too."
        )


def _check_trainable(
    module_class: type[nn.Module], module: nn.Module, x: Sequence[Tensor], names: Sequence[str] | None
) -> None:
    with torch.enable_grad(), keyed_draws(_CPU, 0, "check"):
        outputs = call_module(module.train(), x, names)
    if not any(w.requires_grad for w in module.parameters()) or not outputs.requires_grad:
        raise InputError(
            f"model: {module_class.__name__} has nothing to train: its outputs depend on no parameter with "
            "requires_grad. Give it one, and do not detach what it returns."
        )


def _check_stacked(
    module_class: type[nn.Module], config: Config, shape: Shape, x: Sequence[Tensor], plain: Tensor
) -> None:
    stacked = StackedModule(module_class, [config, config], shape, seed=0)
    trail = _Trail(stacked.template)
    try:
        with torch.no_grad():
            outputs = stacked.outputs(stacked.blocks.views(stacked.start()), 0, x)
    except Exception as error:
        raise InputError(
            f"model: {module_class.__name__}{trail} cannot be stacked over members: {_first_sentence(error)}. "
            "Control flow and .item() that depend on data are the usual causes (write them with torch.where), or an "
            "operation that torch.func.vmap does not know, as in nn.GRU and nn.LSTM."
        ) from error
    if not _close(outputs[1], plain.view(outputs[1].shape)):
        raise InputError(
            f"model: {module_class.__name__} gives other outputs when its members are stacked than alone; "
            "its forward must be deterministic in eval mode and treat every row alike."
        )


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, also where both are no number: that is for the training to say."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)


def _first_sentence(error: Exception) -> str:
    """What torch says first; the rest is advice to its own developers."""
    return str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")


def _refuse_running_statistics(module: nn.Module) -> None:
    for name, part in module.named_modules():
        running = getattr(part, "running_mean", None) is not None
        if isinstance(part, nn.modules.batchnorm._BatchNorm) or running:
            raise InputError(
                f"model: the submodule {name!r} ({type(part).__name__}) keeps or uses statistics over the rows "
                "of a batch, so members cannot be stacked; use nn.LayerNorm or nn.GroupNorm in its place."
            )


def _check_outputs(
    module_class: type[nn.Module], outputs: object, expected: tuple[int, int], columns: str
) -> None:
    rows, n_outputs = expected
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if shape == expected or (n_outputs == 1 and shape == (rows,)):
        return
    raise InputError(
        f"model: {module_class.__name__} must return a tensor of shape (rows, {n_outputs}), got {shape} for {rows} "
        f"rows; its last layer must have n_outputs outputs (logits for classes).{columns}"
    )


class _Trail:
    """Remembers which submodule was running, so that an error can name it."""

    def __init__(self, module: nn.Module) -> None:
        self.open: list[str] = []
        for name, part in module.named_modules():
            part.register_forward_pre_hook(lambda _module, _args, name=name: self.open.append(name))
            part.register_forward_hook(self._leave)

    def _leave(self, _module: nn.Module, _args: object, _result: object) -> None:
        self.open.pop()

    def __str__(self) -> str:
        name = next((name for name in reversed(self.open) if name), "")
        return f" (submodule {name!r})" if name else ""
