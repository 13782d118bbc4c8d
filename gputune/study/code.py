"""The code of a user's class or function, as a study or a model file describes it.

{"import": "package.module:Class", "sha256": ...}
    a class of an imported module, or of the running script
{"path": "/.../net.py", "class": "Net", "sha256": ...}
    a class of a file that ``class_from_file`` ran
{..., "made": "function"}
    a function there, or a partial that has a name there
{..., "made": "function", "keywords": {...}}
    a partial without a name, of the class or function there

The digest covers the file, or the source of the class and of its base classes. It only serves to
warn if the code has changed. A model has "file" in addition to "import": the file of the source
when the model was saved.

A file may come from a stranger. So gputune runs and imports nothing that a file names, unless the
caller says so for this call (``trust_code=True``). Without it, ``find_class`` returns only
objects of the running program: what this process has trained or saved, and subclasses of
``nn.Module`` in modules that the program has imported. Their names are followed without running
properties or ``__getattr__``. The arguments of a stranger are plain data, see ``values.from_json``.
"""

import functools
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard
from weakref import WeakValueDictionary

import numpy as np
from torch import Tensor, nn

from gputune.data.source import bytes_of
from gputune.ground.annotations import StrPath
from gputune.ground.errors import InputError, UntrustedCodeError, per_interface
from gputune.ground.types import Json
from gputune.modules.construction import Builder, name_of
from gputune.modules.pretrained import adapters_of, frozen_of
from gputune.study.values import sha256

_MAIN = "__main__"
_FILE_MODULE = "gputune_file_"
"""Prefix of the names of modules that gputune made from a file.

Such a module stores the digest of its file as ``__sha256__``.
"""

_DESCRIBED: "WeakValueDictionary[str, Any]" = WeakValueDictionary()
"""The classes and functions that this process has trained or saved, by their descriptions."""


def find_class(source: Json, *, trust_code: bool = False) -> Builder:
    """Return the class that ``class_source`` described.

    Only with ``trust_code``, this may run its file or import its package.

    Raises:
        UntrustedCodeError: the running program does not have the class, and ``trust_code`` is False.
        InputError: the class does not exist any more.
    """
    keywords = source.get("keywords")
    if keywords:
        builder = find_class({**source, "keywords": None}, trust_code=trust_code)
        return functools.partial(builder, **keywords)
    if "import" in source:
        package, _, name = str(source["import"]).partition(":")
        file = source.get("file")
    else:
        package = ""
        name = str(source["class"])
        file = source["path"]
    modules = list(_imported(package, file))
    for module in modules:
        module_class = _defined_class(module, name)
        if module_class is not None:
            return module_class
    described: Builder | None = _DESCRIBED.get(_key(source))
    if described is not None:
        return described
    if trust_code:
        return _named(modules[0] if modules else _load(package, file), name)
    place = repr(file or package)
    if file is None and package == _MAIN:
        place = "the script, notebook or prompt of its training"
    raise UntrustedCodeError(
        f"the module class {name!r} is in {place}, and loading it runs that code",
        per_interface(
            "Import the class into this program, pass it to load_model(folder, module=Net), or pass "
            "trust_code=True if you trust the code.",
            "Name the class and its file, --module FILE.py:NAME, or add --trust-code if you trust "
            "the code.",
        ),
    )


def class_source(module_class: Builder) -> Json:
    """Return a description of the place that defines a class, for ``find_class``.

    From now on, this process finds the class without a question.

    Raises:
        InputError: a partial has no name, and its arguments cannot be stored.
    """
    home, name = _place(module_class)
    builder = _builder_json(module_class)
    if home.startswith(_FILE_MODULE):
        module = sys.modules[home]
        digest = vars(module)["__sha256__"]
        source = {"path": module.__file__, "class": name, "sha256": digest, **builder}
    else:
        source = {"import": f"{home}:{name}", **builder}
        source_digest = _source_digest(_unwrap(module_class))
        if source_digest is not None:
            source["sha256"] = source_digest
    # Functions inside of a function share their place.
    if "<locals>" not in name:
        _DESCRIBED[_key(source)] = _unwrap(module_class) if "keywords" in builder else module_class
    return source


def _key(source: Mapping[str, object]) -> str:
    return repr([source.get(name) for name in ("import", "path", "class", "sha256")])


def is_changed(module_class: Builder, source: Mapping[str, object]) -> bool:
    """Return True if the source of a class is known to differ from ``source``.

    ``source`` is the result of ``class_source``.
    """
    now = _source_digest(_unwrap(module_class))
    if "path" in source:
        module = sys.modules[_place(module_class)[0]]
        now = getattr(module, "__sha256__", None)
    return None not in (now, source.get("sha256")) and now != source["sha256"]


# Each digest is taken once: this process has not imported later edits of a source.
@functools.lru_cache
def _source_digest(builder: Any) -> str | None:
    """Return the digest of the source of a function or a class, or None without a source.

    The digest of a class includes its base classes below ``nn.Module``.
    """
    classes = builder.__mro__[:-1] if isinstance(builder, type) else (builder,)
    custom = [kind for kind in classes if not kind.__module__.startswith("torch.")]
    with suppress(OSError, TypeError):
        return sha256("\0".join(map(inspect.getsource, custom)))
    return None


