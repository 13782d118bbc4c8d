"""Where a user's module class lives, written down so that another process finds it, and found again.

{"import": "package.module:Class"}                    a class of an installed package, or of the running script
{"path": "/.../net.py", "class": "Net", "sha256": ...}   a class of a file that ``class_from_file`` ran
"""

import functools
import hashlib
import importlib
import os
import sys
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
        return {"import": f"{module_class.__module__}:{module_class.__qualname__}"}
    path = Path(str(found.__file__))
    return {"path": str(path), "class": module_class.__qualname__, "sha256": found.__dict__["__sha256__"]}


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
