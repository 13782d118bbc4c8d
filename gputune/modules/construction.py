"""Builds a user's module from a class, a function or a partial, with its own random stream.

Further functions inspect a module: its layers, hidden matrices, dropout rates and lazy submodules.
A builder is the class or function that makes the module. A member is one trial on one fold, with
its own module.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gputune.ground.device import CPU
from gputune.ground.errors import InputError, InputWarning, Verbatim, option, per_interface, warn
from gputune.ground.seeding import keyed_draws
from gputune.ground.text import did_you_mean
from gputune.ground.types import Config, Params
from gputune.models import Dropout
from gputune.modules.calls import named_tensors
from gputune.modules.pretrained import pretrained_of
from gputune.population.outputs import call_module, in_mode
from gputune.population.population import InputKind, Shape

Builder = Callable[..., nn.Module]
"""A class of modules, or a function or a ``functools.partial`` that returns a module."""


def name_of(builder: Builder) -> str:
    """Return the name of a module class or of a function that builds modules, for messages."""
    inner = builder.func if isinstance(builder, partial) else builder
    return str(getattr(inner, "__name__", type(inner).__name__))


def what_to_pass(instance: nn.Module) -> str:
    """Return the end of an error message for a module instance that was passed instead of a
    class."""
    inner = getattr(instance, "_orig_mod", instance)  # a compiled module holds the original one
    kind = type(inner)
    sizes = {"n_features": 1, "n_outputs": 1, "input_shape": (1,), "feature_groups": None}
    from_torch = kind.__module__.partition(".")[0] == "torch"
    # A class of PyTorch, such as Sequential, needs arguments that the data cannot give.
    if not from_torch:
        with suppress(InputError):
            call_arguments(kind, sizes, {})
            return (
                "must be a class, not an instance, because each training creates a new module. "
                f"Pass {kind.__name__}. To start from the weights of this instance, pass a "
                "function that returns it."
            )
    name = f"nn.{kind.__name__}" if from_torch and hasattr(nn, kind.__name__) else kind.__name__
    call = "torch.jit.script(...)" if isinstance(inner, torch.jit.ScriptModule) else f"{name}(...)"
    return (
        f"must be a function that creates the module, not an instance of {name}, because each "
        "training creates a new module. Pass a function such as def make(n_features, n_outputs): "
        f"return {call}. To start from the weights of this instance, return it from the function: "
        "gputune copies it."
    )


def build_module(
    builder: Builder, arguments: Config, shape: Shape, *, seed: int, columns: str = ""
) -> nn.Module:
    """Build a user's module. Its random initial weights depend only on ``seed``.

    Raises InputError if this fails. The message ends with the sentence ``columns``.
    """
    row = (shape.n_features,) if shape.input_shape is None else shape.input_shape
    sizes = {name: getattr(shape, name) for name in ("n_features", "n_outputs", "feature_groups")}
    sizes |= {"input_shape": row}
    pretrained = pretrained_of(builder)
    if pretrained is not None:
        sizes |= pretrained.sizes(shape.inputs or ((row, torch.float32),), shape.names)
    kwargs = call_arguments(builder, sizes, arguments)
    with module_stream(seed):
        module = construct(builder, kwargs, columns)
        inputs = shape.inputs or ((row, torch.float32),)
        try:
            materialise(module, inputs, shape.names)
        except Exception as error:
            raise InputError(
                None,
                f"The forward pass of {name_of(builder)} raised {type(error).__name__} on two rows "
                f"of zeros, from which its lazy layers take their sizes: {error}",
                remedy=f"{hint(str(error), _zeros(inputs))}{columns}".strip(),
            ) from error
        return module


@contextmanager
def module_stream(seed: int) -> Iterator[None]:
    """Inside the context, random initial weights depend only on ``seed``. They are made on the CPU
    in single precision."""
    # A constructor may draw on the current GPU, if this process has used it. The generators of
    # other GPUs are not saved, because that would make a context there of some hundred megabytes.
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")  # type: ignore[no-untyped-call]
    with keyed_draws(device, seed, "module", host=True), CPU:
        # inside the stream, one thread at a time, so that another thread's setting is not saved
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # draws must not depend on the user's default dtype
        try:
            yield
        finally:
            torch.set_default_dtype(before)


_shared: WeakKeyDictionary[Builder, dict[str, str]] = WeakKeyDictionary()
"""Names of tensors that all modules of a builder share, by builder and arguments as text.

