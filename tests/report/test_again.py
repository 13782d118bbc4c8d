"""The code on the page of a study trains its best trial again."""

import ast
import re
import warnings
from html import unescape

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.metrics import accuracy_score
from sklearn.model_selection import KFold
from torch import nn

import gputune
from command_line import FAST, kinds, run, write_table
from gputune.report.page import page
from gputune.report.snippet import snippet
from made_studies import made_descent, made_study

CHEAP = {"n_trials": 4, "max_epochs": 4, "cv": 3, "workers": 1, "verbose": 0}


class Net(nn.Module):
    def __init__(self, n_features, n_outputs, hidden=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_features, hidden), nn.Tanh(), nn.Linear(hidden, n_outputs))

    def forward(self, x):
        return self.body(x)


def half_accuracy(estimator, X, y):
    return accuracy_score(y, estimator.predict(X)) / 2


def code_on(html):
    """The code as a reader of the page sees it."""
    return unescape(re.search(r'<pre><code id="code">(.*?)</code></pre>', html, re.S)[1])


def executed(of, **given):
    """Run the code on a study's page with what the search was given, and return what it defines."""
    session = dict(given)
    exec(compile(code_on(page(of)), "page", "exec"), session)
    return session


def assert_trains_it_again(study, session, X):
    again = session["study"]
    assert len(again.trials) == 1 and again.best_params == study.best_params
    assert again.best_score == pytest.approx(study.best_score, abs=1e-6)
    np.testing.assert_allclose(again.best_trial.fold_scores, study.best_trial.fold_scores, atol=1e-6)
    np.testing.assert_array_equal(session["model"].predict(X), study.best_model().predict(X))


def test_data_in_memory(capsys):
    X, y = load_iris(return_X_y=True)
    study = gputune.tune("mlp", X, y, space={"lr": [0.003, 0.01, 0.03, 0.1], "width": [8, 16]}, **CHEAP)
    assert_trains_it_again(study, executed(study, X=X, y=y), X)
    assert float(capsys.readouterr().out) == pytest.approx(study.best_score, abs=1e-6)


def test_a_study_opened_from_its_file_on_a_bundled_set(tmp_path):
    gputune.tune(
        "mlp", "sklearn:iris", method="halving", schedule="cosine", numbers="quantile", epoch="last",
        class_weight={"setosa": 1.0, "versicolor": 2.0, "virginica": 1.0}, study=tmp_path / "study.db", **CHEAP,
    )  # fmt: skip
    study = gputune.Study.open(tmp_path / "study.db")
    again = executed(study)["study"]  # nothing need be given
    assert again.best_score == pytest.approx(study.best_score, abs=1e-6)
    assert again.meta["class_weight"] == study.meta["class_weight"]
    assert (again.meta["schedule"], again.meta["numbers"], again.meta["epoch"]) == ("cosine", "quantile", "last")


def test_another_metric_than_the_one_that_chose_the_epochs():
    X, y = load_iris(return_X_y=True)
    space, scoring = {"lr": [0.003, 0.01, 0.03, 0.1]}, ["accuracy", "neg_log_loss", "f1"]
    study = gputune.tune("mlp", X, y == 1, space=space, scoring=scoring, positive=True, **CHEAP)
    for name in scoring[1:]:
        ranked = study.ranked_by(name)
        assert_trains_it_again(ranked, executed(ranked, X=X, y=y == 1), X)