def is_builder(value: object) -> TypeGuard[Builder]:
    """Return True for a module class, a function, or a partial of a class or a function."""
    if isinstance(value, functools.partial):
        return is_builder(value.func)
    return inspect.isfunction(value) or _is_module_class(value)


def _is_module_class(value: object) -> TypeGuard[type[nn.Module]]:
    # An isinstance may call a property ``__class__``.
    return issubclass(type(value), type) and issubclass(value, nn.Module)  # type: ignore[arg-type]


def _unwrap(builder: Builder) -> Builder:
    """Return the class or function inside a partial. Other values are returned unchanged."""
    return builder.func if isinstance(builder, functools.partial) else builder


def _place(builder: Builder) -> tuple[str, str]:
    """Return the module and the name under which the module holds a class, a function or a
    partial."""
    inner = _unwrap(builder)
    for module in (inner.__module__, _MAIN) if inner is not builder else ():
        for name, value in vars(sys.modules.get(module, object)).items():
            if value is builder:
                return module, name
    return inner.__module__, inner.__qualname__


def _builder_json(builder: Builder) -> Json:
    """Return the entries "made" and "keywords" that describe a builder in addition to its place."""
    settings = adapters_of(builder)
    if settings is not None:
        kwargs = {"targets": settings.targets, "modules_to_save": settings.modules_to_save}
        return {"made": "function", "lora": kwargs}
    body = frozen_of(builder)
    if body is not None:
        return {"made": "function", "frozen": None if body.head is None else name_of(body.head)}
    if not isinstance(builder, functools.partial):
        return {"made": "function"} if inspect.isfunction(builder) else {}
    inner = builder.func
    if _place(builder) != (inner.__module__, inner.__qualname__):
        return {"made": "function"}
    parameters = inspect.signature(inner).parameters.values()
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = dict(zip(named, builder.args)) | builder.keywords
    try:
        if len(named) < len(builder.args):
            raise TypeError("it has arguments without a keyword")
        json.dumps(keywords)
    except TypeError as error:
        raise InputError(
            "model",
            f"is a partial of {inner.__name__} that cannot be stored ({error})",
            remedy="Assign the partial to a name at the top level of its function's file, or use "
            "only numbers and texts as its keywords.",
        ) from error
    return {"made": "function", "keywords": keywords}


def source_file(module_class: Builder) -> str | None:
    """Return the absolute path of a class's Python file, or None for a notebook or a prompt."""
    path = _file_of(sys.modules.get(_place(module_class)[0]))
    return path if path and Path(path).is_file() else None


def script_of(module_class: Builder) -> str | None:
    """Return the absolute path of the running script if the script defines a class, else None."""
    return source_file(module_class) if _place(module_class)[0] == _MAIN else None


def _file_of(module: object) -> str | None:
    """Return the absolute path of a module's file, or None. A lazy module stays unloaded."""
    file = inspect.getattr_static(module, "__file__", None)
    return os.path.realpath(file) if isinstance(file, str) else None


def _imported(package: str, file: str | None) -> Iterator[ModuleType]:
    """Yield the modules that the program has imported under a name or from a file.

    Scripts all have the same name, so a script with a file is found only by its file.
    """
    if package in sys.modules and (package != _MAIN or file is None):
        yield sys.modules[package]
    for name, module in list(sys.modules.items()):
        # The permission to run a file was for one call.
        if file is not None and not name.startswith(_FILE_MODULE) and _file_of(module) == file:
            yield module


def _static_value(module: object, name: str) -> object:
    """Return the object under a qualified name, or None. Nothing is run to find it."""
    value = module
    for part in name.split("."):
        value = inspect.getattr_static(value, part, None)
    return value


def _defined_class(module: ModuleType, name: str) -> type[nn.Module] | None:
    """Return the subclass of ``nn.Module`` that a module defines under a qualified name, or None."""
    value = _static_value(module, name)
    home = inspect.getattr_static(module, "__name__", None)
    if not _is_module_class(value) or (value.__module__, value.__qualname__) != (home, name):
        return None
    return value


def _load(package: str, file: str | None) -> ModuleType:
    """Return the module that a description names. This runs its file or imports its package."""
    if package and package != _MAIN:
        try:
            return importlib.import_module(package)
        except (Exception, SystemExit) as error:
            # The module may have been a file next to a script.
            is_missing = isinstance(error, ImportError)
            if not is_missing or file is None or not Path(file).is_file():
                raise InputError(
                    None,
                    f"the module {package!r} cannot be imported ({type(error).__name__}: {error})",
                    remedy="Make its package importable here.",
                ) from error
    return _run(str(file), "model")


def class_from_file(path: StrPath, name: str) -> Builder:
    """Return the ``nn.Module`` class, or the function that makes modules, from a Python file.

    This runs the file, once per process.

    Args:
        path: the Python file.
        name: the name of the class or function in it.

    Raises:
        InputError: the file does not exist or fails to run, or the name is not a class or function
            of this kind.
    """
    return _named(_run(path, "model"), name)