A name is "" if every module of the builder owns all of its tensors.
"""


def construct(builder: Builder, kwargs: Config, columns: str = "") -> nn.Module:
    """Call a builder, and return a module that shares no tensor with the builder's other modules.

    If the builder returns the same tensors each time, the module is a copy. Members then start from
    a pretrained part, and the user's own copy of this part never trains. If the builder returns
    ``torch.compile(module)``, the result is ``module``. Raises InputError if the builder fails, or
    if a shared tensor cannot be copied.
    """
    module, is_compiled = _call_builder(builder, kwargs, columns)
    if pretrained_of(builder) is not None:
        return module  # its modules share only frozen tensors
    shared = _shared.setdefault(builder, {})
    key = repr(kwargs)
    if key not in shared:
        if is_compiled:
            warn(
                f"{name_of(builder)} returns torch.compile(module). gputune trains the module "
                "itself and chooses how to compute its steps. Leave torch.compile out.",
                InputWarning,
            )
        # This call happens only once. Its own stream keeps it from changing the draws of the first
        # module's lazy layers.
        with keyed_draws(CPU, 0, "another", host=True):
            other, _ = _call_builder(builder, kwargs, columns)
        shared[key] = _first_shared(module, other)
    name = shared[key]
    if not name:
        return module
    try:
        if any(map(has_gradient_hook, module.parameters())):
            raise ValueError("a copy of a parameter loses the hook on its gradient")
        return copy.deepcopy(module)
    except Exception as error:
        raise InputError(
            None,
            f"All modules of {name_of(builder)} share {name!r}, but each member needs its own "
            f"tensors, and copy.deepcopy of a module raised {type(error).__name__}: {error}",
            remedy="Create the shared part in each call, or copy it in each call by copy.deepcopy.",
        ) from error


def _call_builder(builder: Builder, kwargs: Config, columns: str) -> tuple[nn.Module, bool]:
    """Call a builder. Return its module, and whether torch.compile had wrapped the module.

    A wrapped module is returned without torch.compile. Raises InputError if the builder fails, or
    if its result is not an initialized torch module.
    """
    name = name_of(builder)
    cause = None
    try:
        module = builder(**kwargs)
    except Exception as error:
        if "before Module.__init__() call" not in str(error):
            raise InputError(
                None,
                f"{call_text(name, kwargs)} raised {type(error).__name__}: {error}",
                remedy=f"{_remedy(builder, kwargs, str(error))}{columns}",
            ) from error
        cause = error
    else:
        if not isinstance(module, nn.Module):
            kind = Verbatim(type(module).__name__)
            rule = f"{name} must return a torch.nn.Module"
            raise InputError(None, rule, got=kind, remedy="Return the module.")
        # A module from torch.jit.trace has its parameters elsewhere.
        if "_parameters" in vars(module) or isinstance(module, torch.jit.ScriptModule):
            is_compiled = type(module).__name__ == "OptimizedModule"
            inner = module._orig_mod if is_compiled else module
            assert isinstance(inner, nn.Module)
            return inner, is_compiled
    rule = f"An __init__ of {name} does not call super().__init__()"
    raise InputError(None, rule, remedy="Call it first.") from cause


def call_text(name: str, kwargs: Config) -> str:
    """Return a call with keyword arguments as Python code for messages, such as Net(width=8)."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    return f"{name}({arguments})"


def _remedy(builder: Builder, kwargs: Config, error: str) -> str:
    """Return a sentence that tells the user how to correct an error raised by a builder."""
    refused = re.search(r"unexpected keyword argument '(n_features|n_outputs)'", error)
    if refused and refused[1] in kwargs and refused[1] not in parameters_of(builder):
        name = name_of(builder)
        return (
            f"{name} accepts any keyword argument, so gputune passes n_features and n_outputs. "
            f"Pass a function that calls {name}: def make(n_outputs): return {name}(...)."
        )
    values = per_interface("values of the space", "values of --space", "values")
    return f"Correct it, or the module__* {values}."


