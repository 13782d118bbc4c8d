"""Describe the file or package of a user's module class, so that other processes find the class.

{"import": "package.module:Class", "sha256": ...}
    a class of an installed package, or of the running script
{"path": "/.../net.py", "class": "Net", "sha256": ...}
    a class of a file that ``class_from_file`` ran
{..., "made": "function"}
    a function there, or a partial that has a name there
{..., "made": "function", "keywords": {...}}
    a partial without a name, of the class or function there

The digest covers the file, or the source of the class and of its base classes. A class that was
typed at a prompt has no digest. A model has "file" in addition to "import": the file of the source
when the model was saved.

Finding a class may run its file. ``lookup.py`` describes the names that a file may use, and why
that is safe.
"""

import functools
import importlib
import inspect
import json
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TypeGuard

from gputune.annotations import StrPath
from gputune.errors import InputError, UntrustedCodeError
from gputune.input_files import check_file, read_file
from gputune.modules.adapters import adapters_of
from gputune.modules.construction import Builder, name_of
from gputune.modules.frozen import frozen_of
from gputune.study.code import FILE_MODULE, Files, files_of, files_to_import, module_values
from gputune.study.lookup import (
    MAIN,
    Grant,
    grant_of,
    is_granted,
    is_module_class,
    is_of_program,
    is_trained,
    lookup,
    public_model,
    remember_object,
)
from gputune.study.values import sha256
from gputune.types import Json

LARGEST_SOURCE = 2**24
"""The largest size in bytes of a Python file that a study or a model may name."""


def class_source(module_class: Builder) -> Json:
    """Return a description of the place that defines a class. ``find_class`` returns the class from
    this description.

    Raises:
        InputError: a partial has no name, and its arguments cannot be stored.
    """
    home, name = _place(module_class)
    module = sys.modules.get(home)
    builder = _builder_json(module_class)
    if module is not None and module.__name__.startswith(FILE_MODULE):
        ((path, digest),) = files_of(module)
        return {"path": path, "class": name, "sha256": digest, **builder}
    source = {"import": f"{home}:{name}", **builder}
    source_digest = _digest(module_class)
    if source_digest is not None:
        source["sha256"] = source_digest
    return source


def is_builder(value: object) -> TypeGuard[Builder]:
    """Return True for a module class, a function, or a partial of a class or a function."""
    if isinstance(value, functools.partial):
        return is_builder(value.func)
    return inspect.isfunction(value) or is_module_class(value)


def _unwrap(builder: Builder) -> Builder:
    """Return the class or function inside a partial. Other values are returned unchanged."""
    return builder.func if isinstance(builder, functools.partial) else builder


def _place(builder: Builder) -> tuple[str, str]:
    """Return the module and the name under which the module holds a class, a function or a
    partial."""
    inner = _unwrap(builder)
    for module in (inner.__module__, MAIN) if inner is not builder else ():
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
    path = module_values(sys.modules.get(_place(module_class)[0])).get("__file__")
    return str(Path(path).resolve()) if path and Path(path).is_file() else None


def script_of(module_class: Builder) -> str | None:
    """Return the absolute path of the running script if the script defines a class, else None."""
    return source_file(module_class) if _place(module_class)[0] == MAIN else None


def unreachable_place(module_class: Builder) -> str | None:
    """Return the place of a class as text if other processes cannot find the class, else None."""
    home, name = _place(module_class)
    if home == MAIN:
        script = source_file(module_class)
        return f"in the script {script!r}" if script else "in a notebook or at a prompt"
    reached = lookup(sys.modules[home], name) if home in sys.modules else None
    if reached is not None and (reached is module_class or reached is _unwrap(module_class)):
        return None
    return f"in {home!r}, where no import reaches it"


# Each digest is taken once: this process has not imported later edits of a source.
_DIGESTS: "weakref.WeakKeyDictionary[object, str | None]" = weakref.WeakKeyDictionary()


def _digest(module_class: Builder) -> str | None:
    """Return the digest of the source of a function or a class, or None without a source.

    The digest of a class includes its base classes below ``nn.Module``.
    """
    inner = _unwrap(module_class)
    if inner not in _DIGESTS:
        chain = inner.__mro__[:-1] if isinstance(inner, type) else (inner,)
        custom = [kind for kind in chain if not kind.__module__.startswith("torch.")]
        _DIGESTS[inner] = None
        with suppress(OSError, TypeError):
            _DIGESTS[inner] = sha256("\0".join(map(inspect.getsource, custom)))
    return _DIGESTS[inner]


def is_changed(module_class: Builder, source: Mapping[str, object]) -> bool:
    """Return True if the source of a class is known to differ from ``source``.

    ``source`` is the result of ``class_source``.
    """
    before = source.get("sha256")
    now = _digest(module_class) if "import" in source else class_source(module_class).get("sha256")
    return None not in (now, before) and now != before


