"""A user's module made: from a class, a function or a partial, under a stream of its own, with what it asks for; and
what it has then: layers, hidden matrices, rates of dropout.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gputune.errors import InputError, InputWarning, warn
from gputune.models import Dropout
from gputune.modules.hints import hint
from gputune.population.network import InputKind, Shape, call_module
from gputune.seeding import keyed_draws
from gputune.types import Config, Params

Builder = Callable[..., nn.Module]
"""A class of modules, a function or a ``functools.partial`` that returns one."""


def name_of(builder: Builder) -> str:
    """Return what a person calls it."""
    inner = builder.func if isinstance(builder, partial) else builder
    return str(getattr(inner, "__name__", type(inner).__name__))


def build_module(builder: Builder, arguments: Config, shape: Shape, *, seed: int, columns: str = "") -> nn.Module:
    """Make a user's module under its own keyed stream; InputError, ending in ``columns``, where that fails."""
    row = (shape.n_features,) if shape.input_shape is None else shape.input_shape
    sizes = {name: getattr(shape, name) for name in ("n_features", "n_outputs", "feature_groups")}
    sizes["input_shape"] = row
    words = call_arguments(builder, sizes, arguments)
    with keyed_draws(_drawing_device(), seed, "module"), torch.device("cpu"), _single_precision():
        module = construct(builder, words, columns)
        inputs = shape.inputs or ((row, torch.float32),)
        try:
            materialise(module, inputs, shape.names)
        except Exception as error:
            raise InputError(
                f"model: the forward of {name_of(builder)} raised {type(error).__name__} on two rows of zeros, "
                f"which give its lazy layers their sizes: {error}.{hint(str(error), _zeros(inputs))}{columns}"
            ) from error
        return module


_shared: WeakKeyDictionary[Builder, dict[str, str]] = WeakKeyDictionary()
"""By a builder and its arguments as text: the tensor that each of its modules has; "" where all own theirs."""


def construct(builder: Builder, words: Config, columns: str = "") -> nn.Module:
    """Return a user's module that owns its tensors: a copy, where a builder gives the same ones each time.

    So members begin with a pretrained part as it is, and the user's own never trains. Of ``torch.compile`` it is what
    that compiles. Raises InputError where the builder fails, or a tensor that it shares cannot be copied.
    """
    module, known, key = _call_builder(builder, words, columns), _shared.setdefault(builder, {}), repr(words)
    if (inner := _inner(module)) is not module:
        if key not in known:
            warn(
                f"{name_of(builder)} returns torch.compile(module): the module itself trains, and gputune chooses how "
                "its steps are computed. Leave torch.compile out.",
                InputWarning,
            )
        module = inner
    if key not in known:
        known[key] = _first_shared(module, _inner(_call_builder(builder, words, columns)))
    if not (name := known[key]):
        return module
    try:
        for parameter in module.parameters():
            if has_gradient_hook(parameter):
                raise ValueError("a copy of a parameter loses the hook on its gradient")
        return copy.deepcopy(module)
    except Exception as error:
        raise InputError(
            f"model: {name_of(builder)} returns modules that share {name!r}, which members may not, and copy.deepcopy "
            f"of one raised {type(error).__name__}: {error}. Let it construct that part, or copy.deepcopy it, in each "
            "call."
        ) from error


def _call_builder(builder: Builder, words: Config, columns: str) -> nn.Module:
    """Return what a builder returns. Raises InputError where that fails, or is no module."""
    try:
        module = builder(**words)
    except Exception as error:
        if "before Module.__init__() call" in str(error):
            raise _unbegun(builder) from error
        raise InputError(
            f"model: {name_of(builder)}({', '.join(f'{k}={v!r}' for k, v in words.items())}) raised "
            f"{type(error).__name__}: {error}. Mend it, or the module__* values of the space.{columns}"
        ) from error
    _check_module(module, builder)
    return module


def _inner(module: nn.Module) -> nn.Module:
    """Return what ``torch.compile`` was given, or else the module."""
    inner = module._orig_mod if type(module).__name__ == "OptimizedModule" else module
    assert isinstance(inner, nn.Module)
    return inner


def _first_shared(one: nn.Module, other: nn.Module) -> str:
    """Return the name of the first parameter or buffer of a module that lies in the memory of the other's."""
    one_has, other_has = (
        {**dict(module.named_parameters()), **dict(module.named_buffers())} for module in (one, other)
    )
    held = {_memory(tensor) for tensor in other_has.values()}
    return next((name for name, tensor in one_has.items() if _memory(tensor) in held), "")


def has_gradient_hook(parameter: Tensor) -> bool:
    """Whether a function of the user's sees, or changes, the gradient of a parameter."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def _memory(tensor: Tensor) -> int:
    if is_lazy(tensor) or tensor.layout is not torch.strided:  # which have no memory, or none of one address
        return id(tensor)
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _check_module(module: object, builder: Builder) -> None:
    """Raise InputError for what a builder returned where it is no module, or one that torch has not begun."""
    if not isinstance(module, nn.Module):
        raise InputError(
            f"model: {name_of(builder)} must return a torch.nn.Module, got {type(module).__name__}; return the module."
        )
    if "_parameters" not in vars(module):
        raise _unbegun(builder)


def _unbegun(builder: Builder) -> InputError:
    return InputError(f"model: an __init__ of {name_of(builder)} does not call super().__init__(); let it do so first.")


def start_from(module: nn.Module, inputs: Sequence[Tensor], y: Tensor, *, seed: int) -> None:
    """Let a module that has a method ``start_from(*inputs, y)`` begin from training rows, under a stream of its own.

    Raises InputError where that fails.
    """
    begin = getattr(module, "start_from", None)
    if begin is None:
        return
    with keyed_draws(y.device, seed, "start_from"), torch.no_grad():
        try:
            begin(*inputs, y)
        except Exception as error:
            raise InputError(
                f"model: {type(module).__name__}.start_from(rows, y) raised {type(error).__name__}: {error}. Mend it, "
                "or leave it out."
            ) from error


def dropout_rates(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the buffers that hold the rates of ``gputune.models.Dropout`` in a module."""
    parts = module.named_modules()
    return tuple(f"{path}.rate".lstrip(".") for path, part in parts if isinstance(part, Dropout))


