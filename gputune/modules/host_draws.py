"""Reads a module's code to find random generators that do not belong to PyTorch.

A stacked step runs the Python code of a forward pass once for many members. A recorded step
(recorded once and replayed) runs the code once for many steps. A random number from Python or NumPy
would then be the same in all these members or steps. A trial call cannot rule this out, because the
draw may be in a branch that is taken in one step of a hundred. Therefore gputune reads the bytecode
of a forward pass and of the functions that it refers to, together with the objects that their names
refer to. The code of libraries is not read. Draws in libraries show in a trial call, which changes
the generators' states.
"""

import builtins
import dis
import functools
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from inspect import getattr_static
from typing import Any

import torch
from torch import nn

from gputune.modules.host_generators import (
    GENERATORS,
    Env,
    closure_of,
    is_a,
    is_library,
    items_of,
    source_name,
)

# functions that are read at most; a huge library of modules ends the reading
_MOST_FUNCTIONS = 5000
_UNKNOWN = object()


def drawing_code(module: nn.Module, functions: Iterable[object] = (), step: object = None) -> str:
    """Return the place in user code that can make random numbers outside of PyTorch's generator.

    Args:
        module: The module. Its forward passes, hooks and submodules are read.
        functions: Further functions to read, such as a loss.
        step: A training step, which is called with the module.

    Returns:
        A description such as "Net.forward calls random.random", or "" if no code draws.
    """
    reader = _Reader()
    for part in module.modules():
        reader.visit(part)
    for function in (*functions, step):
        reader.visit(function)
    reader.call(step, [module])
    return reader.finding


def _defaults_of(function: types.FunctionType) -> Env:
    """Return the default values of a function's parameters, by name."""
    code = function.__code__
    values = function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return dict(zip(names, values)) | (function.__kwdefaults__ or {})


@lru_cache(4096)
def _instructions(code: types.CodeType) -> tuple[tuple[str, Any], ...]:
    """Return the bytecode operations of a code object, with their arguments. An operation on two
    names becomes two operations."""
    operations: list[tuple[str, Any]] = []
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        value = instruction.argval
        if name in _NEUTRAL:
            continue
        if name == "KW_NAMES" and instruction.arg is not None:  # Python 3.11 and 3.12
            value = code.co_consts[instruction.arg]
        if isinstance(value, tuple) and name in _PAIRS:  # Python 3.13 and newer
            operations += list(zip(_PAIRS[name], value))
        else:
            operations.append((name.replace("_BORROW", ""), value))
    return tuple(operations)


_NEUTRAL = {
    "PUSH_NULL",
    "CACHE",
    "PRECALL",
    "NOP",
    "EXTENDED_ARG",
    "RESUME",
    "COPY_FREE_VARS",
    "MAKE_CELL",
}
"""Bytecode operations that leave the last loaded value on top of the stack."""
_PAIRS = {
    "LOAD_FAST_LOAD_FAST": ("LOAD_FAST", "LOAD_FAST"),
    "LOAD_FAST_BORROW_LOAD_FAST_BORROW": ("LOAD_FAST", "LOAD_FAST"),
    "STORE_FAST_LOAD_FAST": ("STORE_FAST", "LOAD_FAST"),
    "STORE_FAST_STORE_FAST": ("STORE_FAST", "STORE_FAST"),
}
_LOADS = {
    "LOAD_FAST",
    "LOAD_FAST_CHECK",
    "LOAD_DEREF",
    "LOAD_CLASSDEREF",
    "LOAD_FROM_DICT_OR_DEREF",
}
_GLOBAL_LOADS = {"LOAD_GLOBAL", "LOAD_NAME"}
_STORES = {"STORE_FAST", "STORE_DEREF"}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD"}


