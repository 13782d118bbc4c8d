"""The code on the page of a study trains its best trial again."""

import ast
import re
import warnings
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
from optuna.samplers import RandomSampler
from sklearn.metrics import accuracy_score
from sklearn.model_selection import KFold
from torch import nn

import gputune
from command_line import kinds, searched
from gputune.api.study import Study
from gputune.data.source import read_again
from gputune.report.page import page
from gputune.report.snippet import snippet
from made_studies import made_descent, made_study
from problems import Net

CHEAP = {"n_trials": 4, "max_epochs": 4, "cv": 3, "workers": 1, "verbose": 0}


def half_accuracy(estimator, X, y):
    return accuracy_score(y, estimator.predict(X)) / 2


def code_on(html):
    """The code as a reader of the page sees it."""
    return unescape(re.search(r'<pre><code id="code">(.*?)</code></pre>', html, re.S)[1])


def executed(of, **given):
    """Run the code on a study's page with the search's arguments; return its definitions."""
    session = dict(given)
    exec(compile(code_on(page(of)), "page", "exec"), session)
    return session


def assert_trains_it_again(study, rows, **given):
    """Check that the code of a page repeats the search's results; return its definitions."""
    session = executed(study, **given)
    again = session["study"]
    assert len(again.trials) == 1 and again.best_params == study.best_params
    assert again.best_score == pytest.approx(study.best_score, abs=1e-6)
    np.testing.assert_allclose(
        again.best_trial.fold_scores, study.best_trial.fold_scores, atol=1e-6
    )
    np.testing.assert_array_equal(session["model"].predict(rows), study.best_model().predict(rows))
    return session


LINE = """from torch import nn


class Line(nn.Linear):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
"""
DESCENT = {"n_trials": 1, "include_default": False, "space": {"lr": [0.003], "width": [8]}}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mlp", {"space": {"lr": [0.003, 0.01, 0.03, 0.1], "width": [8, 16]}}),
        ("logistic", {"include": [{"C": 100.0}], "space": {"C": [0.01]}, "cv": 2}),
        ("line.py:Line", {"space": {"lr": [0.01, 0.1]}}),
        ("mlp", {"method": gputune.Hypergradient(outer_steps=2), **DESCENT}),
        (
            "mlp",
            {
                "method": gputune.OptunaSampler(RandomSampler(seed=0), batch=3),
                "include_default": False,
            },
        ),
    ],
)
def test_data_in_memory(iris, tmp_path, monkeypatch, capsys, model, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "line.py").write_text(LINE)
    X, y = iris
    study = gputune.tune(model, X, y, **{**CHEAP, **options})
    assert_trains_it_again(study, X, X=X, y=y)
    assert float(capsys.readouterr().out) == pytest.approx(study.best_score, abs=1e-6)


def test_a_study_opened_from_its_file_on_a_bundled_set(tmp_path):
    gputune.tune(
        "mlp",
        "sklearn:iris",
        method="halving",
        schedule="cosine",
        numbers="quantile",
        epoch="last",
        class_weight={"setosa": 1.0, "versicolor": 2.0, "virginica": 1.0},
        study=tmp_path / "study.db",
        **CHEAP,
    )
    study = gputune.Study.open(tmp_path / "study.db")
    again = executed(study)["study"]  # nothing need be given
    assert again.best_score == pytest.approx(study.best_score, abs=1e-6)
    assert again.meta["class_weight"] == study.meta["class_weight"]
    assert (again.meta["schedule"], again.meta["numbers"], again.meta["epoch"]) == (
        "cosine",
        "quantile",
        "last",
    )


def test_another_metric_than_the_one_that_chose_the_epochs(iris):
    X, y = iris
    space = {"lr": [0.003, 0.01, 0.03, 0.1]}
    scoring = ["accuracy", "neg_log_loss", "f1"]
    study = gputune.tune("mlp", X, y == 1, space=space, scoring=scoring, positive=True, **CHEAP)
    for name in scoring[1:]:
        assert_trains_it_again(study.ranked_by(name), X, X=X, y=y == 1)


