"""Find the class or function that a name in a study or model file stands for.

A study or a model folder may come from a stranger. It names the code that builds its modules, and
gputune calls that code with arguments from the same file. Without ``trust_code=True``, a name may
stand only for one of these:

(a) a public model of ``gputune.models``, that is, one of its ``__all__``;

(b) a class or function that this user has trained or saved, in that very file or module, under that
    very name;

(c) a subclass of ``nn.Module`` that the running program (``__main__``) defines. A function of the
    running program counts only if this user has trained it from that script, or this process has;

(d) a class or function of a script that this program has imported, if this user has trained it from
    that file while it ran as a script, and its source is the same.

Each step of the lookup, and why it is safe:

1. A name of ``gputune.models`` is a key of a table (``public_model``). No attribute is read and
   nothing is imported.

2. The files behind any other name are located and hashed by ``files_to_import``. Python's finders
   locate a module without running it. Each part of a module's name must be an identifier, so that
   no part is a path.

3. The trust list is checked (``grant_of``) before any of these files runs. Its key holds the path
   and digest of each file and the name of the object. So gputune runs only files that this user has
   run before, byte for byte and in the same place. A trained file vouches only for the trained
   object. Its imports, helpers and other functions have no key, so a file does not give access to
   them.

4. The name is followed through dictionaries: first the module's dictionary, then the dictionaries
of classes. Both
   are read past any override. Therefore no module ``__getattr__``, property, descriptor or
   metaclass runs. The search stops at anything that is not a class: a module such as ``torch.os``,
   a function, an instance.

5. The object must be a class of modules, a plain function or a ``functools.partial``. Its exact
   type decides: ``isinstance`` may call a ``__class__`` property. The ``__module__`` and
   ``__qualname__`` of the object must equal the given names. They differ for an alias and for a
   class imported from elsewhere.

6. A partial has no name. It counts only at the top level of its module. Its own function or class
   must also be defined in that module and pass step 5. Its preset arguments come from the user's
   file, not from the stranger's.

7. The object is called with arguments from the stranger's file. ``values.from_json`` makes these
   from JSON: numbers, text, lists, dicts, arrays, and public layers and functions of ``torch.nn``.
   None of these runs other code when it is called. The user's own class decides how it uses a text,
   such as a path that it loads.

Older trust lists have keys that hold only files, without names. Such a key vouches for the
subclasses of ``nn.Module`` that the file defines, and for partials of these subclasses at its top
level. Their purpose is to build a module. It does not vouch for functions, because the trained
function cannot be told from a helper such as ``clean_up(folder)``.
"""

import functools
import json
import sys
from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any, TypeGuard
from weakref import WeakSet

from torch import nn

from gputune.modules.construction import Builder
from gputune.study.code import Files, files_of, is_remembered, module_values, remember

MAIN = "__main__"

_MODELS = "gputune.models"
_MODELS_VALUES = vars(import_module(_MODELS))
_PUBLIC: Mapping[str, type[nn.Module]] = {
    name: _MODELS_VALUES[name] for name in _MODELS_VALUES["__all__"]
}


class Grant(Enum):
    """The kind of object that gputune may look up in a file of the user's code.

    The trust list or the caller chooses the kind: nothing, a module class, or the trained object.
    """

    NOTHING = "nothing"
    MODULES = "a subclass of nn.Module that the file defines"
    OBJECT = "the class or function that was trained"


def public_model(package: str, name: str) -> type[nn.Module] | None:
    """Return the ``gputune.models`` class with a given name and package (or file), or None."""
    model = _PUBLIC.get(name)
    if model is None or package not in (_MODELS, model.__module__):
        return None
    return model


def remember_object(module: ModuleType, name: str, builder: Builder) -> None:
    """Remember a class, function or partial that is trained or saved here, by its files and its
    name."""
    is_script = module_values(module).get("__name__") == MAIN
    if is_script and type(builder) in (FunctionType, functools.partial):
        _trained_here.add(builder)
    files = files_of(module)
    if files:
        remember(_key(files, name, is_script=is_script))


