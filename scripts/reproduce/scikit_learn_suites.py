"""scikit-learn's and skorch's own tests of their estimators and searches, with gputune's classes.

    python scripts/reproduce/scikit_learn_suites.py
    python scripts/reproduce/scikit_learn_suites.py test_mlp -k early --out OUT

Each test file of the installed scikit-learn is copied into a temporary folder. It is run unchanged,
and with one more line after its imports: ``from gputune.sklearn import ...``. A test counts if
scikit-learn's own class passes it. The page, OUT/scikit-learn-suites.md, lists the
tests that fail with gputune's class, with the reason. The script fails if a reason is missing.

The test files of skorch import its classes inside fixtures, so there the import itself is replaced.
skorch must be installed: pip install skorch==1.2.0
"""

import argparse
import ast
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import sklearn

_ANY_SOLVER = (
    "the test expects an error or a warning about a combination of solver and "
    "penalty. In gputune, all solvers find the same solution, so each of them accepts "
    "l1 and the elastic net"
)
_CONVERGENCE = (
    "the test expects a ConvergenceWarning with the name of a scikit-learn solver, "
    "but gputune solves with Newton's method"
)
_START = (
    "the result that the test expects depends on the starting point or the number of "
    "steps of the solver, but gputune solves to convergence from any starting point"
)
_DEPRECATED = (
    "the test expects a warning about a parameter that scikit-learn will "
    "remove, but gputune accepts this parameter without a warning"
)
_NO_INITIALIZE = (
    "the test calls initialize and replaces the net's criterion_, but gputune's estimators have no "
    "initialize, criterion_ and partial_fit"
)
_NO_HISTORY = "gputune's estimators have no history"
REASONS: dict[str, tuple[tuple[str, str], ...]] = {
    "test_mlp": (
        (
            "test_partial_fit_regression",
            "the test compares fit with partial_fit. gputune runs fit and "
            "scikit-learn runs partial_fit, with different random numbers, so the "
            "networks differ",
        ),
        (
            "test_nonfinite_params",
            "the test expects a ValueError if training diverges, but gputune raises "
            "gputune.DivergedError, an ArithmeticError",
        ),
        (
            "test_n_iter_no_change_inf",
            "with n_iter_no_change=inf, gputune computes no loss and does not count "
            "the epochs without improvement",
        ),
    ),
    "test_classifier": (
        ("with_nllloss|without_nllloss", _NO_INITIALIZE),
        ("test_high_learning_rate", _NO_HISTORY),
        (
            "could_not_be_inferred|with_tensordataset",
            "the test passes a torch Dataset, which gputune's estimators do not accept. "
            "gputune.tune accepts it",
        ),
        (
            "explicitly|empty_classes",
            "gputune's estimators have no parameter classes, and refuse max_epochs=0",
        ),
        (
            "classes_set|classes_data|classes_with_gaps",
            "the test passes max_epochs=0, which gputune refuses, and a module with fewer outputs "
            "than classes",
        ),
    ),
    "test_regressor": (
        (
            "test_not_fitted_raises.predict\\]",
            "the test expects skorch's NotInitializedError, but gputune raises scikit-learn's "
            "NotFittedError",
        ),
        (
            "test_not_fitted_raises",
            "gputune has no forward and forward_iter, and no predict_proba of a regressor",
        ),
        ("test_predict_predict_proba", "gputune has no predict_proba of a regressor"),
        ("test_net_learns|test_history", _NO_HISTORY),
        (
            "test_dimension_mismatch_warning",
            "the test expects a warning about broadcasting, but gputune compares the outputs "
            "(n, 1) with the targets (n,) row by row, as intended",
        ),
    ),
    "test_search": (
        (
            "test_searchcv_raise_warning_with_non_finite_score",
            "gputune gives one more warning than the test expects: the estimator is "
            "not from gputune, so scikit-learn's own loop fits it",
        ),
    ),
    "test_logistic": (
        (
            "test_check_solver_option|test_elasticnet_l1_ratio_err|test_l1_ratio_non_elasticnet",
            _ANY_SOLVER,
        ),
        (
            "test_logistic_cv_multinomial_score",
            "the test passes all parameters of the estimator, including gputune's "
            "`device`, to a private function of scikit-learn that does not have this "
            "parameter",
        ),
        ("test_max_iter|test_newton_cholesky_fallback", _CONVERGENCE),
        ("test_warm_start", _START),
        ("callback_fitted_estimator", _START),
        ("deprecated|warns_with_n_jobs", _DEPRECATED),
        (
            "penalty_l1ratio_incompatible",
            "the test expects a warning if penalty contradicts l1_ratio. gputune "
            "raises an error instead, but says nothing if l1_ratio is 0, its default "
            "value",
        ),
        (
            "test_large_sparse_matrix",
            "the test expects an error for a sparse X with 64-bit indices, but "
            "gputune makes X dense and therefore accepts these indices",
        ),
    ),
}
"""Of a suite: a pattern of the names of tests that fail, and why they do."""


