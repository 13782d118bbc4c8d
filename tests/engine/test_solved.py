"""The solved logistic regression as a chunk: scores, modules, folds that lack a class."""

import dataclasses
import weakref

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from gputune.data.dataset import Fold
from gputune.scoring.metrics import make_scoring
from gputune.solver import solve
from gputune.solver.objective import rows_of
from gputune.solver.solve import solve_all, solve_chunk, solved_module
from problems import fill, make_data


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_scores_and_modules_equal_scikit_learn(task):
    data = make_data(task)
    classes = np.arange(data.n_outputs)
    configs = fill({"C": 0.1}, {"C": 2.0})
    outcome = solve_chunk(data, configs, range(2), make_scoring("neg_log_loss", task, classes))
    solution = solve_all(data, configs)
    for f, fold in enumerate(data.folds):
        x, y = data.x[f].numpy(), data.y.numpy()
        for c, config in enumerate(configs):
            plain = LogisticRegression(C=config["C"], tol=1e-12, max_iter=10_000).fit(x[fold.train], y[fold.train])
            p = plain.predict_proba(x[fold.valid])
            loss = -np.log(p[np.arange(len(p)), y[fold.valid]]).mean()
            assert outcome.curves[c, 0, f] == pytest.approx(-loss, abs=1e-7)
            module = solved_module(solution, f * 2 + c)
            np.testing.assert_allclose(module(data.x[f, fold.valid]).softmax(-1).detach().numpy(), p, atol=1e-6)


def test_one_fold_is_held_at_a_time_where_folds_are_large(monkeypatch):
    data, configs = make_data(), fill({"C": 0.1}, {"C": 2.0, "l1_ratio": 1.0}, {"C": 1.0})
    whole, made, alive = solve_all(data, configs), [], []

    def watched(*arguments, **more):
        alive.append(sum(rows() is not None for rows in made))
        rows = rows_of(*arguments, **more)
        made.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(solve, "HELD", 0)
    monkeypatch.setattr(solve, "rows_of", watched)
    apart = solve_all(data, configs)
    assert alive == [0, 0, 0, 0]  # two kinds of step in two folds
    assert torch.equal(apart.coef, whole.coef) and torch.equal(apart.steps, whole.steps)


@pytest.mark.parametrize("only", [0, 1])
def test_a_fold_with_rows_of_one_class_alone_predicts_that_class(only):
    data = make_data("binary")
    rows = torch.nonzero(data.y == only)[:, 0]
    present = torch.tensor([[only == 0, only == 1]])
    data = dataclasses.replace(data, folds=(Fold(train=rows, valid=torch.arange(61)),), copies=(0,), present=present)
    outcome = solve_chunk(data, fill({"C": 1.0}), [0], make_scoring("accuracy", "binary", np.arange(2)))
    assert outcome.curves[0, 0, 0] == pytest.approx(float((data.y == only).double().mean()))


def test_what_does_not_converge_is_said():
    data = make_data("binary", folds=3)
    data = dataclasses.replace(data, y=(data.x[0, :, 0] > 0).long())
    data = dataclasses.replace(data, target=data.y, inputs=(data.x[:1],), copies=(0, 0, 0))
    with pytest.warns(ConvergenceWarning, match="did not converge in 3 of 3 fits, for C = inf; a smaller C"):
        solve_all(data, fill({"C": float("inf")}))
