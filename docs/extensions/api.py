"""Leave out of the reference what is of no use to its readers.

- Members whose docstrings belong to other packages. Estimators inherit from scikit-learn, models
  and optimizers from PyTorch. The reference shows only what gputune adds.
- The constructors of exceptions, which users catch but never make.

A page that a docstring names, such as ``docs/export.md``, becomes a link.
"""

import inspect
import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

_PAGE = re.compile(r"``(docs/[\w-]+)\.md``")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the filters and the links."""
    app.connect("autodoc-process-docstring", _link_pages)
    app.connect("autodoc-skip-member", _is_left_out)
    app.connect("autodoc-process-signature", _signature)
    app.connect("doctree-read", _set_dashes)
    return {"parallel_read_safe": True}


def _link_pages(
    app: Sphinx, kind: str, name: str, member: object, options: object, lines: list[str]
) -> None:
    for position, line in enumerate(lines):
        lines[position] = _PAGE.sub(r":doc:`/\1`", line)


def _is_left_out(
    app: Sphinx, kind: str, name: str, member: object, skip: bool, options: object
) -> bool | None:
    """Return True for a member of another package. None leaves the decision to autodoc."""
    function = member.fget if isinstance(member, property) else inspect.unwrap(member)
    module = getattr(function, "__module__", None)
    is_foreign = module is None or not module.startswith("gputune")
    return True if is_foreign else None


def _signature(
    app: Sphinx, kind: str, name: str, member: object, options: object, signature: str, result: str
) -> tuple[str, str] | None:
    return ("", "") if kind == "exception" and signature else None


def _set_dashes(app: Sphinx, page: nodes.document) -> None:
    """Write a dash between a parameter and its text.

    Sphinx leaves this to its smart quotes, which would also change the flags of the command line.
    """
    for text in list(page.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))
