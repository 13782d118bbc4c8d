"""Where a user's module class lives, written down so that another process finds it, and found again.

{"import": "package.module:Class", "sha256": ...}     a class of an installed package, or of the running script
{"path": "/.../net.py", "class": "Net", "sha256": ...}   a class of a file that ``class_from_file`` ran

The digest is that of the file, or of the source of the class and of those it inherits from; a class that was typed at
a prompt has none. A model has "file" beside "import": where the source lay when it was saved.

To find a class runs the file that it is in. That is done for a file whose path and content ``remember_code`` has
kept, and for others when the caller says so; the class of the running program itself is there without it.
"""

import functools
import hashlib
import importlib
import inspect
import json
import os
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from gputune.errors import InputError, UntrustedCodeError
from gputune.study.code_files import FILE_MODULE, Files, files_of, files_to_import
from gputune.study.trusted import is_remembered, remember

MAIN = "__main__"
LARGEST_SOURCE = 2**24
"""Bytes of a Python file that is named by a study or a model."""


def class_source(module_class: type[nn.Module]) -> dict[str, str]:
    """Return where the class is defined; ``find_class`` is the way back."""
    found = sys.modules.get(module_class.__module__)
    if found is None or not module_class.__module__.startswith(FILE_MODULE):
        digest = _digest(module_class)
        place = {"import": f"{module_class.__module__}:{module_class.__qualname__}"}
        return place if digest is None else {**place, "sha256": digest}
    path = Path(str(found.__file__))
    return {"path": str(path), "class": module_class.__qualname__, "sha256": found.__dict__["__sha256__"]}


def source_file(module_class: type[nn.Module]) -> str | None:
    """Return the Python file of a class, in full; None for one of a notebook or a prompt."""
    path = getattr(sys.modules.get(module_class.__module__), "__file__", None)
    return str(Path(path).resolve()) if path and Path(path).is_file() else None


def why_not_found(module_class: type[nn.Module]) -> str | None:
    """Return where a class is defined that another process does not find by itself; None where it does."""
    if module_class.__module__ == MAIN:
        script = source_file(module_class)
        return "in a notebook or at a prompt" if script is None else f"in the script {script!r}"
    try:
        if _class_of(sys.modules[module_class.__module__], module_class.__qualname__) is module_class:
            return None
    except (KeyError, InputError):
        pass
    return f"in {module_class.__module__!r}, where no import reaches it"


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


def is_changed(module_class: type[nn.Module], source: dict[str, Any]) -> bool:
    """Whether the source of a class is known not to be the one that ``class_source`` described."""
    now = _digest(module_class) if "import" in source else class_source(module_class).get("sha256")
    return None not in (now, source.get("sha256")) and now != source["sha256"]


def remember_code(module_class: type[nn.Module]) -> None:
    """Remember the source of a class that is trained or saved here, so that ``find_class`` runs it again.

    A script is not: to run it again is more than to define its classes.
    """
    found = sys.modules.get(module_class.__module__)
    if found is not None and module_class.__module__ != MAIN and (files := files_of(found)):
        remember(_text(files))


def find_class(
    source: dict[str, Any], *, trust_code: bool = False, or_changed: bool = False
) -> type[nn.Module]:
    """Return the class that ``class_source`` described; runs its file or imports its package.

    Raises UntrustedCodeError, before anything has run, where its files as they are now are not remembered and
    ``trust_code`` is not given; InputError where the class is gone or, unless ``or_changed``, its file has changed.
    """
    if "import" not in source:
        return _of_file(Path(source["path"]), str(source["class"]), source, trust_code, or_changed)
    place, file = str(source["import"]), source.get("file")
    package, _, name = place.partition(":")
    if package == MAIN:
        found = _of_main(name, file, trust_code)
    else:
        found = _imported(place, file, trust_code)
    if not or_changed and is_changed(found, source):
        raise InputError(
            f"the module class {place!r} has changed since the search was begun; restore its source."
        )
    return found


def class_from_file(path: str | os.PathLike[str], name: str) -> type[nn.Module]:
    """Return the ``nn.Module`` class ``name`` of the Python file at ``path``; runs the file, once a process.

    Raises InputError for a missing file, one that does not run, and a name that is no module class.
    """
    path = Path(path).resolve()
    return _class_of(_run(path, _read(path)), name)


def _of_file(
    path: Path, name: str, source: dict[str, Any], trust_code: bool, or_changed: bool
) -> type[nn.Module]:
    path = path.resolve()
    content = _read(path)
    digest = _sha256(content)
    changed = source.get("sha256") not in (None, digest)
    if changed and not or_changed:
        raise InputError(
            f"the module file {str(path)!r} has changed since the model was trained; restore it."
        )
    if not trust_code:
        _check_remembered(
            ((str(path), digest),), name, "; it has changed since the model was saved" * changed
        )
    return _class_of(_run(path, content), name)


def _of_main(name: str, script: str | None, trust_code: bool) -> type[nn.Module]:
    """Return a class of the running program, or of the script that it was defined in, which is then run."""
    found = vars(sys.modules[MAIN]).get(name)
    if isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == MAIN:
        return found
    if script is None:
        raise InputError(
            f"the module class {name!r} was defined in a script, in a notebook or at a prompt, and this program has "
            "none of that name; define it here too, or go on in the program that has it."
        )
    script = str(Path(script).resolve())
    if not trust_code:
        raise UntrustedCodeError(
            f"the module class {name!r} is in the script {script!r}, and loading it runs that script again, all but "
            f'what stands under `if __name__ == "__main__":`.'
        )
    return class_from_file(script, name)


def _imported(place: str, file: str | None, trust_code: bool) -> type[nn.Module]:
    package, _, name = place.partition(":")
    try:
        files = files_to_import(package)
    except ImportError as error:
        if (
            file is not None and "." not in package and Path(file).is_file()
        ):  # a file that lay beside a script
            return _of_file(Path(file), name, {}, trust_code, or_changed=True)
        there = "" if file is None else f"; it was in {file!r}"
        raise InputError(
            f"the module class {place!r} cannot be imported ({error}){there}; make its package importable here."
        ) from error
    if not trust_code:
        _check_remembered(files, name)
    try:
        found = importlib.import_module(package)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"the module class {place!r} cannot be imported ({type(error).__name__}: {error}); correct its package."
        ) from error
    return _class_of(found, name)


def _check_remembered(files: Files, name: str, more: str = "") -> None:
    """Raise UntrustedCodeError, which names the file that would run, unless these files are remembered."""
    if not files or not is_remembered(_text(files)):
        where = repr(files[-1][0]) if files else "a package without a file"
        raise UntrustedCodeError(
            f"the module class {name!r} is in {where}, and loading it runs that code, which you have not trained or "
            f"saved on this machine as it is now{more}."
        )


def _text(files: Files) -> str:
    """What is remembered of files: where they lie too, since what they import lies beside them."""
    return json.dumps(files)


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


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"model: the file {str(path)!r} does not exist; check the path.")
    if path.stat().st_size > LARGEST_SOURCE:
        raise InputError(f"model: the file {str(path)!r} is too large for a Python file; check the path.")
    return path.read_bytes()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _run(path: Path, content: bytes) -> ModuleType:
    """Return the module that the file defines, under a name of its path and content."""
    place, digest = _sha256(os.fsencode(path)), _sha256(content)
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
