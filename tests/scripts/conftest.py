"""The scripts, imported as Python does when they are run from their folders."""

from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        for folder in (SCRIPTS / "examples", SCRIPTS / "reproduce", SCRIPTS):
            patch.syspath_prepend(folder)
        yield import_module