_trained_here: WeakSet[Any] = WeakSet()
"""The functions and partials of the running program that this process has trained from."""


def grant_of(files: Files, name: str) -> Grant:
    """Return the kind of object that the trust list allows for a name in the given files.

    The function does not run the files.
    """
    if not files:
        return Grant.NOTHING
    if is_remembered(_key(files, name)):
        return Grant.OBJECT
    # The second key is the one of older versions.
    return Grant.MODULES if is_remembered(json.dumps(files)) else Grant.NOTHING


def is_trained(files: Files, name: str) -> bool:
    """Return True if this user has trained an object of these files, also while they ran as a
    script.

    The files run already as modules of this program.
    """
    return bool(files) and (
        is_remembered(_key(files, name)) or is_remembered(_key(files, name, is_script=True))
    )


def _key(files: Files, name: str, *, is_script: bool = False) -> str:
    """Return the key of an object in the trust list, as text.

    The key of an object in a script is used only while the script runs.
    """
    return json.dumps({"script" if is_script else "files": files, "name": name})


def is_granted(builder: Builder, grant: Grant) -> bool:
    """Return True if the trust list's grant allows the object that ``lookup`` returned."""
    inner = builder.func if type(builder) is functools.partial else builder
    return grant is Grant.OBJECT or (grant is Grant.MODULES and is_module_class(inner))


def is_of_program(builder: Builder, name: str) -> bool:
    """Return True if the running program may build its own object with this name.

    This is so for a class, and for an object that was trained from this program.
    """
    if is_module_class(builder):
        return True
    files = files_of(sys.modules[MAIN])
    return builder in _trained_here or (
        bool(files) and is_remembered(_key(files, name, is_script=True))
    )


def lookup(module: ModuleType, name: str) -> Builder | None:
    """Return the class, function or partial that a module defines under a qualified name, or None.

    Only dictionaries are read, see steps 4 to 6 above.
    """
    values = module_values(module)
    home = values.get("__name__")
    first, *rest = name.split(".")
    value = values.get(first)
    for part in rest:
        if not _is_class(value):
            return None
        value = _class_values(value).get(part)
        if type(value) is staticmethod:
            value = value.__func__
    if type(value) is functools.partial:
        # A partial in the running program may wrap any function: it counts only if it was trained.
        is_own = home == MAIN or _is_defined(module, value.func)
        return value if is_own and not rest else None
    return value if _is_builder(value) and _place(value) == (home, name) else None


def _is_defined(module: ModuleType, value: object) -> bool:
    """Return True if a module defines a class or function under the object's own name."""
    return _is_builder(value) and lookup(module, _place(value)[1]) is value


def _is_builder(value: object) -> TypeGuard[Builder]:
    return type(value) is FunctionType or is_module_class(value)


def _is_class(value: object) -> TypeGuard[type]:
    return issubclass(type(value), type)


def is_module_class(value: object) -> TypeGuard[type[nn.Module]]:
    """Return True for a subclass of ``nn.Module``. No attribute and no metaclass of the value is
    used."""
    return _is_class(value) and issubclass(value, nn.Module)


def _place(value: Any) -> tuple[str, str]:
    """Return the module and the qualified name under which a class or function was defined."""
    if _is_class(value):
        return _class_values(value)["__module__"], _QUALNAME(value)
    return value.__module__, value.__qualname__


# Python's own descriptors: a metaclass may override the attributes, but not these.
_DICTIONARY = vars(type)["__dict__"].__get__
_QUALNAME = vars(type)["__qualname__"].__get__


def _class_values(holder: type) -> Mapping[str, Any]:
    """Return the attributes that a class itself defines, without inherited attributes."""
    values: Mapping[str, Any] = _DICTIONARY(holder)
    return values
