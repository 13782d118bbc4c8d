"""Make the navigation of the site from docs/index.md, and let links to folders be plain text.

Each section of the index that lists pages becomes one part of the navigation. The index is
therefore an ordinary page on a code host, and the order of the pages is written only once.
docs/benchmark-results.md gets a list of the result pages.
"""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
_ENTRY = re.compile(r"^- \[([^\]]+)\]\(([^)#]+)\)", re.MULTILINE)
_RESULTS = """
```{toctree}
:glob:
:maxdepth: 1

../scripts/benchmark/results/*
```
"""
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#:]+)\)")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register both changes of a page's source."""
    app.connect("source-read", _change_source)
    return {"parallel_read_safe": True}


def _change_source(app: Sphinx, page: str, source: list[str]) -> None:
    file = Path(app.env.doc2path(page))
    if file.suffix != ".md":
        return
    text = _without_folder_links(source[0], file.parent)
    if page == app.config.root_doc:
        text += _toctrees(text)
    if page == "docs/benchmark-results":
        text += _RESULTS
    source[0] = text


def _toctrees(index: str) -> str:
    """Return a hidden toctree for each section of the index that lists pages."""
    parts = _SECTION.split(index)[1:]
    blocks = []
    for caption, section in zip(parts[::2], parts[1::2], strict=True):
        lines = []
        for title, path in _ENTRY.findall(section):
            lines.append(f"{title} <{path}>\n")
        if lines:
            entries = "".join(lines)
            blocks.append(f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}```\n")
    return "".join(blocks)


def _without_folder_links(text: str, folder: Path) -> str:
    """Return a page in which links to folders are plain text. The site has no pages of folders."""

    def plain(link: re.Match[str]) -> str:
        is_folder = (folder / link[2]).is_dir()
        return link[1] if is_folder else link[0]

    return _LINK.sub(plain, text)
