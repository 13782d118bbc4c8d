"""Write the inventories of other libraries: the addresses of the names that our text uses.

    python -P scripts/inventories.py

The site links a name such as ``torch.nn.Module`` to the documentation of its library. Sphinx reads
the addresses from docs/inventories (inventory version 1, a line per name), so that building the
site needs no network. Run this script after a page or a docstring names something new. A name that
cannot be imported, or whose page is not known here, gets no link.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pydoc import locate
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
INVENTORIES = ROOT / "docs" / "inventories"
ALIASES: Mapping[str, str] = {"nn": "torch.nn", "np": "numpy", "F": "torch.nn.functional"}

# Library -> the page of a name. The first pattern that matches the whole name decides, and an empty
# page means no link.
_PAGES: Mapping[str, Mapping[str, str]] = {
    "torch": {
        r"torch\.(nn|optim|nn\.functional)": r"\g<1>",
        r"torch\.(amp\.GradScaler|autocast)": "amp",
        r"torch\.utils\.data\.\w+": "data",
        r"torch\.(inference_mode|export|onnx|os)": "",
        r"torch\.(\w+|nn\.\w+|nn\.(functional|attention)\.\w+|func\.\w+)": r"generated/\g<0>",
        r"torch\.optim\.(\w+|lr_scheduler\.\w+)": r"generated/\g<0>",
    },
    "numpy": {
        r"numpy\.random": "reference/random/index",
        r"numpy\.random\.(Generator|default_rng)": "reference/random/generator",
        r"numpy\.(\w+|lib\.format\.\w+)": r"reference/generated/\g<0>",
    },
    "scipy": {
        r"scipy\.stats": "reference/stats",
        r"scipy\.stats\.\w+": r"reference/generated/\g<0>",
    },
    "sklearn": {
        r"sklearn\.\w+": r"api/\g<0>",
        r"sklearn\.\w+\.\w+": r"modules/generated/\g<0>",
    },
    "pandas": {r"pandas\.(read_\w+|DataFrame)": r"reference/api/\g<0>"},
    "optuna": {
        r"optuna\.(samplers|visualization)": r"reference/\g<1>/index",
        r"optuna\.(importance|distributions|storages)": r"reference/\g<1>",
        r"optuna\.samplers\.\w+": r"reference/samplers/generated/\g<0>",
        r"optuna\.(storages|distributions|study)\.\w+": r"reference/generated/\g<0>",
    },
}


def main() -> None:
    """Write one file for each library."""
    INVENTORIES.mkdir(exist_ok=True)
    names = sorted(used_names())
    for library in _PAGES:
        lines = list(entries(library, names))
        text = f"# Sphinx inventory version 1\n# Project: {library}\n# Version: stable\n"
        (INVENTORIES / f"{library}.inv").write_text(text + "".join(lines))


def used_names() -> Iterator[str]:
    """Yield the names of other libraries in the code spans of pages and docstrings."""
    libraries = "|".join([*_PAGES, *ALIASES])
    name = re.compile(rf"`((?:{libraries})(?:\.\w+)+)")
    found = set()
    for pattern in ("gputune/**/*.py", "models/*.py", "docs/**/*.md", "*.md"):
        for file in ROOT.glob(pattern):
            found |= set(name.findall(file.read_text()))
    for alias_or_name in found:
        first, _, rest = alias_or_name.partition(".")
        yield f"{ALIASES.get(first, first)}.{rest}"


def entries(library: str, names: Iterable[str]) -> Iterator[str]:
    """Yield the lines of the inventory of a library."""
    for name in dict.fromkeys(names):
        value = locate(name)
        page = _page(library, name)
        if value is None or not page:
            continue
        if isinstance(value, ModuleType):
            kind = "mod"
        else:
            kind = "class" if inspect.isclass(value) else "function"
        yield f"{name} {kind} {page}.html\n"


def _page(library: str, name: str) -> str:
    """Return the page of a name without its ending, or ""."""
    for pattern, page in _PAGES[library].items():
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(page)
    return ""


if __name__ == "__main__":
    main()