def _first_shared(module: nn.Module, other: nn.Module) -> str:
    """Return the name of the first tensor of ``module`` that shares memory with ``other``."""

    def memory(tensor: Tensor) -> int:
        # lazy and sparse tensors have no memory, or no single address
        if is_lazy(tensor) or tensor.layout is not torch.strided:
            return id(tensor)
        return tensor.untyped_storage().data_ptr() or id(tensor)

    used = set(map(memory, named_tensors(other).values()))
    for name, tensor in named_tensors(module).items():
        if memory(tensor) in used:
            return name
    return ""


def has_gradient_hook(parameter: Tensor) -> bool:
    """Return whether a user's hook reads or changes the gradient of a parameter."""
    return bool(
        parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    )


def start_from(module: nn.Module, inputs: Sequence[Tensor], y: Tensor, *, seed: int) -> None:
    """Call a module's method ``start_from(*inputs, y)``, if it exists, with its own random stream.

    Raises InputError if the call fails.
    """
    method = getattr(module, "start_from", None)
    if method is None:
        return
    with keyed_draws(y.device, seed, "start_from", host=True), torch.no_grad():
        try:
            method(*inputs, y)
        except Exception as error:
            call = f"{type(module).__name__}.start_from(rows, y)"
            rule = f"{call} raised {type(error).__name__}: {error}"
            raise InputError(None, rule, remedy="Correct it, or leave it out.") from error


def dropout_rates(module: nn.Module) -> tuple[str, ...]:
    """Return the names of all buffers that hold dropout rates in a module's
    ``gputune.models.Dropout`` layers."""
    parts = module.named_modules()
    return tuple(f"{path}.rate".lstrip(".") for path, part in parts if isinstance(part, Dropout))


def layers_of(module: nn.Module) -> list[str]:
    """Return the names of a module's layers, in the order of ``named_modules()``.

    A layer is a submodule that owns trained parameters.
    """
    # named_parameters() visits the modules in that order, and assigns a shared parameter to its
    # first owner.
    trained = (name for name, p in module.named_parameters() if p.requires_grad)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in trained))


def hidden_sides(module: nn.Module, trained: Params) -> dict[str, int]:
    """Return the longer side of each hidden weight matrix, by parameter name.

    Hidden matrices are all weights except embeddings and the last weight. Without embeddings, the
    first weight is also left out. The matrix of a convolution has all axes except the first as its
    columns.
    """
    layers = dict(module.named_modules())
    sides = {}
    embeddings = []
    for name, w in trained.items():
        if w.dim() > 1 and not w.is_complex():
            sides[name] = max(w.flatten(1).shape)
            if isinstance(layers[name.rpartition(".")[0]], nn.Embedding | nn.EmbeddingBag):
                embeddings.append(name)
    matrices = list(sides)
    for name in {*(embeddings or matrices[:1]), *matrices[-1:]}:
        del sides[name]
    return sides