def turn_off_dropout(module: nn.Module, is_off: bool) -> None:
    """Let every ``gputune.models.Dropout`` in a module be the identity, or be itself again."""
    for part in module.modules():
        if isinstance(part, Dropout):
            part.is_off = is_off


def layers_of(module: nn.Module) -> list[str]:
    """Return the names of the submodules that own trained parameters: the layers, in ``named_modules()`` order."""
    # named_parameters() goes through the modules in that order, and gives a shared parameter to its first owner.
    trained = (name for name, p in module.named_parameters() if p.requires_grad)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in trained))


def hidden_sides(module: nn.Module, trained: Params) -> dict[str, int]:
    """Return the longer side of each hidden matrix: of weights but for embeddings (or else the first), and the last.

    The matrix of a convolution has all axes but the first as its columns.
    """
    matrices = [name for name, w in trained.items() if w.dim() > 1 and not w.is_complex()]
    kinds = (nn.Embedding, nn.EmbeddingBag)
    owners = dict(module.named_modules())
    embeddings = [name for name in matrices if isinstance(owners[name.rpartition(".")[0]], kinds)]
    left_out = {*(embeddings or matrices[:1]), *matrices[-1:]}
    shapes = {name: trained[name].flatten(1).shape for name in matrices if name not in left_out}
    return {name: max(shape) for name, shape in shapes.items()}


def call_arguments(builder: Builder, sizes: Mapping[str, object], arguments: Config) -> Config:
    """Return what a builder is called with: of the ``sizes`` those that its signature has, and the ``arguments``.

    ``num_classes`` without a default is ``n_outputs``, by torchvision's name for it. What takes any keyword, and is no
    subclass of what names its own, gets the numbers of features and outputs. Raises InputError, before anything is
    made, for an argument that it has not, and for one that it needs and nothing gives.
    """
    signature, parameters = inspect.signature(builder), parameters_of(builder)
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    inner = builder.func if isinstance(builder, partial) else builder
    # torch's own takes any keyword in its signature, and refuses them all.
    own = getattr(inner, "__init__", None) is not nn.Module.__init__
    open_ended = own and any(kind is inspect.Parameter.VAR_KEYWORD for kind in kinds.values())
    named = {k for k, kind in kinds.items() if kind in (_EITHER, _KEYWORD)}
    for name in arguments:
        if name not in named and not open_ended:
            raise InputError(f"module__{name} is no argument of {name_of(builder)}{signature}; remove it or rename it.")
        if name in sizes:
            raise InputError(f"module__{name} is given by the data; leave it out.")
    alone = open_ended and parameters.keys() == signature.parameters.keys()
    asked = named | ({"n_features", "n_outputs"} if alone else set())
    if isinstance(builder, partial):
        asked -= set(builder.keywords)  # what a partial has set stays so
    given = {**{name: value for name, value in sizes.items() if name in asked}, **arguments}
    if "num_classes" in asked and parameters["num_classes"].default is inspect.Parameter.empty:
        given.setdefault("num_classes", sizes["n_outputs"])
    for name, parameter in signature.parameters.items():
        if kinds[name] in (_EITHER, _KEYWORD) and parameter.default is parameter.empty and name not in given:
            raise InputError(
                f"model: {name_of(builder)}{signature} asks for {name!r}, which the data do not give: put "
                f"'module__{name}' into the space (some values, or one), give it a default, or pass "
                f"functools.partial({name_of(builder)}, {name}=...)."
            )
    return given


def parameters_of(builder: Builder) -> dict[str, inspect.Parameter]:
    """Return the parameters of a builder by name; of a class that takes any keyword those of its base classes too."""
    found = dict(inspect.signature(builder).parameters)
    bases = builder.__mro__[1:] if isinstance(builder, type) else ()
    last = found
    for base in bases:
        if base is nn.Module or all(p.kind is not p.VAR_KEYWORD for p in last.values()):
            break
        if "__init__" in vars(base):
            _, *own = inspect.signature(vars(base)["__init__"]).parameters.items()
            last = dict(own)
            found = {**last, **found}
    return found


_EITHER, _KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def _drawing_device() -> torch.device:
    """Return the GPU on which a constructor may draw too: the current one, where this process has used one before.

    Not all of them: to save the state of a GPU's generator makes a context on it, some hundred megabytes.
    """
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.device("cuda" if used else "cpu")


@contextmanager
def _single_precision() -> Iterator[None]:
    """Construct in float32 inside: what a constructor draws must not depend on torch.set_default_dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def materialise(module: nn.Module, inputs: Sequence[InputKind], names: Sequence[str] | None) -> None:
    """Give lazy submodules, such as ``nn.LazyLinear``, the parameters that a first batch would give them."""
    tensors: tuple[Tensor, ...] = (*module.parameters(), *module.buffers())
    if any(is_lazy(tensor) for tensor in tensors):
        with torch.no_grad():
            call_module(module.eval(), _zeros(inputs), names)
        module.train()


def _zeros(inputs: Sequence[InputKind]) -> list[Tensor]:
    """Return two rows of zeros of each input, floats in single precision, in which modules are constructed."""
    return [
        torch.zeros(2, *shape, dtype=torch.float32 if dtype.is_floating_point else dtype) for shape, dtype in inputs
    ]
