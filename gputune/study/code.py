"""Identify a user's code by digests, and remember the code that this user trained or saved here.

A digest of code covers its source, the values that it holds, and the files that run when a module
is imported. The files are found without running any of them.

Remembered code runs again without a question. The list of digests, one per line, is
``gputune/trusted-code`` in the user's state folder ($XDG_STATE_HOME, or ~/.local/state). Without a
state folder (a container without HOME), the list ends with the process. A list that others could
have written or replaced is not used. To withdraw the trust, remove the file.
"""

import dis
import functools
import inspect
import os
import stat
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import is_dataclass
from importlib.machinery import ModuleSpec
from itertools import accumulate, chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from gputune.data.source import bytes_of
from gputune.errors import InputError, warn
from gputune.input_files import read_file
from gputune.scratch import is_users, open_to_others
from gputune.study.values import sha256

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that every torch module has."""


def source_text(function: Any) -> str:
    """Return the source text of a function or class. Without source, return a function's bytecode,
    otherwise "".

    The source of a lambda is its lines. If these lines hold several lambdas, the result includes
    the bytecode to tell the lambdas apart. Bytecode depends on the version of Python.
    """
    code = getattr(function, "__code__", None)
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return "" if code is None else _bytecode(code)
    if code is not None and code.co_name == "<lambda>" and text.count("lambda") > 1:
        text += _bytecode(code)
    return text


def _bytecode(value: Any) -> str:
    """Return the text of a code object or of its constant. The text is equal in every process."""
    if inspect.iscode(value):
        constants = list(map(_bytecode, value.co_consts))
        return repr((value.co_code, value.co_names, constants))
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)


def digest_of_code(value: object) -> str:
    """Return the SHA-256 of the behavior of a function or a callable object, equal in every
    process.

    The digest of a function covers its source, its defaults, its closure, and the global values
    that it reads. The digest of an object covers its class and its attributes. The digest of a
    module covers its parameters and buffers too.

    Torch's own code counts only by its name. The attributes of an object count only if it is
    callable or a dataclass.
    """
    return sha256("\0".join(_parts(value, ())))


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
    else:
        sources, contents = _sources_and_contents(value)
        yield from map(_source, sources)
        for part in contents:
            yield from _parts(part, (*path, id(value)))


def _sources_and_contents(value: Any) -> tuple[Iterable[Any], Iterable[object]]:
    """Return the classes and functions behind a value, and the values inside the value."""
    if isinstance(value, Mapping):
        return (), chain.from_iterable(value.items())
    if isinstance(value, list | tuple):
        return (), value
    if isinstance(value, functools.partial):
        return (), (value.func, value.args, value.keywords)
    if inspect.ismethod(value):
        return (), (value.__func__, value.__self__)
    if isinstance(value, type) or inspect.isroutine(value):
        sources = value.__mro__[:-1] if isinstance(value, type) else [value]
        return sources, chain(_closure(value), _module_values(value))
    return (), (type(value), _attributes(value))


def _source(function: Any) -> str:
    name = f"{function.__module__}:{function.__qualname__}"
    if name.startswith(("torch.", "torch:", "builtins:")):
        return name
    return source_text(function) or name


def _closure(function: Any) -> Iterator[object]:
    """Yield the defaults of a function and the values in its closure."""
    yield getattr(function, "__defaults__", None)
    yield getattr(function, "__kwdefaults__", None)
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # it is empty
            yield cell.cell_contents


def _module_values(function: Any) -> Iterator[object]:
    """Yield the names and values of the global numbers, strings and arrays that a function reads.

    For a class these are the global values that its methods read. A global that the code also sets
    is left out: a counter of calls is not part of the code.
    """
    if isinstance(function, type):
        for method in filter(inspect.isfunction, vars(function).values()):
            yield from _module_values(method)
        return
    values = getattr(function, "__globals__", {})
    constants = [getattr(function, "__code__", None)]
    uses: dict[str, set[str]] = {"LOAD_GLOBAL": set(), "STORE_GLOBAL": set()}
    for code in filter(inspect.iscode, constants):  # the list grows by the nested functions
        constants += code.co_consts
        for step in dis.get_instructions(code):
            if step.opname in uses:
                uses[step.opname].add(step.argval)
    for name in sorted((uses["LOAD_GLOBAL"] - uses["STORE_GLOBAL"]) & values.keys()):
        if isinstance(values[name], (*_PLAIN, Tensor, np.ndarray, np.generic)):
            yield from (name, values[name])


def _attributes(value: Any) -> dict[str, object]:
    if not callable(value) and not is_dataclass(value):
        return {}
    attributes = dict(getattr(value, "__dict__", {}))
    if not isinstance(value, nn.Module):
        return attributes
    plain = {name: part for name, part in attributes.items() if name not in _OF_MODULES}
    return plain | value._parameters | value._buffers | value._modules


Files = tuple[tuple[str, str], ...]
"""Path and SHA-256 of the files that an import of a module runs.

The files of its packages come first, from the outermost inwards, and then its own file.
"""

FILE_MODULE = "gputune_file_"
"""Prefix of the names of modules that gputune made from a file.