def call_arguments(builder: Builder, sizes: Mapping[str, object], arguments: Config) -> Config:
    """Return the keyword arguments for a builder: the ``sizes`` in its signature, and the user's
    ``arguments``.

    ``num_classes`` without a default gets ``n_outputs``, because torchvision uses this name. A
    builder that accepts any keyword gets the counts of features and outputs, unless it is a
    subclass of a class that names its keywords. Raises InputError, before anything is built, for an
    argument that the builder does not have, and for a required argument without a value.
    """
    signature = inspect.signature(builder)
    parameters = parameters_of(builder)
    inner = builder.func if isinstance(builder, partial) else builder
    # nn.Module itself takes any keyword in its signature, and refuses all of them.
    has_init = getattr(inner, "__init__", None) is not nn.Module.__init__
    takes_any = has_init and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {name for name, parameter in parameters.items() if parameter.kind in kinds}
    for name in arguments:
        if name not in named and not takes_any:
            rule = f"is not an argument of {name_of(builder)}{signature}"
            hint = did_you_mean(name, named - sizes.keys(), prefix="module__")
            raise InputError(
                f"module__{name}", rule, remedy=hint.strip() or "Remove it or rename it."
            )
        if name in sizes:
            raise InputError(f"module__{name}", "is set by the data", remedy="Leave it out.")
    passed = set(named)
    if takes_any and parameters.keys() == signature.parameters.keys():
        passed |= {"n_features", "n_outputs"}
    if isinstance(builder, partial):
        passed -= set(builder.keywords)  # arguments of a partial stay as they were set
    kwargs = {name: value for name, value in sizes.items() if name in passed} | dict(arguments)
    if "num_classes" in passed and parameters["num_classes"].default is inspect.Parameter.empty:
        kwargs.setdefault("num_classes", sizes["n_outputs"])
    for name, parameter in signature.parameters.items():
        if name in named and parameter.default is parameter.empty and name not in kwargs:
            if name == "config":
                refuse_transformers_class(inner)
            rest = f"give it a default, or pass functools.partial({name_of(builder)}, {name}=...)."
            raise InputError(
                None,
                f"{name_of(builder)}{signature} requires {name!r}, which gputune cannot "
                "derive from the data",
                remedy=per_interface(
                    f"Put 'module__{name}' with one or several values into the space, {rest}",
                    f"Put module__{name}=... into {option('space')}, or give it a default.",
                    f"Pass module__{name}=..., {rest}",
                ),
            )
    return kwargs


def outputs_hint(builder: Builder, arguments: Config, actual: int, n_outputs: int) -> str:
    """Return a sentence that names the builder's parameter for the number of outputs.

    ``actual`` is the wrong number of outputs that the module returned. The sentence names the
    parameter with the default ``actual``. It is "" if no parameter has this default, or if gputune
    passes the argument.
    """
    for name, parameter in parameters_of(builder).items():
        default = parameter.default
        is_number = isinstance(default, int) and not isinstance(default, bool)
        is_given = name in arguments or name in ("n_features", "n_outputs")
        if is_number and default == actual and not is_given:
            value = f"module__{name}={n_outputs}"
            remedy = per_interface(
                f"Set {value} in the space", f"Set {value} in --space", f"Pass {value}"
            )
            return f" {name_of(builder)} has {name}={actual} by default. {remedy}."
    return ""


def parameters_of(builder: Builder) -> dict[str, inspect.Parameter]:
    """Return the parameters in a builder's signature, by name.

    For a class that accepts any keyword, they include the parameters of its base classes.
    """
    parameters = dict(inspect.signature(builder).parameters)
    last = parameters
    for base in builder.__mro__[1:] if isinstance(builder, type) else ():
        if base is nn.Module or all(p.kind is not p.VAR_KEYWORD for p in last.values()):
            break
        if "__init__" in vars(base):
            _, *rest = inspect.signature(vars(base)["__init__"]).parameters.items()
            last = dict(rest)
            parameters = {**last, **parameters}
    return parameters


def materialise(
    module: nn.Module, inputs: Sequence[InputKind], names: Sequence[str] | None
) -> None:
    """Initialize the parameters of lazy submodules, such as ``nn.LazyLinear``, by a forward pass on
    two rows of zeros."""
    if any(map(is_lazy, named_tensors(module).values())):
        with torch.no_grad():
            call_module(in_mode(module, training=False), _zeros(inputs), names)
        module.train()


def _zeros(inputs: Sequence[InputKind]) -> list[Tensor]:
    """Return two rows of zeros for each input of a module.

    Floats are in single precision, because modules are constructed in it.
    """
    zeros = []
    for shape, dtype in inputs:
        if dtype.is_floating_point:
            dtype = torch.float32
        zeros.append(torch.zeros(2, *shape, dtype=dtype))
    return zeros


def note_of_cast(module: nn.Module, dtype: torch.dtype) -> str:
    """Return a sentence about the first tensor that the module's builder created in an unexpected
    dtype.

    The sentence is "" if all tensors have an expected dtype.
    """
    for name, tensor in named_tensors(module).items():
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, dtype):
            return (
                f" gputune converts all floating-point tensors of a module to {dtype}, also "
                f"{name!r}, which was created as {tensor.dtype}. In the forward pass, write "
                f"x.to(self.{name}.dtype) instead of a fixed dtype."
            )
    return ""


