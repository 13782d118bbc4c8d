"""Show a live HTML report in the page about the report, where a code host shows a screenshot."""

from pathlib import Path
from typing import Any

from docutils import nodes
from scipy.stats import loguniform
from sphinx.application import Sphinx

import gputune

PAGE = "docs/report"
_FRAME = '<iframe class="report" src="../live-report.html" title="A live HTML report"></iframe>'


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the change of the page, and the search that makes the report."""
    app.connect("doctree-resolved", _show_report)
    app.connect("build-finished", _make_report)
    return {"parallel_read_safe": True}


def _show_report(app: Sphinx, page: nodes.document, name: str) -> None:
    if name == PAGE:
        for image in list(page.findall(nodes.image)):
            if image["uri"].endswith("report.png"):
                image.replace_self(nodes.raw("", _FRAME, format="html"))


def _make_report(app: Sphinx, error: Exception | None) -> None:
    """Run the search of the page, and write its report into the site."""
    if error is not None:
        return
    space = {
        "lr": loguniform(1e-3, 1e-1),
        "weight_decay": loguniform(1e-4, 1e-1),
        "width": [16, 32, 64],
    }
    study = gputune.tune("mlp", "sklearn:wine", space=space, n_trials=40, max_epochs=10, verbose=0)
    study.report(Path(app.outdir, "live-report.html"))
