"""The script that runs the tests of scikit-learn and skorch."""

import sys
import warnings
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def suites(script):
    return script("scikit_learn_suites")


@pytest.mark.parametrize("place", range(4))
def test_a_suite_is_swapped_by_one_import(suites, place):
    suite = suites.SUITES[place]
    own, swapped = (suite.source(swapped=flag).splitlines() for flag in (False, True))
    (line,) = [
        i for i, line in enumerate(swapped) if line.startswith("from gputune.sklearn import ")
    ]
    assert swapped[:line] + swapped[line + 1 :] == own
    assert not any(later.startswith(("import ", "from ")) for later in swapped[line + 1 :])


def test_a_suite_of_skorch_is_swapped_in_its_functions(suites, monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "folder_of", lambda package: tmp_path)
    for suite in suites.SUITES[4:]:
        (name,) = suite.classes
        own = f"def net():\n    from skorch import {name}\n{suite.left_out}    return {name}\n"
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / suite.path).write_text(own)
        assert suite.source(swapped=False) == own
        swapped = f"def net():\n    from gputune.sklearn import {name}\n    return {name}\n"
        assert suite.source(swapped=True) == swapped


def test_a_package_that_is_missing_is_named(suites):
    with pytest.raises(SystemExit, match="needs no_such_package: pip install no_such_package"):
        suites.folder_of("no_such_package")


# As scikit-learn's are, but few: those take seconds to be collected.
TESTS = """
from sklearn.neural_network import MLPClassifier

def test_of_either():
    assert MLPClassifier(max_iter=3).max_iter == 3

def test_of_scikit_learns_own():
    assert MLPClassifier.__module__.startswith("sklearn.")

def test_not_asked_for():
    pass
"""


def test_it_compares_with_scikit_learns_own_class(suites, monkeypatch, tmp_path):
    def run(command, **how):
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            pytest.main(command[3:])
        del sys.modules["test_small"]  # the next one has its name

    # a process would import all again
    monkeypatch.setattr(suites, "subprocess", SimpleNamespace(run=run))
    (tmp_path / "test_small.py").write_text(TESTS)
    suite = suites.Suite(str(tmp_path / "test_small.py"), ("MLPClassifier",))
    applies, failed = suites.compared(suite, "either or own")
    assert sorted(applies) == ["test_of_either", "test_of_scikit_learns_own"]
    assert list(failed) == ["test_of_scikit_learns_own"]
    assert "'gputune.sklearn" in failed["test_of_scikit_learns_own"]


@pytest.mark.parametrize(("name", "code"), [("test_nonfinite_params", 0), ("test_of_tomorrow", 1)])
def test_a_failure_needs_a_reason(suites, monkeypatch, tmp_path, capsys, name, code):
    monkeypatch.setattr(
        suites, "compared", lambda suite, keyword: (["test_fit", name], {name: "an error"})
    )
    monkeypatch.setattr(suites, "version", lambda package: "1.2.0")
    assert suites.main(["test_mlp", "--out", str(tmp_path)]) == code
    assert "test_mlp: 1 of 2" in capsys.readouterr().out
    page = (tmp_path / "scikit-learn-suites.md").read_text()
    assert (
        "| 1 of 2 |" in page
        and f"`{name}` | {'not known' if code else 'the test expects a ValueError'}" in page
    )
