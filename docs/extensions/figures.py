"""Put the pictures of the pages into the HTML itself, so that they follow the theme of the site.

A picture uses the colors of the theme if it stands in a page, and its own light or dark colors on a
code host. The chart of README.md is a file for each theme instead, which Sphinx does not copy.
"""

import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the change of a page."""
    app.connect("doctree-resolved", _inline_pictures)
    app.connect("build-finished", _copy_charts)
    return {"parallel_read_safe": True}


def _inline_pictures(app: Sphinx, page: nodes.document, name: str) -> None:
    for image in list(page.findall(nodes.image)):
        file = Path(app.srcdir, image["uri"])
        if file.suffix == ".svg" and file.is_file():
            html = nodes.raw("", file.read_text(), format="html")
            image.replace_self(html)


def _copy_charts(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        for file in Path(app.srcdir, "docs").glob("speed-*.svg"):
            shutil.copy(file, Path(app.outdir, "docs"))
