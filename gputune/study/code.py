"""The code of a user: what a study knows a function by, and what this user has trained or saved on
this machine.

Code is known by digests: of its source and the values that it holds, and of the files that run
where a module is imported, found without running any. Code that is remembered runs again without a
word. The list is
``gputune/trusted-code`` in the user's folder of state ($XDG_STATE_HOME, else ~/.local/state), a
digest a line. Where that folder cannot be had (a container without HOME) nothing outlives the
process. A list that others could have written, or put in the place of the user's, is not used.
Whoever removes the file withdraws all that it holds.
"""

import dis
import functools
import inspect
import os
import stat
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gputune.errors import InputError, warn
from gputune.input_files import read_file
from gputune.scratch import is_users, open_to_others
from gputune.study.values import sha256

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that each module of torch's has."""


def source_text(function: Any) -> str:
    """Return the source of a function or class, else a function's bytecode; "" where there is
    neither.

    Of a lambda it is its lines, and its bytecode too where these have several, which are then told
    apart; another Python has another bytecode.
    """
    code = getattr(function, "__code__", None)
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return "" if code is None else _bytecode(code)
    several = code is not None and code.co_name == "<lambda>" and text.count("lambda") > 1
    return text + _bytecode(code) if several else text


def _bytecode(value: Any) -> str:
    """Return a code object, or a constant of one, as text that is the same in every process."""
    if inspect.iscode(value):
        return repr((value.co_code, value.co_names, [*map(_bytecode, value.co_consts)]))
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)


def digest_of_code(value: object) -> str:
    """Return the SHA-256 of what a function or a callable object does, the same in every process.

    That is its source, its defaults, what it has closed over and what it reads of its file; of an
    object its class and attributes, of a module its parameters and buffers too. Of what is torch's
    it is the name alone, and so it is of an object that is not called.
    """
    return sha256("\0".join(_parts(value, ())))


def _parts(value: Any, path: tuple[int, ...]) -> Iterator[str]:
    """Return texts that differ where values do; ``path`` are the values that hold this one."""
    held: object = ()
    if isinstance(value, _PLAIN):
        yield repr(value)
    elif id(value) in path:
        return
    elif isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        yield f"{value.dtype}{tuple(value.shape)}{sha256(numbers.tobytes())}"
    elif isinstance(value, np.ndarray | np.generic):
        yield f"{value.dtype}{value.shape}{sha256(value.tobytes())}"
    elif isinstance(value, Mapping):
        held = [part for item in value.items() for part in item]
    elif isinstance(value, list | tuple):
        held = value
    elif isinstance(value, functools.partial):
        held = value.func, value.args, value.keywords
    elif inspect.ismethod(value):
        held = value.__func__, value.__self__
    elif isinstance(value, type) or inspect.isroutine(value):
        yield from map(_source, value.__mro__[:-1] if isinstance(value, type) else [value])
        held = [*_closure(value), *_module_values(value)]
    else:
        held = type(value), _attributes(value)
    if isinstance(held, list | tuple):
        for part in held:
            yield from _parts(part, (*path, id(value)))


def _source(function: Any) -> str:
    name = f"{function.__module__}:{function.__qualname__}"
    return (
        name
        if name.startswith(("torch.", "torch:", "builtins:"))
        else source_text(function) or name
    )


def _closure(function: Any) -> Iterator[object]:
    """Yield the defaults of a function and what it has closed over."""
    yield from (getattr(function, name, None) for name in ("__defaults__", "__kwdefaults__"))
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # it is empty
            yield cell.cell_contents


def _module_values(function: Any) -> Iterator[object]:
    """Yield names and values of numbers, texts and arrays of their module that a function, or a
    class's methods, read.

    What one of them sets is left out: a counter of calls is no other code.
    """
    if isinstance(function, type):
        for part in filter(inspect.isfunction, vars(function).values()):
            yield from _module_values(part)
        return
    around = getattr(function, "__globals__", {})
    parts = [getattr(function, "__code__", None)]
    uses: dict[str, set[str]] = {"LOAD_GLOBAL": set(), "STORE_GLOBAL": set()}
    for code in filter(inspect.iscode, parts):  # it grows
        parts += code.co_consts
        for step in dis.get_instructions(code):
            if step.opname in uses:
                uses[step.opname].add(step.argval)
    for name in sorted((uses["LOAD_GLOBAL"] - uses["STORE_GLOBAL"]) & around.keys()):
        if isinstance(around[name], (*_PLAIN, Tensor, np.ndarray, np.generic)):
            yield from (name, around[name])


def _attributes(value: Any) -> dict[str, object]:
    own = dict(getattr(value, "__dict__", {})) if callable(value) or is_dataclass(value) else {}
    if not isinstance(value, nn.Module):
        return own
    held = value._parameters | value._buffers | value._modules
    return {name: part for name, part in own.items() if name not in _OF_MODULES} | held


Files = tuple[tuple[str, str], ...]
"""Path and SHA-256 of the files that run where a module is imported: of its packages, outermost
first, then its own."""

FILE_MODULE = "gputune_file_"
"""What the names of modules begin with that gputune made of a file, whose digest they have as
``__sha256__``."""

# Each is taken once: a file that is edited later is not what this process has imported.
_FILES: "weakref.WeakKeyDictionary[ModuleType, Files]" = weakref.WeakKeyDictionary()


_DICTIONARY = vars(ModuleType)["__dict__"].__get__