class _Reader:
    """Reads Python code, and the objects that the code uses, until it finds code that makes random
    numbers.

    ``finding`` then describes the place, for example "Net.forward calls random.random".
    """

    def __init__(self) -> None:
        self.finding = ""
        # the values keep the objects alive, so that no other object gets their ids
        self.read: dict[tuple[int, ...], object] = {}
        self.place = ""

    def visit(self, value: object) -> None:
        """Search a value that code uses for random generators and for code that makes random
        numbers."""
        if self.finding or value is _UNKNOWN or value is None:
            return
        source = source_name(value)
        if source:
            verb = "uses" if source.startswith("a ") else "calls"
            self.finding = f"{self.place} {verb} {source}"
        elif is_a(value, types.FunctionType):
            self._read(value, [])
        elif is_a(value, types.MethodType):
            self._visit_method(value)
        elif is_a(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.visit(part)
        elif type(value) in (dict, list, tuple, set):
            for item in items_of(value):
                if callable(item) or is_a(item, *GENERATORS):
                    self.visit(item)
        elif is_a(value, nn.Module):
            self._visit_module(value)
        elif is_a(value, type):
            self._visit_class(value)
        elif not is_a(value, torch.Tensor, types.ModuleType, types.BuiltinFunctionType):
            self._visit_instance(value)

    def _visit_method(self, method: types.MethodType) -> None:
        """Search the code of a method for random numbers, and the methods that it overrides. It may
        call them by ``super()``."""
        if is_a(method.__func__, types.FunctionType):
            self._read(method.__func__, [method.__self__])
        owner = method.__self__ if is_a(method.__self__, type) else type(method.__self__)
        for cls in owner.__mro__:
            function = vars(cls).get(method.__name__)
            inner = function.__func__ if is_a(function, classmethod) else function
            if is_a(inner, types.FunctionType):
                self._read(inner, [method.__self__])

    def _visit_module(self, module: nn.Module) -> None:
        """Search the forward pass and the hooks of a module for code that makes random numbers."""
        if self._is_read(module, []):
            return
        attributes = vars(module)
        self.visit(attributes.get("forward") or getattr(module, "forward", None))
        for name, hooks in attributes.items():
            if name.endswith("_hooks") and is_a(hooks, dict):
                self.visit(list(hooks.values()))

    def _visit_class(self, cls: type) -> None:
        """Search the functions of a class for random numbers, because the code makes instances of
        the class.

        In a module class, only the forward pass is searched.
        """
        if self._is_read(cls, []):
            return
        for base in cls.__mro__:
            functions = dict(vars(base))
            # Code also names a module class for super(), and the constructor of a module may draw.
            if issubclass(cls, nn.Module):
                functions = {"forward": functions.get("forward")}
            for value in functions.values():
                if is_a(value, staticmethod) or is_a(value, classmethod):
                    value = value.__func__
                if is_a(value, types.FunctionType):
                    self._read(value, [])

    def _visit_instance(self, value: object) -> None:
        """Search the ``__call__`` method and the attributes of an object for random generators."""
        if self._is_read(value, []):
            return
        call = getattr_static(type(value), "__call__", None)
        if is_a(call, types.FunctionType):
            self._read(call, [value])
        for item in _attributes_of(value).values():
            if is_a(item, *GENERATORS):
                self.visit(item)

    def call(self, value: object, arguments: Sequence[object]) -> None:
        """Search the code of a called function for random numbers, given the call's known
        arguments."""
        if is_a(value, functools.partial):
            arguments = [*value.args, *arguments]
            value = value.func
        if all(argument is _UNKNOWN for argument in arguments):
            return
        if is_a(value, types.MethodType) and is_a(value.__func__, types.FunctionType):
            self._read(value.__func__, [value.__self__, *arguments])
        elif is_a(value, types.FunctionType):
            self._read(value, arguments)

    def _is_read(self, code: object, arguments: Sequence[object]) -> bool:
        """Return whether code was already searched with these arguments, and remember the code."""
        key = id(code), *map(id, arguments)
        if key in self.read or len(self.read) > _MOST_FUNCTIONS:
            return True
        self.read[key] = code, arguments
        return False

    def _read(self, function: types.FunctionType, arguments: Sequence[object]) -> None:
        """Search the code of a function, called with some known or unknown arguments, for random
        numbers."""
        if self.finding or is_library(function) or self._is_read(function.__code__, arguments):
            return
        code = function.__code__
        env = _defaults_of(function) | closure_of(function)
        named = zip(code.co_varnames[: code.co_argcount], arguments)
        env |= {name: argument for name, argument in named if argument is not _UNKNOWN}
        before = self.place
        self.place = code.co_qualname
        self._read_code(code, env, function.__globals__)
        self.place = before

    def _read_code(self, code: types.CodeType, env: Env, outside: Mapping[str, Any]) -> None:
        """Search a code object: follow each name from its load, through its attributes, to its
        use."""
        # The values that were loaded last. The list is empty if their number is not known.
        stack: list[object] = []
        keywords = 0  # keyword arguments of the next call
        for operation, name in _instructions(code):
            top = stack.pop() if stack else _UNKNOWN
            if operation in _ATTRIBUTES:
                stack.append(self._attribute(top, name))
            elif operation in _STORES:
                env[name] = top
            elif operation == "KW_NAMES":
                keywords = len(name)
                stack.append(top)
            else:
                self.visit(top)
                if operation in _LOADS:
                    stack += [top, env.get(name, _UNKNOWN)]
                elif operation in _GLOBAL_LOADS:
                    stack += [top, outside.get(name, getattr(builtins, name, _UNKNOWN))]
                elif operation == "LOAD_CONST":
                    stack += [top, _UNKNOWN]
                elif operation == "IMPORT_NAME":
                    stack = [sys.modules.get(name, _UNKNOWN)]
                elif operation == "IMPORT_FROM":
                    stack += [top, self._attribute(top, name)]
                elif operation == "CALL" and len(stack) >= name:
                    values = [*stack, top]
                    arguments = values[len(values) - name : len(values) - keywords]
                    self.call(values[-name - 1], arguments)
                    stack = [*values[: -name - 1], _UNKNOWN]
                    keywords = 0
                else:
                    stack = []
                    keywords = 0
            if self.finding:
                return
        self.visit(stack[-1] if stack else _UNKNOWN)
        for constant in code.co_consts:
            if is_a(constant, types.CodeType):  # a function, a lambda or a comprehension inside
                self._read_code(constant, dict(env), outside)

    def _attribute(self, value: object, name: str) -> object:
        """Return an object's attribute without running the user's code. For a property, the code of
        its getter is read instead."""
        if value is _UNKNOWN or is_a(value, torch.Tensor):
            return _UNKNOWN
        if source_name(value) and not is_a(value, types.ModuleType):
            self.visit(value)
            return _UNKNOWN
        if name == "rvs":  # a distribution of SciPy draws by this method
            self.finding = f"{self.place} calls rvs of {type(value).__name__}"
            return _UNKNOWN
        is_class = is_a(value, type)
        owner = value if is_class else type(value)
        attributes = {} if is_class else _attributes_of(value)
        if name in attributes:
            return attributes[name]
        attribute = getattr_static(owner, name, _UNKNOWN)
        if is_a(attribute, staticmethod):
            return attribute.__func__
        if is_a(attribute, classmethod):
            return types.MethodType(attribute.__func__, owner)
        if is_a(attribute, types.FunctionType):
            return attribute if is_class else types.MethodType(attribute, value)
        getter = None
        if is_a(attribute, property):
            getter = attribute.fget
        elif is_a(attribute, functools.cached_property):
            getter = attribute.func
        if is_a(getter, types.FunctionType):  # the getter of a property or of a cached property
            self._read(getter, [value])
            return _UNKNOWN
        if is_a(attribute, types.MemberDescriptorType):  # an attribute in __slots__
            return getattr(value, name, _UNKNOWN)
        return attribute if is_a(attribute, *GENERATORS) or callable(attribute) else _UNKNOWN


def _attributes_of(value: object) -> Mapping[str, Any]:
    """Return an object's own attributes. A module's attributes include its submodules."""
    try:
        attributes: dict[str, Any] = vars(value)
    except TypeError:  # it has no attributes
        return {}
    if is_a(value, nn.Module):
        return {**attributes.get("_modules", {}), **attributes}
    return attributes