Such a module stores the digest of its file as ``__sha256__``.
"""

# Each digest is taken once: this process has not imported later edits of a file.
_FILES: "weakref.WeakKeyDictionary[ModuleType, Files]" = weakref.WeakKeyDictionary()


_DICTIONARY = vars(ModuleType)["__dict__"].__get__


def module_values(module: object) -> Mapping[str, Any]:
    """Return the dictionary of a module, or an empty dictionary for another object.

    The dictionary is read by Python's own descriptor. Any other access may run a lazy module.
    """
    if not issubclass(type(module), ModuleType):
        return {}
    values: Mapping[str, Any] = _DICTIONARY(module)
    return values


def files_of(module: ModuleType) -> Files:
    """Return the Python files from which this process loaded a module, with their digests."""
    values = module_values(module)
    name = str(values.get("__name__", ""))
    if name.startswith(FILE_MODULE):
        return ((str(values["__file__"]), values["__sha256__"]),)
    if not name:
        return ()
    if module not in _FILES:
        paths = []
        for package in accumulate(name.split("."), "{}.{}".format):
            paths.append(module_values(sys.modules.get(package)).get("__file__"))
        _FILES[module] = _hash_files(paths)
    return _FILES[module]


def files_to_import(package: str) -> Files:
    """Return the files that the import of a module runs, without running any of them.

    For a module that is already imported, the result has the files from which it was loaded,
    although no file runs again.

    Raises:
        ImportError: the module does not exist.
    """
    module = sys.modules.get(package)
    if module is not None:
        return files_of(module)
    name = ""
    folders = None
    files = []
    for part in package.split("."):
        if not part.isidentifier():  # a finder might take it for a path
            raise ModuleNotFoundError(f"{package!r} is not the name of a module")
        name = f"{name}.{part}" if name else part
        loaded = module_values(sys.modules.get(name))
        spec = loaded.get("__spec__") or _find_spec(name, folders)
        files.append(spec.origin if spec.has_location else None)
        folders = loaded.get("__path__", spec.submodule_search_locations) or ()
    return _hash_files(files)


def _find_spec(name: str, folders: Sequence[str] | None) -> ModuleSpec:
    for finder in sys.meta_path:
        spec = finder.find_spec(name, folders)
        if spec is not None:
            return spec
    raise ModuleNotFoundError(f"No module named {name!r}")


def _hash_files(paths: Iterable[str | None]) -> Files:
    """Return pairs of a file and its SHA-256. The result is empty if a file cannot be read, for
    example in an archive."""
    # Links are not resolved: Python uses the compiled code next to the link. A package may have no
    # file.
    places = [Path(path).parent.resolve() / Path(path).name for path in paths if path is not None]
    try:
        return tuple((str(place), sha256(read_file(place))) for place in places)
    except (OSError, InputError):
        return ()


LIST = "trusted-code"
MOST = 10_000
"""The largest number of digests in the list of trusted code. The older half of a full list is
removed."""

_LINE = 65
_remembered: set[str] = set()
"""The digests of code that this process remembers, even if no list can be stored."""


def remember(text: str) -> None:
    """Remember a text that describes code, in this process and, if possible, in later processes."""
    digest = sha256(text)
    _remembered.add(digest)
    if (file := _open(os.O_RDWR | os.O_CREAT | os.O_APPEND)) is None:
        return
    # If the disk is full, gputune asks about the code again later.
    with suppress(OSError), os.fdopen(file, "rb+", buffering=0) as lines:
        known = _digests(file)
        if digest in known:
            return
        if len(known) >= MOST:
            # O_APPEND: the next write goes to the new end of the file
            lines.truncate(0)
            digest = "\n".join([*known[-(MOST // 2) :], digest])
        # One write that begins with a new line: other processes may write too, and one of them may
        # have been stopped within a line.
        lines.write(f"\n{digest}".encode())


def is_remembered(text: str) -> bool:
    """Return True if this user called ``remember`` with this text, in this or an earlier
    process."""
    digest = sha256(text)
    if digest in _remembered:
        return True
    if (file := _open(os.O_RDONLY)) is None:
        return False
    with os.fdopen(file, "rb"):
        return digest in _digests(file)


def _digests(file: int) -> list[str]:
    os.lseek(file, 0, os.SEEK_SET)
    return os.read(file, _LINE * (MOST + 1)).decode("ascii", "replace").split()


def _folder() -> Path | None:
    """Return the folder for the list of trusted code, or None if this user has no state folder. The
    folder may not exist yet.
    """
    if not hasattr(os, "geteuid"):  # Windows
        return None
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if state.is_absolute():  # XDG: relative paths are ignored
        return state / "gputune"
    with suppress(RuntimeError, OSError):
        home = Path.home()
        # With sudo, root may have the HOME of a user. Folders made there would not belong to that
        # user.
        if home.is_absolute() and home.stat().st_uid == os.geteuid():
            return home / ".local" / "state" / "gputune"
    return None


_UNUSED = "gputune does not use the list of code that you have trained, because"


def _open(flags: int) -> int | None:
    """Return a file descriptor of the list of trusted code, or None without a list. Warns if other
    users may write to the list.
    """
    folder = _folder()
    if folder is None or sys.platform == "win32":
        return None
    with suppress(OSError), ExitStack() as opened:
        if flags & os.O_CREAT:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        opened.callback(os.close, directory)
        if not _is_private(directory, folder, stat.S_ISDIR):
            return None
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(LIST, flags, 0o600, dir_fd=directory)
        opened.callback(os.close, file)
        if not _is_private(file, folder / LIST, stat.S_ISREG):
            return None
        parent = open_to_others(folder)
        if parent is not None:
            warn(
                f"{_UNUSED} {str(parent)!r}, which contains it, belongs to another user, or others "
                "may write to it. Withdraw their permission (chmod go-w), or set XDG_STATE_HOME to "
                "your own folder."
            )
            return None
        opened.pop_all()  # the file stays open
        os.close(directory)
        return file
    return None


def _is_private(file: int, path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Return True if only this user may write to an open file. Otherwise warn."""
    status = os.fstat(file)
    if is_kind(status.st_mode) and is_users(status):
        return True
    warn(
        f"{_UNUSED} {str(path)!r} is not yours, or others may write to it. Remove it, or withdraw "
        "their permission (chmod go-w)."
    )
    return False