def module_values(module: object) -> Mapping[str, Any]:
    """Return the dictionary of a module, empty for another object.

    It is read by Python's own descriptor: the class of a lazy module may run that module at any
    other access.
    """
    if not issubclass(type(module), ModuleType):
        return {}
    values: Mapping[str, Any] = _DICTIONARY(module)
    return values


def files_of(module: ModuleType) -> Files:
    """Return the files that made a module of this process."""
    values = module_values(module)
    own_name = str(values.get("__name__", ""))
    if own_name.startswith(FILE_MODULE):
        return ((str(values["__file__"]), values["__sha256__"]),)
    if not own_name:
        return ()
    if module not in _FILES:
        names = accumulate(own_name.split("."), "{}.{}".format)
        _FILES[module] = _hash_files(
            module_values(sys.modules.get(name)).get("__file__") for name in names
        )
    return _FILES[module]


def files_to_import(package: str) -> Files:
    """Return the files that importing a module runs, without running any; ImportError where there
    is no such module.

    Those of a module that is here already are the ones that made it, though none of them runs
    again.
    """
    if (module := sys.modules.get(package)) is not None:
        return files_of(module)
    name = ""
    places = None
    files = []
    for part in package.split("."):
        if not part.isidentifier():  # a finder might take it for a path
            raise ModuleNotFoundError(f"{package!r} is no name of a module")
        name = f"{name}.{part}" if name else part
        loaded = module_values(sys.modules.get(name))
        spec = loaded.get("__spec__") or next(
            (
                spec
                for finder in sys.meta_path
                if (spec := finder.find_spec(name, places)) is not None
            ),
            None,
        )
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        files.append(spec.origin if spec.has_location else None)
        places = loaded.get("__path__", spec.submodule_search_locations) or ()
    return _hash_files(files)


def _hash_files(paths: Iterable[str | None]) -> Files:
    """Return the files with their digests; none where one of them cannot be read by itself, as in
    an archive."""
    # Not the target of a link: Python takes the compiled code that lies beside the link. A package
    # may have no file.
    places = [Path(path).parent.resolve() / Path(path).name for path in paths if path is not None]
    try:
        return tuple((str(place), sha256(read_file(place))) for place in places)
    except (OSError, InputError):
        return ()


LIST = "trusted-code"
MOST = 10_000
"""Digests that the list holds; of a full one the older half goes."""

_LINE = 65
_here: set[str] = set()
"""What this process has remembered, also where there is no list."""


def remember(text: str) -> None:
    """Remember a text, which says what was run, for this process and where it can be for later
    ones."""
    digest = sha256(text)
    _here.add(digest)
    if (file := _open(os.O_RDWR | os.O_CREAT | os.O_APPEND)) is None:
        return
    # a full disk: it is asked about again
    with suppress(OSError), os.fdopen(file, "rb+", buffering=0) as lines:
        known = _digests(file)
        if digest in known:
            return
        if len(known) >= MOST:
            lines.truncate(0)
            digest = "\n".join([*known[-(MOST // 2) :], digest])
        # One write that begins a line, so that other processes may write too, and one of them end
        # in the middle.
        lines.write(f"\n{digest}".encode())


def is_remembered(text: str) -> bool:
    """Whether ``remember`` was told this very text, by this process or by an earlier one of this
    user."""
    digest = sha256(text)
    if digest in _here:
        return True
    if (file := _open(os.O_RDONLY)) is None:
        return False
    with os.fdopen(file, "rb"):
        return digest in _digests(file)


def _digests(file: int) -> list[str]:
    os.lseek(file, 0, os.SEEK_SET)
    return os.read(file, _LINE * (MOST + 1)).decode("ascii", "replace").split()


def _folder() -> Path | None:
    """Return the folder of the list, whether it exists or not; None where this user has none."""
    if not hasattr(os, "geteuid"):  # Windows
        return None
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if state.is_absolute():  # the XDG rule: one that is relative counts for nothing
        return state / "gputune"
    with suppress(RuntimeError, OSError):
        home = Path.home()
        # Root with the HOME of a user, as sudo may leave it, would make folders there that are not
        # the user's.
        if home.is_absolute() and home.stat().st_uid == os.geteuid():
            return home / ".local" / "state" / "gputune"
    return None


def _open(flags: int) -> int | None:
    """Return the opened list, None where there is none; warns of one that is not this user's alone
    to write."""
    if (folder := _folder()) is None or sys.platform == "win32":
        return None
    opened: list[int] = []
    try:
        if flags & os.O_CREAT:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, how, is_kind in (
            (folder, os.O_RDONLY | os.O_DIRECTORY, stat.S_ISDIR),
            (folder / LIST, flags | os.O_NOFOLLOW | os.O_NONBLOCK, stat.S_ISREG),
        ):
            opened.append(
                os.open(
                    path.name if opened else path, how, 0o600, dir_fd=opened[0] if opened else None
                )
            )
            status = os.fstat(opened[-1])
            if not (is_kind(status.st_mode) and is_users(status)):
                warn(
                    f"the list of the code that you have trained is not used, since {str(path)!r} "
                    "is not yours, or others may write to it: remove it, or take that right away "
                    "(chmod go-w)."
                )
                return None
        if (place := open_to_others(folder)) is not None:
            warn(
                f"the list of the code that you have trained is not used, since {str(place)!r}, "
                "which it is in, is another user's, or others may write to it. Take that right "
                "away (chmod go-w), or set XDG_STATE_HOME to a folder of your own."
            )
            return None
        return opened.pop()
    except OSError:
        return None
    finally:
        for file in opened:
            os.close(file)
