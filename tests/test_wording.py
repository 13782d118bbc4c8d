"""Each interface renders the arguments that a message names in its own names."""

import copy
import pickle
import warnings

import pytest

from gputune.cli.flags import CommandLine
from gputune.ground.errors import (
    PYTHON,
    InputError,
    InputWarning,
    SearchInterrupted,
    UntrustedCodeError,
    Verbatim,
    option,
    per_interface,
    warn,
)
from gputune.sklearn.networks import EstimatorNames

COMMAND = CommandLine("tune", "'bugs.csv'")
SKLEARN = EstimatorNames()


@pytest.mark.parametrize(
    ("reference", "value", "python", "command", "sklearn"),
    [
        ("cv", 5, "cv=5", "--cv 5", "cv=5"),
        ("loss", "mae", "loss='mae'", "--loss mae", "criterion='mae'"),
        ("loss__delta", 2.0, "loss__delta=2.0", "loss__delta=2.0", "criterion__delta=2.0"),
        ("model", "mlp", "model='mlp'", "--model mlp", "module='mlp'"),
        ("target", "a b", "target='a b'", "--target 'a b'", "target='a b'"),
        ("tf32", True, "tf32=True", "--tf32", "tf32=True"),
        ("include_default", False, "include_default=False", "--no-default", None),
        ("workers", "ray", "workers='ray'", "--ray", None),
        ("study", "out/study.db", "study='out/study.db'", "--out out", None),
        ("kinds", {"a b": "number"}, "kinds={'a b': 'number'}", "--kind a b=number", None),
    ],
)
def test_an_argument_with_its_value(reference, value, python, command, sklearn):
    message = f"Pass {option(reference, value)}."
    assert PYTHON.render(message) == f"Pass {python}."
    assert COMMAND.render(message) == f"Pass {command}."
    assert SKLEARN.render(message) == f"Pass {sklearn or python}."


@pytest.mark.parametrize(
    ("reference", "command", "sklearn"),
    [
        ("n_trials", "--trials", "n_trials"),
        ("X", "'bugs.csv'", "X"),
        ("space['lr']", "--space lr", "lr"),
        ("include[0]", "--include", "include[0]"),
        ("include[0]['lr']", "lr", "include[0]['lr']"),
        ("Halving(min_epochs=...)", "--min-epochs", "Halving(min_epochs=...)"),
        ("Hypergradient(step=...)", "Hypergradient(step=...)", "Hypergradient(step=...)"),
        ("export(path='o.onnx')", "--out o.onnx", "export(path='o.onnx')"),
        ("ranked_by(metric='f1')", "--by f1", "ranked_by(metric='f1')"),
    ],
)
def test_an_argument_that_is_wrong(reference, command, sklearn):
    error = InputError(reference, "must be 3", got=4, remedy=f"Leave {option(reference)} out.")
    assert str(error) == f"{reference} must be 3, got 4. Leave {reference} out."
    assert error.text(COMMAND) == f"{command} must be 3, got 4. Leave {command} out."
    assert str(error.shown_by(SKLEARN)) == f"{sklearn} must be 3, got 4. Leave {sklearn} out."


def test_only_tune_has_a_flag_for_the_study():
    assert CommandLine("resume").render(option("study")) == "study"
    assert CommandLine("train").render(option("include[0]")) == "--set"


def test_the_check_of_a_module_has_its_own_flags():
    check = CommandLine("check")
    assert check.render(option("space['lr']")) == "--set lr"
    assert check.render(option("numbers", "standard")) == "--set numbers=standard"
    assert check.render(option("model")) == "--module"
    assert CommandLine("train").render(option("space")) == "--set"


def test_a_text_of_its_own_for_an_interface_may_hold_references():
    message = per_interface(f"Pass {option('cv', 5)}.", f"Add {option('cv', 5)} to it.")
    assert PYTHON.render(message) == "Pass cv=5."
    assert COMMAND.render(message) == "Add --cv 5 to it."
    assert SKLEARN.render(message) == "Pass cv=5."


def test_brackets_of_the_user_stay():
    message = f"The column '⟦a b⟧' is empty. Leave out {option('groups')}."
    assert PYTHON.render(message) == "The column '⟦a b⟧' is empty. Leave out groups."


@pytest.mark.parametrize("value", ["not a dict", "'", '"a', "(", "{1"])
def test_a_text_of_the_user_that_looks_like_a_reference_breaks_no_message(value):
    for name in ("kinds", "cv", "space['", "include[0]['"):
        text = COMMAND.render(f"The column '⟦{name}={value}⟧' is empty.")
        assert text.startswith("The column '") and text.endswith("' is empty.")


def test_a_value_is_shown_on_one_line_and_cut():
    assert str(InputError("a", "is odd", got="x" * 500)).endswith("xxx...")
    assert len(str(InputError("a", "is odd", got="x" * 500))) < 250
    assert str(InputError("a", "must have 2", got=Verbatim("3 columns"))) == (
        "a must have 2, got 3 columns."
    )
    assert str(InputError("a", "must be set", got=None)) == "a must be set, got None."
    assert str(InputError(None, "Nothing fits")) == "Nothing fits."


def test_an_error_survives_pickle_and_copy():
    error = InputError("cv", "must be 2 or more", got=None, remedy="Pass 2.").shown_by(SKLEARN)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert str(other) == str(error) == "cv must be 2 or more, got None. Pass 2."
        assert (other.argument, other.rule, other.got, other.remedy) == (
            "cv",
            "must be 2 or more",
            "None",
            "Pass 2.",
        )
    untrusted = pickle.loads(pickle.dumps(UntrustedCodeError("The file names code.")))
    assert str(untrusted) == "The file names code. If you trust it, pass trust_code=True."
    assert untrusted.text(COMMAND) == "The file names code. If you trust it, add --trust-code."


def test_warnings_and_interruptions_keep_their_references():
    message = f"Pass {option('task', 'regression')}."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn(message, InputWarning)
    assert str(caught[0].message) == "Pass task='regression'."
    assert COMMAND.render(vars(caught[0].message)["marked"]) == "Pass --task regression."
    stop = SearchInterrupted(message, study=None, signal=2)
    assert str(stop) == "Pass task='regression'."
    assert COMMAND.render(stop.message) == "Pass --task regression."
