"""Settings of the documentation site. ``./scripts/docs`` builds it into ``build/docs``.

The source folder is the root of the repository, so that a relative link means the same on the site
and on a code host.
"""

import sys
from pathlib import Path

from gputune.version import __version__

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "gputune"
author = "the gputune developers"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "api",
    "command_line",
    "figures",
    "live_report",
    "names",
    "navigation",
]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "AGENTS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**",
    "scripts/examples/*.ipynb",
    "scripts/benchmark/results/*.md",
]
exclude_patterns = [".*", "build", "dist", "gputune", "gputune.egg-info", "models", "tests"]

# Markdown. Anchors are made as code hosts make them.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
suppress_warnings = ["mystnb.unknown_mime_type"]
nb_execution_mode = "off"

# Docstrings are in Google style. A name in single backticks is a link if it is known.
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
default_role = "py:obj"
add_module_names = False
smartquotes = False

# The files come from scripts/inventories.py, so that building the site needs no network.
_LIBRARIES = {
    "torch": "https://docs.pytorch.org/docs/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "sklearn": "https://scikit-learn.org/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "optuna": "https://optuna.readthedocs.io/en/stable/",
}
intersphinx_mapping = {}
for _library, _address in _LIBRARIES.items():
    intersphinx_mapping[_library] = (_address, f"docs/inventories/{_library}.inv")

html_theme = "furo"
html_title = f"gputune {release}"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["site"]