def remember_code(module_class: Builder) -> None:
    """Remember a class or function that is trained or saved here, so that ``find_class`` finds it
    again.

    This never makes a script run again, because a script does more than define its classes.
    """
    home, name = _place(module_class)
    if home in sys.modules:
        remember_object(sys.modules[home], name, module_class)


def find_class(source: Json, *, trust_code: bool = False, or_changed: bool = False) -> Builder:
    """Return the class that ``class_source`` described. This may run its file or import its
    package.

    Raises:
        UntrustedCodeError: ``lookup.py`` does not allow the name, and ``trust_code`` is False. If
            this user has never trained or saved from these files, it is raised before any of them
            runs.
        InputError: the class does not exist any more, or its file has changed and ``or_changed`` is
            False.
    """
    keywords = source.get("keywords")
    if keywords:
        inner = {**source, "keywords": None}
        builder = find_class(inner, trust_code=trust_code, or_changed=or_changed)
        return functools.partial(builder, **keywords)
    if "import" not in source:
        path = source["path"]
        name = str(source["class"])
        digest = source.get("sha256")
        return _of_file(path, name, digest, trust_code=trust_code, or_changed=or_changed)
    place = str(source["import"])
    if place.partition(":")[0] == MAIN:
        module_class = _of_main(source, trust_code=trust_code, or_changed=or_changed)
    else:
        module_class = _import_builder(place, source.get("file"), trust_code)
    if not or_changed:
        _check_unchanged(module_class, source, repr(place))
    return module_class


def _check_unchanged(builder: Builder, source: Json, name: str) -> None:
    """Raise InputError if a class or function has another source than when the search began."""
    if is_changed(builder, source):
        raise InputError(
            None,
            f"the module class {name} has changed since the search began",
            remedy="Restore its source.",
        )


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
    return _of_file(path, name, trust_code=True)


def function_from_file(path: StrPath, name: str, argument: str) -> Callable[..., object]:
    """Return a function from a Python file. This runs the file, once per process.

    Args:
        path: the Python file.
        name: the name of the function in it.
        argument: the argument that names the file, for error messages.

    Raises:
        InputError: the file does not exist or fails to run, or the name is not a function.
    """
    path, content = _read_source(path, argument)
    module = _run(path, content)
    function = getattr(module, name, None)
    if callable(function):
        return function  # type: ignore[no-any-return]
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    rule = f"names {name!r}, but {str(path)!r} has no such function"
    remedy = f"It has {', '.join(functions)}." if functions else "It has no function."
    raise InputError(argument, rule, remedy=remedy)


def _read_source(path: StrPath, argument: str) -> tuple[Path, bytes]:
    """Return the absolute path and the content of a Python file.

    Raises InputError if the file does not exist or is too large.
    """
    check_path = "Check the path."
    try:
        path = Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a NUL
        rule = f"names {str(path)!r:.300}, which is not the path of a file ({error})"
        raise InputError(argument, rule, remedy=check_path) from error
    file = f"names the file {str(path)!r}, which"
    if not path.exists():
        raise InputError(argument, f"{file} does not exist", remedy=check_path)
    if check_file(path) > LARGEST_SOURCE:
        raise InputError(argument, f"{file} is too large for a Python file", remedy=check_path)
    return path, read_file(path)


def _of_file(
    path: StrPath,
    name: str,
    known_digest: str | None = None,
    *,
    trust_code: bool,
    or_changed: bool = True,
) -> Builder:
    """Return a class from a Python file. ``known_digest`` is the expected digest of the file, or
    None."""
    path, content = _read_source(path, "model")
    digest = sha256(content)
    has_changed = known_digest not in (None, digest)
    if has_changed and not or_changed:
        raise InputError(
            None,
            f"the module file {str(path)!r} has changed since the model was trained",
            remedy="Restore it.",
        )
    if trust_code:
        return _trusted(_run(path, content), name)
    change = " It has changed since the model was saved." if has_changed else ""
    grant = _checked_grant(((str(path), digest),), name, change)
    return _granted(_run(path, content), name, grant)


