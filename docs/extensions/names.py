"""Turn code spans that name a public object into links: ours, and those of other libraries.

``study.X`` means ``gputune.Study.X``, and ``model.X`` means ``gputune.TunedModel.X``. On the pages
of the Python reference, a single word of ``gputune`` is a link too. A name without a known page
stays a code span.
"""

import re
from collections.abc import Mapping
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import gputune

_PREFIXES: Mapping[str, str] = {
    "gputune": "gputune",
    "study": "gputune.Study",
    "model": "gputune.TunedModel",
    "nn": "torch.nn",
    "np": "numpy",
    "torch": "torch",
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "sklearn",
    "pandas": "pandas",
    "optuna": "optuna",
}
_NAME = re.compile(rf"({'|'.join(_PREFIXES)})((?:\.\w+)+)(?:\(.*\))?", re.DOTALL)
_WORD = re.compile(r"(\w+)(?:\(.*\))?", re.DOTALL)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the change of a page."""
    app.connect("doctree-read", _link_names)
    return {"parallel_read_safe": True}


def _link_names(app: Sphinx, page: nodes.document) -> None:
    is_reference = app.env.docname.startswith("docs/reference/")
    for span in list(page.findall(nodes.literal)):
        target = _target(span.astext(), is_reference)
        if target is None or isinstance(span.parent, nodes.reference | nodes.title | pending_xref):
            continue
        link = pending_xref(
            "",
            span.deepcopy(),
            refdomain="py",
            reftype="obj",
            reftarget=target,
            refexplicit=True,
            refwarn=False,
            refdoc=app.env.docname,
        )
        span.replace_self(link)


def _target(text: str, is_reference: bool) -> str | None:
    """Return the full name of what a code span names, or None."""
    name = _NAME.fullmatch(text)
    if name is not None:
        return _PREFIXES[name[1]] + name[2]
    word = _WORD.fullmatch(text)
    if is_reference and word is not None and word[1] in gputune.__all__:
        return f"gputune.{word[1]}"
    return None