def hint(error: str, inputs: Sequence[Tensor]) -> str:
    """Return a sentence that tells the user how to correct an error raised by torch.

    The sentence begins with a blank. It is "" if gputune knows no correction.
    """
    if "scalar types: Long, Int" in error:
        if any(x.is_floating_point() and x.dim() == 2 for x in inputs):
            remedy = per_interface(
                "For token ids pass a tensor of integers, torch.as_tensor(X)",
                "For token ids store a tensor of integers in a .pt file",
            )
            return f" {remedy}: gputune reads a 2-D array or DataFrame as a table of numbers."
        return (
            " An embedding takes ids as int64 or int32. Pass X.long(), or begin the forward pass "
            "with x.long()."
        )
    if "positional argument" in error or "unexpected keyword argument" in error:
        return (
            " gputune passes several inputs in order, and the inputs of a dict as keyword "
            "arguments. If the items of a Dataset are (inputs, target), leave y out."
        )
    is_whole = any(not x.is_floating_point() for x in inputs)
    words = ("Input type", "dtype", "Byte", "Bool", "Long", "Int")
    if is_whole and any(word in error for word in words):
        scaled = ""
        if any(x.dtype == torch.uint8 for x in inputs):
            scaled = f", or let {option('numbers', 'standard')} convert bytes to floats"
        return (
            " Integers, bytes and booleans are passed unchanged. Begin the forward pass with "
            f"x.float(){scaled}."
        )
    # The channels are not in the axis after the rows.
    lacking = any(f"expected {axes}D input (got {axes - 1}D" in error for axes in (4, 5))
    if lacking or f"expected input[1, {len(inputs[0])}, " in error:
        return (
            " X lacks the axis of the channels, which PyTorch's layers expect after the rows. "
            f"{_pass('X[:, None]')}."
        )
    if (
        re.search(r"Expected \dD \(unbatched\) or \dD \(batched\) input to conv[23]d", error)
        and inputs[0].dim() == 2
    ):
        return (
            f" A convolution takes images, but a row of X is {inputs[0].shape[1]} numbers. "
            f"{_pass('X.reshape(-1, channels, height, width)')}."
        )
    channels = re.search(r"to have (\d+) channels, but got", error)
    for x in inputs:
        if channels and x.dim() > 2 and x.shape[-1] in {1, 3, 4, int(channels[1])}:
            order = (0, x.dim() - 1, *range(1, x.dim() - 1))
            return (
                " The channels of X seem to come last, but PyTorch's layers expect them first. "
                f"{_pass(f'X.transpose{order}')} for an array, X.permute{order} for a tensor."
            )
    return ""


def _pass(code: str) -> str:
    """Return advice to replace X by the expression ``code``, without a full stop at its end."""
    return per_interface(f"Pass {code}", f"Write the file again with {code}")


def refuse_transformers_class(kind: object) -> None:
    """Raise InputError if ``kind`` is a class of transformers, such as BertForSequenceClassification
    or AutoModelForSequenceClassification."""
    if not isinstance(kind, type) or not _is_of_transformers(kind):
        return
    name = kind.__name__
    config = getattr(kind, "config_class", None)
    call = "AutoModelForSequenceClassification.from_config(config)"
    if name.startswith("Auto"):
        call = f"{name}.from_pretrained(..., num_labels=n_outputs)"
    elif isinstance(config, type):
        call = f"{name}({config.__name__}(num_labels=n_outputs))"
    raise InputError(
        "model",
        f"is the class {name} of transformers, which gputune cannot call without a config or "
        "pretrained weights",
        remedy=f"Pass a function that returns the model: def make_model(n_outputs): return {call}.",
    )


def _is_of_transformers(kind: type) -> bool:
    """Return whether a class or one of its bases is defined by transformers."""
    return any(base.__module__.partition(".")[0] == "transformers" for base in kind.__mro__)