def _of_main(source: Json, *, trust_code: bool, or_changed: bool) -> Builder:
    """Return a class that a script, a notebook or a prompt defined.

    The class comes from the running program, otherwise from an imported module with the same source
    of the class, otherwise from the script. The latter runs the script.
    """
    name = str(source["import"]).partition(":")[2]
    builder = lookup(sys.modules[MAIN], name)
    has_changed = builder is not None and is_changed(builder, source)
    if builder is not None and (or_changed or not has_changed):
        if trust_code or is_of_program(builder, name):
            return builder
        raise UntrustedCodeError(
            f"{name!r} is a function of the running program, and loading it calls that function "
            "with arguments from the file. You have not trained it from this program."
        )
    imported = _imported_copy(name, source, trust_code=trust_code)
    if imported is not None:
        return imported
    script = source.get("file")
    if builder is not None and (script is None or not trust_code):
        return builder  # the caller says that it has changed
    defined = f"the module class {name!r} was defined in"
    if script is None:
        raise InputError(
            None,
            f"{defined} a script, in a notebook or at a prompt, and this program has no class of "
            "that name with the same source. The study or model does not say in which file it was",
            remedy="Import the class into this program, define it here, or continue in the "
            "program that has it.",
        )
    path = Path(script).resolve()
    if not path.is_file():
        raise InputError(
            None,
            f"{defined} the script {str(path)!r}, which does not exist any more",
            remedy="Restore the script, or import the class with its old source into this program.",
        )
    if not trust_code:
        raise UntrustedCodeError(
            f"the module class {name!r} is in the script {str(path)!r}. Loading it runs that "
            'script again, except the code under `if __name__ == "__main__":`.'
        )
    found = class_from_file(path, name)
    if not or_changed:
        _check_unchanged(found, source, f"{name!r} of {str(path)!r}")
    return found


def _imported_copy(name: str, source: Json, *, trust_code: bool) -> Builder | None:
    """Return a class of an imported module that has the name and the source of a script's class, or
    None.

    Nothing is imported. Without ``trust_code``, this user must have trained the class from the file
    of the module.
    """
    if source.get("sha256") is None:
        return None
    for module in list(sys.modules.values()):
        builder = lookup(module, name)
        if builder is None or _digest(builder) != source["sha256"]:
            continue
        if trust_code or is_trained(files_of(module), name):
            return builder
    return None


def _import_builder(place: str, file: str | None, trust_code: bool) -> Builder:
    package, _, name = place.partition(":")
    model = public_model(package, name)
    if model is not None:
        return model
    failure = f"the module class {place!r} cannot be imported"
    try:
        files = files_to_import(package)
    except ImportError as error:
        # The module was a file next to a script.
        if file is not None and "." not in package and Path(file).is_file():
            return _of_file(file, name, trust_code=trust_code)
        former_file = "" if file is None else f"; it was in {file!r}"
        raise InputError(
            None,
            f"{failure} ({error}){former_file}",
            remedy="Make its package importable here.",
        ) from error
    grant = None if trust_code else _checked_grant(files, name)
    try:
        module = importlib.import_module(package)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(None, f"{failure} ({reason})", remedy="Correct its package.") from error
    return _trusted(module, name) if grant is None else _granted(module, name, grant)


def _checked_grant(files: Files, name: str, change: str = "") -> Grant:
    """Return the kind of object that the trust list allows for a name.

    Raises:
        UntrustedCodeError: the trust list allows nothing for the name. The error is raised before
            any file runs.
    """
    grant = grant_of(files, name)
    if grant is Grant.NOTHING:
        place = repr(files[-1][0]) if files else "a package without a file"
        raise UntrustedCodeError(
            f"the module class {name!r} is in {place}. Loading it runs that code, and you have "
            f"not trained or saved this version of it on this machine.{change}"
        )
    return grant


def _granted(module: ModuleType, name: str, grant: Grant) -> Builder:
    """Return the object that a name in a stranger's file stands for.

    Raises:
        UntrustedCodeError: the grant does not allow the object.
    """
    builder = lookup(module, name)
    if builder is not None and is_granted(builder, grant):
        return builder
    file = repr(module_values(module).get("__file__"))
    if builder is None:
        raise UntrustedCodeError(
            f"{name!r} is not the name of a class or function that is defined in {file}. Loading "
            "it runs any code that has that name."
        )
    raise UntrustedCodeError(
        f"loading it calls the function {name!r} of {file}. An earlier version of gputune noted "
        "that you trained from this file, but not which function."
    )


def _trusted(module: ModuleType, name: str) -> Builder:
    """Return the object behind a name that the user typed or trusts. The name may lead through
    other modules."""
    with suppress(AttributeError):
        builder = functools.reduce(getattr, name.split("."), module)
        if is_builder(builder):
            return builder
    classes = [key for key, value in vars(module).items() if is_module_class(value)]
    file = getattr(module, "__file__", None) or module.__name__
    raise InputError(
        None,
        f"{file!r} has no torch.nn.Module class {name!r}; it has {', '.join(classes) or 'none'}",
    )


def _run(path: Path, content: bytes) -> ModuleType:
    """Return the module that the file defines, under a name made from its path and content."""
    digest = sha256(content)
    name = f"{FILE_MODULE}{sha256(os.fsencode(path))[:12]}_{digest[:12]}"
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