@pytest.mark.parametrize("options", [("--groups", "site"), ("--cv", "time:3")])
def test_the_rows_of_the_command_line_without_those_held_out(tmp_path, options):
    _, out, _ = searched(
        tmp_path, *options, n_rows=60, kind=kinds(60), site=[i // 6 for i in range(60)]
    )
    study = gputune.Study.open(out / "study.db")
    rows = read_again(study.meta["source"])
    assert len(rows.X) == 48
    model = executed(study)["model"]
    np.testing.assert_array_equal(model.predict(rows.X), study.best_model().predict(rows.X))
    assert model.info["rows"] == 48 and model.info["params"] == study.best_params
    assert f"# trial {study.best_trial.number}: {study.best_params!r}" in snippet(study)  # in full
    imported = [line for line in snippet(study).splitlines() if "import" in line]
    assert imported == ["import gputune"]  # no internal name
    assert "This code trains the best trial on all rows of the search." in page(study)


def test_a_module_a_scorer_and_a_custom_splitter(iris):
    X, y = iris
    cv = KFold(3, shuffle=True, random_state=5)
    space = {"lr": [0.01, 0.1], "module__hidden": [3, 5]}
    study = gputune.tune(Net, X, y, space=space, scoring=half_accuracy, **{**CHEAP, "cv": cv})
    code = code_on(page(study))
    assert "# cv: the KFold of the search" in code
    assert (
        "from problems import Net\n" in code and f"from {__name__} import half_accuracy\n" in code
    )
    assert_trains_it_again(study, X, X=X, y=y, cv=cv)


def test_a_descent_on_schedules(iris, tmp_path):
    X, y = iris
    common = {**CHEAP, **DESCENT, "method": gputune.Hypergradient(outer_steps=2, segments=2)}
    kept = gputune.tune("mlp", X, y, study=tmp_path / "study.db", **common)
    assert isinstance(kept.best_params["lr"], list)
    unkept = gputune.tune("mlp", X, y, **common)
    assert "# study: the result of gputune.tune, which is not saved in a file" in snippet(unkept)
    expected = kept.best_model().predict(X)
    for session in (executed(kept, X=X, y=y), executed(unkept, study=unkept)):
        np.testing.assert_array_equal(session["model"].predict(X), expected)


def test_a_search_of_the_scikit_learn_api(iris, tmp_path):
    from gputune.sklearn import MLPClassifier, RandomizedSearchCV

    X, y = iris
    estimator = MLPClassifier(hidden_layer_sizes=(8,), max_iter=5, random_state=0)
    search = RandomizedSearchCV(
        estimator,
        {"learning_rate_init": [0.01, 0.1], "hidden_layer_sizes": [(8,), (4, 4)]},
        n_iter=3,
        cv=2,
        random_state=0,
        study=tmp_path / "study.db",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # five epochs do not converge
        search.fit(X, y)
        session = executed(gputune.Study.open(tmp_path / "study.db"), estimator=estimator, X=X, y=y)
    np.testing.assert_array_equal(session["model"].predict(X), search.best_estimator_.predict(X))


def test_weights_that_no_file_holds_are_asked_for(iris):
    X, y = iris
    weights = 1.0 + (np.arange(len(y)) % 3)
    study = gputune.tune("mlp", X, y, space={"lr": [0.01, 0.1]}, sample_weight=weights, **CHEAP)
    assert "# sample_weight: the argument of the search" in snippet(study)
    again = executed(study, X=X, y=y, sample_weight=weights)["study"]
    assert again.best_score == pytest.approx(study.best_score, abs=1e-6)


def test_values_are_written_so_that_python_reads_them():
    study = made_study(3, folds=2)
    best = study.best_trial
    best.params.update(
        {"C": float("inf"), "module__act": nn.Tanh, "module__sizes": (4,), "text": 'it\'s\n"x"'}
    )
    code = snippet(study)
    session = {}
    exec(code.partition("study = ")[0], session)
    space = code[code.index("space=") + len("space=") : code.index(",\n    n_trials")]
    assert eval(space, session) == {name: [value] for name, value in best.params.items()}


def test_a_trial_that_was_cut_short_trains_again_by_its_study():
    study = made_study(3)
    trials = [replace(trial, state="stopped") for trial in study.trials]
    code = snippet(Study(meta=study.meta, trials=trials, curves=study.curves))
    assert "model = study.best_model()" in code and "tune(" not in code


def test_no_text_of_a_study_becomes_code():
    evil = 'x"]); import os; os.abort() #\nimport os'
    study = made_study(
        3,
        model=evil,
        class_weight=evil,
        cv=evil,
        target=evil,
        device=evil,
        dtype=evil,
        scoring=f"os:{evil}",
        source={"path": evil, "target": evil, "groups": evil},
    )
    code = snippet(study)
    compile(code, "page", "exec")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert {ast.unparse(call.func) for call in calls} == {
        "gputune.tune",
        "print",
        "study.best_model",
    }
    assert imports_of(code) == ["import gputune"]


def test_a_module_class_made_within_a_function(iris):
    class Inner(Net):
        pass

    X = iris[0].copy()
    y = iris[1]
    X[:, 1] = 1.0
    study = gputune.tune(Inner, X, y, space={"lr": [0.01, 0.1]}, columns="drop-constant", **CHEAP)
    assert "columns='drop-constant'," in snippet(study)
    assert "# Inner: the module class of the search" in snippet(study)
    assert_trains_it_again(study, X, X=X, y=y, Inner=Inner)


def imports_of(code):
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


@pytest.mark.parametrize(
    "place", ["os:x; import os", "os.system('x'):Net", "__main__:Net", "a.b:class", ":"]
)
def test_the_name_of_a_module_class_is_no_code(place):
    code = snippet(made_study(3, spec={"kind": "module", "import": place}))
    assert imports_of(code) == ["import gputune"]
    assert re.search(r"# (Net|Module): the module class of the search", code)


def test_no_best_trial_has_no_code():
    assert snippet(made_study(4, waiting=4)) == ""
    assert 'id="again"' not in page(made_study(0))
    assert "space=" in snippet(made_descent())
