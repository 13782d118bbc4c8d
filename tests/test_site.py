"""The documentation site: what its reference lists. ``./scripts/docs`` builds it."""

import re
from importlib import import_module
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
MODULES = (
    "gputune",
    "gputune.callbacks",
    "gputune.models",
    "gputune.optim",
    "gputune.sklearn",
)
DIRECTIVE = re.compile(r"^\.\. auto(?:class|exception|function):: (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def documented():
    """Return the names that the reference documents."""
    names = []
    for page in (DOCS / "reference").glob("*.md"):
        names += DIRECTIVE.findall(page.read_text())
    return names


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name_once(module, documented):
    public = [f"{module}.{name}" for name in import_module(module).__all__]
    if module == "gputune":
        public.remove("gputune.__version__")  # explained in a sentence
    of_module = [name for name in documented if name.rpartition(".")[0] == module]
    assert sorted(of_module) == sorted(public)
