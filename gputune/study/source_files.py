"""The files that run where a module is imported, with their digests, found without running any."""

import hashlib
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

Files = tuple[tuple[str, str], ...]
"""Path and SHA-256 of the files that run where a module is imported: of its packages, outermost first, then its own."""

FILE_MODULE = "gputune_file_"
"""What the names of modules begin with that gputune made of a file, whose digest they have as ``__sha256__``."""

# Each is taken once: a file that is edited later is not what this process has imported.
_FILES: "weakref.WeakKeyDictionary[ModuleType, Files]" = weakref.WeakKeyDictionary()


def files_of(module: ModuleType) -> Files:
    """Return the files that made a module of this process."""
    if module.__name__.startswith(FILE_MODULE):
        return ((str(module.__file__), module.__dict__["__sha256__"]),)
    if module not in _FILES:
        parts = module.__name__.split(".")
        chain = [sys.modules.get(".".join(parts[: i + 1])) for i in range(len(parts))]
        _FILES[module] = _hashed(getattr(part, "__file__", None) for part in chain)
    return _FILES[module]


def files_to_import(package: str) -> Files:
    """Return the files that importing a module runs, without running any; ImportError where there is no such module.

    Those of a module that is here already are the ones that made it, though none of them runs again.
    """
    if (module := sys.modules.get(package)) is not None:
        return files_of(module)
    name, places, files = "", None, []
    for part in package.split("."):
        if not part:
            raise ModuleNotFoundError(f"{package!r} is no name of a module")
        name = f"{name}.{part}" if name else part
        loaded = sys.modules.get(name)
        spec = getattr(loaded, "__spec__", None) or next(
            (spec for finder in sys.meta_path if (spec := finder.find_spec(name, places)) is not None), None
        )
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        files.append(spec.origin if spec.has_location else None)
        places = getattr(loaded, "__path__", spec.submodule_search_locations) or ()
    return _hashed(files)


def _hashed(paths: Iterable[str | None]) -> Files:
    """Return the files with their digests; none where one of them cannot be read by itself, as in an archive."""
    files = []
    for path in paths:
        if path is None:  # a package without an __init__.py
            continue
        # Not the target of a link: Python takes the compiled code that lies beside the link.
        place = Path(path).parent.resolve() / Path(path).name
        try:
            with place.open("rb") as file:
                files.append((str(place), hashlib.file_digest(file, "sha256").hexdigest()))
        except OSError:
            return ()
    return tuple(files)