def class_from_flag(text: str | None) -> Builder | None:
    """Return the class that the flag ``--module FILE.py:NAME`` names, or None without the flag."""
    if text is None:
        return None
    path, colon, name = text.rpartition(":")
    if not colon:
        rule = "must be FILE.py:NAME, the file and the name of the class"
        raise InputError("--module", rule, got=text)
    return class_from_file(path, name)


def function_from_file(path: StrPath, name: str, argument: str) -> Callable[..., object]:
    """Return a function from a Python file. This runs the file, once per process.

    Args:
        path: the Python file.
        name: the name of the function in it.
        argument: the argument that names the file, for error messages.

    Raises:
        InputError: the file does not exist or fails to run, or the name is not a function.
    """
    module = _run(path, argument)
    function = getattr(module, name, None)
    if callable(function):
        return function  # type: ignore[no-any-return]
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    rule = f"names {name!r}, but {str(path)!r} has no such function"
    remedy = f"It has {', '.join(functions)}." if functions else "It has no function."
    raise InputError(argument, rule, remedy=remedy)


def _named(module: ModuleType, name: str) -> Builder:
    """Return the class or function behind a name that the user typed or trusts."""
    with suppress(AttributeError):
        builder = functools.reduce(getattr, name.split("."), module)
        if is_builder(builder):
            return builder
    classes = [key for key, value in vars(module).items() if _is_module_class(value)]
    raise InputError(
        None,
        f"{_file_of(module) or module.__name__!r} has no torch.nn.Module class {name!r}; it has "
        f"{', '.join(classes) or 'none'}",
    )


def _run(path: StrPath, argument: str) -> ModuleType:
    """Return the module that a file defines, under a name made from its path and content."""
    path = Path(path).resolve()
    if not path.is_file():
        rule = f"names the file {str(path)!r}, which does not exist"
        raise InputError(argument, rule, remedy="Check the path.")
    content = path.read_bytes()
    digest = sha256(content)
    name = f"{_FILE_MODULE}{sha256(os.fsencode(path))[:12]}_{digest[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path)
    module.__dict__["__sha256__"] = digest
    sys.modules[name] = module  # dataclasses and pickle look classes up here
    sys.path.insert(0, str(path.parent))  # as when the file is run itself
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(
            None,
            f"the module file {str(path)!r} does not run ({type(error).__name__}: {error})",
            remedy="Correct it.",
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that every torch module has."""


def digest_of_code(value: object) -> str:
    """Return the SHA-256 of the behavior of a function or a callable object, equal in every
    process.

    The digest of a function covers its source, its defaults, and the values outside of it that it
    reads. The digest of an object covers its class and its attributes. The digest of a module covers
    its parameters and buffers too. Torch's own code counts only by its name.
    """
    return sha256("\0".join(_parts(value, ())))


def source_text(function: Any) -> str:
    """Return the source text of a function or class, or "" without a source."""
    with suppress(OSError, TypeError):
        return inspect.getsource(function)
    return ""


def _parts(value: Any, path: tuple[int, ...]) -> Iterator[str]:
    """Yield texts that describe a value for a digest. Different values give different texts.

    ``path`` holds the ids of the values that contain this value. With them, the recursion ends if a
    value contains itself.
    """
    if isinstance(value, _PLAIN):
        yield repr(value)
    elif id(value) in path:
        return
    elif isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}{sha256(bytes_of(value).tobytes())}"
    elif isinstance(value, np.ndarray | np.generic):
        yield f"{value.dtype}{value.shape}{sha256(value.tobytes())}"
    elif str(getattr(value, "__module__", "")).startswith(("torch.", "builtins")) and _is_code(
        value
    ):
        yield f"{value.__module__}:{value.__qualname__}"
    else:
        if _is_code(value):
            yield source_text(value) or value.__qualname__
        for part in _contents(value):
            yield from _parts(part, (*path, id(value)))


def _is_code(value: object) -> bool:
    return isinstance(value, type) or inspect.isroutine(value)


def _contents(value: Any) -> Iterable[object]:
    """Return the values inside of a value, and the values that the code of a function reads."""
    if isinstance(value, Mapping):
        return chain.from_iterable(value.items())
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if inspect.ismethod(value):
        return value.__func__, value.__self__
    if isinstance(value, type):
        methods = filter(inspect.isfunction, vars(value).values())
        return *value.__mro__[1:-1], *map(_read_values, methods)
    if inspect.isfunction(value):
        return value.__defaults__, value.__kwdefaults__, _read_values(value)
    attributes: dict[str, object] = {}
    if callable(value) or is_dataclass(value):
        attributes = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        plain = {name: part for name, part in attributes.items() if name not in _OF_MODULES}
        attributes = plain | value._parameters | value._buffers | value._modules
    return type(value), attributes


def _read_values(function: Any) -> list[object]:
    """Return the values of the closure of a function, and the plain global values that it reads."""
    read = inspect.getclosurevars(function)
    data = (*_PLAIN, Tensor, np.ndarray, np.generic)
    plain = [item for item in read.globals.items() if isinstance(item[1], data)]
    return [*read.nonlocals.values(), plain]
