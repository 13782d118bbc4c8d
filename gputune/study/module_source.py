"""Where a user's module class lives, written down so that another process finds it, and found again.

{"import": "package.module:Class", "sha256": ...}     a class of an installed package, or of the running script
{"path": "/.../net.py", "class": "Net", "sha256": ...}   a class of a file that ``class_from_file`` ran

The digest is that of the file, or of the source of the class and of those it inherits from; a class that was typed at
a prompt has none.
"""

import functools
import hashlib
import importlib
import inspect
import os
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from gputune.errors import InputError

FILE_MODULE = "gputune_file_"
"""What the names of modules begin with that ``class_from_file`` made."""


def class_source(module_class: type[nn.Module]) -> dict[str, str]:
    """Return where the class is defined; ``find_class`` is the way back."""
    found = sys.modules.get(module_class.__module__)
    if found is None or not module_class.__module__.startswith(FILE_MODULE):
        digest = _digest(module_class)
        place = {"import": f"{module_class.__module__}:{module_class.__qualname__}"}
        return place if digest is None else {**place, "sha256": digest}
    path = Path(str(found.__file__))
    return {"path": str(path), "class": module_class.__qualname__, "sha256": found.__dict__["__sha256__"]}


_DIGESTS: "weakref.WeakKeyDictionary[type, str | None]" = weakref.WeakKeyDictionary()
"""Taken once of each class: a file that is edited later is not what this process has imported."""


def _digest(module_class: type[nn.Module]) -> str | None:
    if module_class not in _DIGESTS:
        _DIGESTS[module_class] = _source_digest(module_class)
    return _DIGESTS[module_class]


def _source_digest(module_class: type[nn.Module]) -> str | None:
    """Digest of the source of a class and of the classes under ``nn.Module`` it inherits from; None without."""
    own = [
        kind
        for kind in module_class.__mro__
        if kind is not object and not kind.__module__.startswith("torch.")
    ]
    try:
        text = "\0".join(map(inspect.getsource, own))
    except (OSError, TypeError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def check_unchanged(module_class: type[nn.Module], source: dict[str, Any]) -> None:
    """Raise InputError where the source of a class is not the one that ``class_source`` described."""
    now = class_source(module_class).get("sha256")
    if "import" in source and None not in (now, source.get("sha256")) and now != source["sha256"]:
        raise InputError(
            f"the module class {source['import']!r} has changed since the search was begun; restore its source."
        )


def find_class(source: dict[str, Any]) -> type[nn.Module]:
    """Return the class that ``class_source`` described; runs its file or imports its package.

    Raises InputError where the class is gone, or its file has changed.
    """
    if "import" in source:
        return _imported(str(source["import"]))
    return class_from_file(source["path"], source["class"], sha256=source["sha256"])


def class_from_file(path: str | os.PathLike[str], name: str, *, sha256: str | None = None) -> type[nn.Module]:
    """Return the ``nn.Module`` class ``name`` of the Python file at ``path``; runs the file, once a process.

    With ``sha256`` the file must have that digest. Raises InputError for a missing or changed file, one that
    does not run, and a name that is no module class.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise InputError(f"the module file {str(path)!r} does not exist; check the path.")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, digest):
        raise InputError(
            f"the module file {str(path)!r} has changed since the model was trained; restore it."
        )
    return _class_of(_run(path, content, digest), name)


def _imported(place: str) -> type[nn.Module]:
    package, _, name = place.partition(":")
    try:
        found = importlib.import_module(package)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"the module class {place!r} cannot be imported ({error}); make its package importable here."
        ) from error
    return _class_of(found, name)


def _class_of(found: ModuleType, name: str) -> type[nn.Module]:
    try:
        kind = functools.reduce(getattr, name.split("."), found)
    except AttributeError:
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        held = [
            key
            for key, value in vars(found).items()
            if isinstance(value, type) and issubclass(value, nn.Module)
        ]
        raise InputError(
            f"{getattr(found, '__file__', None) or found.__name__!r} has no torch.nn.Module class {name!r}; "
            f"it has {', '.join(held) or 'none'}."
        )
    return kind


def _run(path: Path, content: bytes, digest: str) -> ModuleType:
    """Return the module that the file defines, under a name of its path and content."""
    place = hashlib.sha256(os.fsencode(path)).hexdigest()
    name = f"{FILE_MODULE}{place[:12]}_{digest[:12]}"
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
            f"the module file {str(path)!r} does not run ({type(error).__name__}: {error}); correct it."
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    return module