@dataclass(frozen=True)
class Suite:
    """A test file of a package, and the classes that are replaced in it.

    Attributes:
        path: the file in the folder of the package.
        classes: the names of the classes.
        package: "sklearn", or "skorch", whose tests import the classes inside functions.
        keyword: a selection of the tests that use the classes, as of pytest.
        left_out: a line of a fixture that is left out for gputune's classes.
    """

    path: str
    classes: tuple[str, ...]
    package: str = "sklearn"
    keyword: str = ""
    left_out: str = ""

    @property
    def name(self) -> str:
        return Path(self.path).stem

    def source(self, *, swapped: bool) -> str:
        """Return the test file.

        If the classes are ``swapped``, one more import follows after the others, or the import in
        the functions is replaced.
        """
        text = (folder_of(self.package) / self.path).read_text()
        if not swapped:
            return text
        if self.package != "sklearn":
            for name in self.classes:
                line = f"from {self.package} import {name}\n"
                assert line in text
                text = text.replace(line, f"from gputune.sklearn import {name}\n")
            assert self.left_out in text
            return text.replace(self.left_out, "", 1)
        lines = text.splitlines(keepends=True)
        imports = [
            node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        lines.insert(
            imports[-1].end_lineno or 0, f"from gputune.sklearn import {', '.join(self.classes)}\n"
        )
        return "".join(lines)


def folder_of(package: str) -> Path:
    """Return the folder of an installed package. Raises SystemExit if it is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"needs {package}: pip install {package}")
    return Path(spec.origin).parent


SEARCHES = ("GridSearchCV", "RandomizedSearchCV")
SUITES = (
    Suite("neural_network/tests/test_mlp.py", ("MLPClassifier", "MLPRegressor")),
    Suite("linear_model/tests/test_logistic.py", ("LogisticRegression",)),
    Suite("model_selection/tests/test_search.py", (*SEARCHES, "HalvingRandomSearchCV")),
    Suite("model_selection/tests/test_successive_halving.py", ("HalvingRandomSearchCV",)),
    Suite(
        "tests/test_classifier.py",
        ("NeuralNetClassifier",),
        "skorch",
        "not TestNeuralNetBinaryClassifier",
        "            callbacks=[('dummy', dummy_callback)],\n",
    ),
    Suite("tests/test_regressor.py", ("NeuralNetRegressor",), "skorch"),
)


def outcomes(suite: Suite, *, swapped: bool, keyword: str) -> dict[str, str]:
    """Return for each test "" if it passed, otherwise the last line of its error.

    Skipped tests are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{suite.name}.py"
        report = Path(folder) / "report.xml"
        file.write_text(suite.source(swapped=swapped))
        plugin = "sklearn.conftest" if suite.package == "sklearn" else "skorch.tests.conftest"
        keyword = " and ".join(f"({word})" for word in (keyword, suite.keyword) if word)
        options = [
            "-p",
            plugin,
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            "-q",
            "--tb=line",
        ]
        options += ["-p", "no:xdist"] * (find_spec("xdist") is not None)
        options += ["-k", keyword, "--rootdir", folder, "-c", "/dev/null"]
        command = [sys.executable, "-m", "pytest", *options, str(file)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if not report.exists():
            raise RuntimeError(f"pytest did not run {suite.name}:\n{run.stdout}{run.stderr}")
        cases = ElementTree.parse(report).iter("testcase")
        return {case.attrib["name"]: error for case in cases if (error := _error(case)) is not None}


def _error(case: ElementTree.Element) -> str | None:
    """Return the error of a test: "" if it passed, None if it was skipped."""
    for part in case:
        if part.tag == "skipped":
            return None
        if part.tag in ("failure", "error"):
            return " ".join((part.attrib.get("message") or part.tag).split())[:300]
    return ""


def compared(suite: Suite, keyword: str) -> tuple[list[str], dict[str, str]]:
    """Return the tests that the library's class passes, and the errors with gputune's class."""
    own, swapped = (outcomes(suite, swapped=flag, keyword=keyword) for flag in (False, True))
    applies = [name for name, error in own.items() if not error]
    return applies, {
        name: swapped.get(name, "not run") for name in applies if swapped.get(name, "not run")
    }


def by_reason(suite: Suite, failed: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the failed tests by their reason, "" if there is none."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in failed:
        matching = (why for pattern, why in REASONS.get(suite.name, ()) if re.search(pattern, name))
        groups[next(matching, "")].append(name)
    return groups


def page(results: Mapping[Suite, tuple[Sequence[str], Mapping[str, str]]]) -> str:
    lines = [
        "# Tests of scikit-learn and skorch",
        "",
        "This page shows which of the tests of scikit-learn and skorch the estimators and searches "
        "of gputune pass. The tests",
        f"come from scikit-learn {sklearn.__version__} and skorch {version('skorch')}.",
        "",
        "- Each test file was run twice: unchanged, and with gputune's classes instead of the "
        "classes of the library.",
        "- The table includes only the tests that the library's own classes pass.",
        "- gputune has the parameters of skorch's estimators, but not their training loop.",
        "  [Differences from scikit-learn](scikit-learn-differences.md) lists the features of skorch "
        "that gputune lacks. Most tests",
        "  of skorch use one of them.",
        "- The table leaves out the tests of skorch's `NeuralNetBinaryClassifier`, a class that "
        "gputune does not have.",
        "- A fixture of `test_classifier.py` passes a callback. gputune's estimators refuse callbacks, "
        "so the script leaves this",
        "  argument out for them.",
        "- A number in parentheses is the number of parameter sets for which the test fails.",
        "- To make this page again, run `python scripts/reproduce/scikit_learn_suites.py --out docs`.",
        "",
        "| Test file | Classes | Tests that pass |",
        "|---|---|---|",
    ]
    for suite, (applies, failed) in results.items():
        classes = ", ".join(f"`{name}`" for name in suite.classes)
        lines.append(
            f"| `{suite.package}/{suite.path}` | {classes} | {len(applies) - len(failed)} of "
            f"{len(applies)} |"
        )
    for suite, (_, failed) in results.items():
        if not failed:
            continue
        lines += ["", f"## Tests that fail in {suite.name}", "", "| Tests | Reason |", "|---|---|"]
        for why, names in by_reason(suite, failed).items():
            functions = Counter(name.split("[")[0] for name in names)
            listed = ", ".join(
                f"`{name}`" + (f" ({n})" if n > 1 else "") for name, n in functions.items()
            )
            lines.append(f"| {listed} | {why or 'not known'} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "suites", nargs="*", choices=[[], *(suite.name for suite in SUITES)], help="default: all"
    )
    parser.add_argument(
        "-k", default="", metavar="WORDS", help="only tests with these words, as of pytest"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the page here")
    options = parser.parse_args(arguments)
    unexplained = 0
    results = {}
    for suite in (suite for suite in SUITES if suite.name in options.suites or not options.suites):
        applies, failed = results[suite] = compared(suite, options.k)
        print(f"{suite.name}: {len(applies) - len(failed)} of {len(applies)}")
        for why, names in by_reason(suite, failed).items():
            print(f"  {why or 'no reason is known'}:")
            for name in names:
                print(f"    {name}  {'' if why else failed[name]}")
            unexplained += 0 if why else len(names)
    if options.out is not None:
        (options.out / "scikit-learn-suites.md").write_text(page(results))
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