def test_the_rows_of_the_command_line_without_those_held_out(tmp_path):
    table = write_table(tmp_path / "bugs.csv", 60, kind=kinds(60), site=[i // 6 for i in range(60)])
    assert run("tune", table, "--target", "kind", "--groups", "site", "--out", tmp_path / "out", *FAST)[0] == 0
    study = gputune.Study.open(tmp_path / "out/study.db")
    session = executed(study)
    assert_trains_it_again(study, session, session["rows"].X)
    assert len(session["rows"].X) == 48


def test_rows_in_the_order_of_time(tmp_path):
    table = write_table(tmp_path / "bugs.csv", 60, kind=kinds(60))
    code, _, err = run("tune", table, "--target", "kind", "--cv", "time:3", "--out", tmp_path / "out", "--trials", "2",
                       "--epochs", "2", "--workers", "1")  # fmt: skip
    assert code == 0, err
    study = gputune.Study.open(tmp_path / "out/study.db")
    session = executed(study)
    assert_trains_it_again(study, session, session["rows"].X)


def test_a_module_a_scorer_and_a_splitter_of_ones_own():
    X, y = load_iris(return_X_y=True)
    cv = KFold(3, shuffle=True, random_state=5)
    study = gputune.tune(
        Net, X, y, space={"lr": [0.01, 0.1], "module__hidden": [3, 5]}, scoring=half_accuracy, **{**CHEAP, "cv": cv}
    )
    code = code_on(page(study))
    assert "# cv: the KFold of the search" in code and "Net" in code
    module = __name__
    code = code.replace(f"from {module} import Net\n", "").replace(f"from {module} import half_accuracy\n", "")
    session = {"X": X, "y": y, "cv": cv, "Net": Net, "half_accuracy": half_accuracy}
    exec(compile(code, "page", "exec"), session)
    assert_trains_it_again(study, session, X)


def test_a_module_of_a_file(tmp_path):
    (tmp_path / "net.py").write_text("from torch import nn\n\n\nclass Line(nn.Linear):\n"
                                     "    def __init__(self, n_features, n_outputs):\n"
                                     "        super().__init__(n_features, n_outputs)\n")  # fmt: skip
    X, y = load_iris(return_X_y=True)
    study = gputune.tune(f"{tmp_path / 'net.py'}:Line", X, y, space={"lr": [0.01, 0.1]}, **CHEAP)
    assert_trains_it_again(study, executed(study, X=X, y=y), X)


def test_the_solved_logistic_regression():
    X, y = load_iris(return_X_y=True)
    study = gputune.tune("logistic", X, y, include=[{"C": 100.0}], space={"C": [0.01]}, **{**CHEAP, "cv": 2})
    assert_trains_it_again(study, executed(study, X=X, y=y), X)


def test_a_descent_on_numbers_and_one_on_schedules(tmp_path):
    X, y = load_iris(return_X_y=True)
    options = {**CHEAP, "n_trials": 1, "include_default": False, "space": {"lr": [0.003], "width": [8]}}
    study = gputune.tune("mlp", X, y, method=gputune.Hypergradient(outer_steps=2), **options)
    assert_trains_it_again(study, executed(study, X=X, y=y), X)
    method = gputune.Hypergradient(outer_steps=2, segments=2)
    kept = gputune.tune("mlp", X, y, method=method, study=tmp_path / "study.db", **options)
    assert isinstance(kept.best_params["lr"], list)
    session = executed(kept, X=X, y=y)
    np.testing.assert_array_equal(session["model"].predict(X), kept.best_model().predict(X))
    unkept = gputune.tune("mlp", X, y, method=method, **options)
    assert "# study: what gputune.tune returned; it was kept in no file" in snippet(unkept)
    session = executed(unkept, study=unkept)
    np.testing.assert_array_equal(session["model"].predict(X), kept.best_model().predict(X))


def test_a_search_of_the_scikit_learn_face(tmp_path):
    from gputune.sklearn import MLPClassifier, RandomizedSearchCV

    X, y = load_iris(return_X_y=True)
    estimator = MLPClassifier(hidden_layer_sizes=(8,), max_iter=5, random_state=0)
    search = RandomizedSearchCV(estimator, {"learning_rate_init": [0.01, 0.1], "hidden_layer_sizes": [(8,), (4, 4)]},
                                n_iter=3, cv=2, random_state=0, study=tmp_path / "study.db")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # five epochs do not converge
        search.fit(X, y)
        session = executed(gputune.Study.open(tmp_path / "study.db"), estimator=estimator, X=X, y=y)
    np.testing.assert_array_equal(session["model"].predict(X), search.best_estimator_.predict(X))


def test_weights_that_no_file_holds_are_asked_for():
    X, y = load_iris(return_X_y=True)
    weights = 1.0 + (np.arange(len(y)) % 3)
    study = gputune.tune("mlp", X, y, space={"lr": [0.01, 0.1]}, sample_weight=weights, **CHEAP)
    assert "# sample_weight: what the search was given" in snippet(study)
    session = executed(study, X=X, y=y, sample_weight=weights)
    assert session["study"].best_score == pytest.approx(study.best_score, abs=1e-6)


def test_values_are_written_so_that_python_reads_them():
    study = made_study(3, folds=2)
    best = study.best_trial
    best.params.update({"C": float("inf"), "module__act": nn.Tanh, "module__sizes": (4,), "text": 'it\'s\n"x"'})
    code = snippet(study)
    session = {}
    exec(code.partition("study = ")[0], session)
    space = code[code.index("space=") + len("space=") : code.index(",\n    n_trials")]
    assert eval(space, session) == {name: [value] for name, value in best.params.items()}


def test_no_text_of_a_study_becomes_code():
    evil = 'x"]); import os; os.abort() #\nimport os'
    study = made_study(
        3, model=evil, class_weight=evil, cv=evil, target=evil, device=evil, dtype=evil, scoring=f"os:{evil}",
        source={"path": evil, "target": evil, "groups": evil},
    )  # fmt: skip
    code = snippet(study)
    compile(code, "page", "exec")
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert {ast.unparse(call.func) for call in calls} == {"gputune.tune", "print", "study.best_model"}
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["import gputune"]


def test_a_module_class_made_within_a_function():
    class Inner(Net):
        pass

    X, y = load_iris(return_X_y=True)
    X[:, 1] = 1.0
    study = gputune.tune(Inner, X, y, space={"lr": [0.01, 0.1]}, columns="drop-constant", **CHEAP)
    assert "columns='drop-constant'," in snippet(study)
    assert "# Inner: the module class of the search" in snippet(study)
    assert_trains_it_again(study, executed(study, X=X, y=y, Inner=Inner), X)


@pytest.mark.parametrize("place", ["os:x; import os", "os.system('x'):Net", "__main__:Net", "a.b:class", ":"])
def test_the_name_of_a_module_class_is_no_code(place):
    code = snippet(made_study(3, spec={"kind": "module", "import": place}))
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["import gputune"]
    assert re.search(r"# (Net|Module): the module class of the search", code)


def test_no_best_trial_has_no_code():
    assert snippet(made_study(4, waiting=4)) == ""
    assert 'id="again"' not in page(made_study(0))
    assert "space=" in snippet(made_descent())
