"""The solved logistic regression: scikit-learn's solution, the optimality conditions, and no member
sees another.

And as a chunk: scores, modules, folds that lack a class.
"""

import functools
import itertools
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import sklearn
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from gputune.data.dataset import Fold
from gputune.scoring.metrics import make_scoring
from gputune.solver import solve as solver
from gputune.solver.objective import curvature_diagonal, curvature_times, origin, point_at, rows_of
from gputune.solver.solve import LogisticProblem, solve_all, solve_chunk, solved_module
from problems import fill, make_data

LOADERS = {
    "iris": load_iris,
    "wine": load_wine,
    "breast_cancer": load_breast_cancer,
    "digits": load_digits,
}
ALL_C = {**dict.fromkeys(LOADERS, (0.01, 0.1, 1, 10)), "digits": (0.1, 10)}

# scikit-learn before 1.8 reads l1_ratio only where the penalty says so.
OLDER = tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8)
ELASTIC = {"penalty": "elasticnet"} if OLDER else {}


@functools.cache
def table(name):
    """Standardised inputs (n, D) and class codes, as NumPy."""
    x, y = LOADERS[name](return_X_y=True)
    return StandardScaler().fit_transform(x), y


def solve(*arguments, **options):
    return solver.solve(LogisticProblem(*arguments, **options))


def solve_table(name, C, l1_ratio, **options):
    """All C with one l1_ratio on one table, as a single fold of all rows."""
    x, y = table(name)
    C = torch.as_tensor(C, dtype=torch.float64)
    rows = (
        torch.from_numpy(x)[None],
        torch.from_numpy(y),
        torch.ones(1, len(y), dtype=torch.float64),
    )
    return solve(*rows, C, torch.full_like(C, l1_ratio), n_classes=int(y.max()) + 1, **options)


def random_problem(folds=2, n=60, d=4, k=3, seed=0):
    """Folds with inputs of their own, overlapping classes, and a third of the rows left out of each
    fold."""
    rng = np.random.default_rng(seed)
    y = rng.integers(k, size=n)
    x = rng.normal(size=(folds, n, d)) + y[:, None] * rng.normal(size=(folds, 1, d)) / 2
    weights = (np.arange(n) % 3 != np.arange(folds)[:, None] % 3) * rng.uniform(
        0.5, 2, size=(folds, n)
    )
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(weights)


def many(*values):
    return torch.tensor(values, dtype=torch.float64)


def worst(found, reference):
    """Largest difference over the largest reference."""
    found = np.asarray(found)
    reference = np.asarray(reference)
    return np.abs(found - reference).max() / np.abs(reference).max()


def chances(x, coef, intercept):
    """Class chances (n, K) by NumPy alone, in both forms."""
    z = x @ coef.T + intercept
    if coef.shape[0] == 1:
        z = np.hstack([np.zeros_like(z), z])
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def objective(x, y, coef, intercept, C, l1_ratio):
    """scikit-learn's objective, by NumPy alone."""
    loss = -np.log(chances(x, coef, intercept)[np.arange(len(y)), y]).sum()
    return C * loss + (1 - l1_ratio) / 2 * (coef**2).sum() + l1_ratio * np.abs(coef).sum()


def kkt(x, y, coef, intercept, C, l1_ratio, weights=1.0):
    """Largest violation of the optimality conditions of that objective, in its own units."""
    p = chances(x, coef, intercept)
    wrong = C * (p - np.eye(p.shape[1])[y]) * np.reshape(weights, (-1, 1))
    wrong = wrong[:, 1:] if coef.shape[0] == 1 else wrong
    slope = wrong.T @ x + (1 - l1_ratio) * coef
    at_zero = np.maximum(np.abs(slope) - l1_ratio, 0)
    held = np.where(coef == 0, at_zero, np.abs(slope + l1_ratio * np.sign(coef)))
    return max(held.max(), np.abs(wrong.sum(0)).max())


@pytest.mark.parametrize("name", LOADERS)
def test_l2_is_newton_cg_at_its_limit(name):
    x, y = table(name)
    solution = solve_table(name, ALL_C[name], 0.0)
    assert solution.converged.all() and (solution.residual <= 1e-10).all()
    for c, C in enumerate(ALL_C[name]):
        reference = LogisticRegression(C=C, solver="newton-cg", tol=1e-12, max_iter=10_000).fit(
            x, y
        )
        assert worst(solution.coef[c], reference.coef_) < 1e-6
        if len(reference.intercept_) > 1:
            assert abs(solution.intercept[c].sum()) < 1e-12
            reference.intercept_ -= reference.intercept_.mean()
        assert np.abs(solution.intercept[c].numpy() - reference.intercept_).max() < 1e-6


# saga stops far from the optimum
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("l1_ratio", [1.0, 0.4])
@pytest.mark.parametrize("name", LOADERS)
def test_l1_and_elastic_net_are_optimal(name, l1_ratio):
    x, y = table(name)
    solution = solve_table(name, ALL_C[name], l1_ratio)
    assert solution.converged.all()
    for c, C in enumerate(ALL_C[name]):
        coef = solution.coef[c].numpy()
        intercept = solution.intercept[c].numpy()
        assert kkt(x, y, coef, intercept, C, l1_ratio) < 1e-6
        if name != "digits":
            how = {"solver": "saga", "tol": 1e-10, "max_iter": 100, "random_state": 0, **ELASTIC}
            saga = LogisticRegression(C=C, l1_ratio=l1_ratio, **how).fit(x, y)
            ours = objective(x, y, coef, intercept, C, l1_ratio)
            assert ours <= objective(x, y, saga.coef_, saga.intercept_, C, l1_ratio) + 1e-9
    # zeros are exact, most with the strongest penalty
    assert (solution.coef[0] == 0).double().mean() > 0.3


@pytest.mark.parametrize("k", [2, 3])
def test_a_member_alone_is_the_member_in_the_batch(k):
    x, y, weights = random_problem(k=k)
    C = many(0.01, 3.0, 0.5, 100.0, 0.3, 1.0)
    l1_ratio = many(0, 1, 0, 0.5, 1, 0)
    together = solve(x, y, weights, C=C, l1_ratio=l1_ratio, n_classes=k)
    for p, (f, c) in enumerate(itertools.product(range(2), range(len(C)))):  # fold-major
        fold = slice(f, f + 1)
        one = slice(c, c + 1)
        alone = solve(x[fold], y, weights[fold], C=C[one], l1_ratio=l1_ratio[one], n_classes=k)
        assert worst(together.coef[p], alone.coef[0]) < 1e-8
        assert worst(together.intercept[p], alone.intercept[0]) < 1e-8
    assert together.coef.shape == (12, 1 if k == 2 else 3, 4)
    assert together.converged.all()


@pytest.mark.parametrize(("l1_ratio", "odd"), [(0.0, [1e15, math.inf]), (1.0, [1e15])])
def test_a_member_with_an_odd_C_disturbs_no_other(l1_ratio, odd):
    usual = solve_table("wine", [0.1, 5.0], l1_ratio)
    found = solve_table("wine", [1e-300, 0.1, 1e-12, 5.0, *odd], l1_ratio, max_steps=40)
    assert worst(found.coef[[1, 3]], usual.coef) < 1e-8
    assert found.coef.isfinite().all() and found.converged[[1, 2, 3]].all()
    assert found.coef[[0, 2]].abs().max() <= (0 if l1_ratio else 1e-9)


# iris: one class of three is separable
@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer"])
def test_no_penalty_on_separable_classes_ends_unconverged_and_finite(name):
    solution = solve_table(name, [math.inf], 0.0)
    assert not solution.converged.any()
    assert solution.coef.isfinite().all() and solution.intercept.isfinite().all()


@pytest.mark.parametrize(
    ("C", "l1_ratio", "intercept"), [(math.inf, 0, True), (math.inf, 1, True), (2.0, 0, False)]
)
@pytest.mark.parametrize("k", [2, 3])
def test_overlapping_classes_without_a_penalty_or_an_intercept(k, C, l1_ratio, intercept):
    x, y, weights = random_problem(folds=1, k=k)
    solution = solve(
        x,
        y,
        weights,
        C=many(C),
        l1_ratio=many(l1_ratio),
        n_classes=k,
        fit_intercept=intercept,
    )
    assert solution.converged.all()
    plain = LogisticRegression(
        C=C, fit_intercept=intercept, solver="newton-cg", tol=1e-12, max_iter=1000
    )
    assert worst(solution.coef[0], plain.fit(x[0], y, sample_weight=weights[0]).coef_) < 1e-6
    assert intercept or (solution.intercept == 0).all()


def test_a_step_limit_is_reported():
    solution = solve_table("wine", [1.0], 0.0, max_steps=2)
    assert solution.steps.tolist() == [2]
    assert not solution.converged.any() and (solution.residual > 1e-10).all()


@pytest.mark.parametrize("l1_ratio", [0.0, 0.7])
def test_weights_are_repeated_rows_and_rows_without_weight_do_not_matter(l1_ratio):
    x, y, _ = random_problem(folds=1)
    count = torch.arange(60) % 4
    C = many(0.5)
    ratio = many(l1_ratio)
    blind = x.masked_fill((count == 0)[None, :, None], 1e6)
    weighted = solve(blind, y, count[None].double(), C=C, l1_ratio=ratio, n_classes=3)
    again = x[:, torch.arange(60).repeat_interleave(count)]
    codes = y.repeat_interleave(count)
    ones = torch.ones(again.shape[:2], dtype=torch.float64)
    repeated = solve(again, codes, ones, C=C, l1_ratio=ratio, n_classes=3)
    assert worst(weighted.coef, repeated.coef) < 1e-8


@pytest.mark.parametrize("l1_ratio", [0.0, 1.0])
@pytest.mark.parametrize("missing", [[1], [0, 2]])
def test_an_absent_class_takes_no_part(missing, l1_ratio):
    x, y, weights = random_problem(k=4)
    rest = [k for k in range(4) if k not in missing]
    weights[1] = weights[1].masked_fill(torch.isin(y, torch.tensor(missing)), 0)
    C = many(0.3, 2.0)
    ratio = many(l1_ratio, l1_ratio)
    solution = solve(x, y, weights, C=C, l1_ratio=ratio, n_classes=4)
    assert solution.converged.all()
    assert solution.intercept[:2].isfinite().all()
    assert (solution.coef[2:, missing] == 0).all()
    assert (solution.intercept[2:, missing] == -math.inf).all()
    kept = weights[1] > 0
    rows = x[1, kept].numpy(), np.searchsorted(rest, y[kept].numpy())
    for c in range(2):
        # Two of four classes are still the softmax form: two vectors, each with its own penalty.
        coef = solution.coef[2 + c, rest].numpy()
        intercept = solution.intercept[2 + c, rest].numpy()
        assert abs(intercept.sum()) < 1e-12
        assert kkt(*rows, coef, intercept, C[c].item(), l1_ratio, weights[1, kept].numpy()) < 1e-7


@pytest.mark.parametrize("label, intercept", [(0, -math.inf), (1, math.inf)])
def test_one_of_two_classes_alone_is_certain(label, intercept):
    x, y, weights = random_problem(folds=1, k=2)
    weights = weights * (y == label)
    solution = solve(x, y, weights, C=many(1.0), l1_ratio=many(0.0), n_classes=2)
    assert (solution.coef == 0).all()
    assert solution.intercept.tolist() == [[intercept]]
    assert solution.converged.all()


@pytest.mark.parametrize("l1_ratio", [0.0, 1.0])
def test_more_inputs_than_rows(l1_ratio):
    x, y, _ = random_problem(folds=1, n=30, d=80)
    ones = torch.ones(1, 30, dtype=torch.float64)
    solution = solve(x, y, ones, C=many(0.5), l1_ratio=many(l1_ratio), n_classes=3)
    assert solution.converged.all()
    coef = solution.coef[0].numpy()
    intercept = solution.intercept[0].numpy()
    assert kkt(x[0].numpy(), y.numpy(), coef, intercept, 0.5, l1_ratio) < 1e-7


@pytest.mark.parametrize("l1_ratio", [0.0, 1.0])
def test_constant_and_unscaled_inputs(l1_ratio):
    x, y, weights = random_problem(folds=1)
    options = {"C": many(1.0), "l1_ratio": many(l1_ratio), "n_classes": 3}
    wide = torch.cat([x + 1e3, torch.full_like(x[..., :1], 0.1), torch.zeros_like(x[..., :1])], -1)
    plain, solution = (solve(each, y, weights, **options) for each in (x, wide))
    assert solution.converged.all()
    assert worst(solution.coef[..., :4], plain.coef) < 1e-8
    assert (solution.coef[..., 4:] == 0).all()


@pytest.mark.parametrize("size", [1e20, 1e150])
@pytest.mark.parametrize("k, l1_ratio", [(2, 0.0), (3, 0.0), (3, 1.0)])
def test_huge_inputs_are_the_same_problem_in_other_units(k, l1_ratio, size):
    x, y, weights = random_problem(folds=1, k=k)
    plain = solve(x, y, weights, C=many(0.3, 30.0), l1_ratio=many(l1_ratio, l1_ratio), n_classes=k)
    C = many(0.3, 30.0) / (size if l1_ratio else size**2)
    huge = solve(size * x, y, weights, C=C, l1_ratio=many(l1_ratio, l1_ratio), n_classes=k)
    assert huge.converged.all()
    assert worst(size * huge.coef, plain.coef) < 1e-7
    assert worst(huge.intercept, plain.intercept) < 1e-6


@pytest.mark.parametrize("size", [1e25, 1e307])
@pytest.mark.parametrize("l1_ratio, intercept", [(0.0, True), (0.5, True), (0.0, False)])
def test_one_huge_value_leaves_the_other_inputs_their_say(intercept, l1_ratio, size):
    x, y, weights = random_problem(folds=1)
    x[0, 1, 0] = size
    options = {
        "C": many(1.0),
        "l1_ratio": many(l1_ratio),
        "n_classes": 3,
        "fit_intercept": intercept,
    }
    solution = solve(x, y, weights, **options)
    x[0, :, 0] *= 1e15 / size  # a penalty is as good as none on the column either way
    smaller = solve(x, y, weights, **options)
    assert solution.converged.all()
    assert worst(solution.coef[..., 1:], smaller.coef[..., 1:]) < 1e-6


@pytest.mark.parametrize("k", [2, 3])
def test_the_strongest_penalties_leave_the_slope_at_zero(k):
    x, y, weights = random_problem(folds=1, k=k)
    C = many(1e-30, 1e-60, 1e-120, 1e-300, 5e-324)
    solution = solve(x, y, weights, C=C, l1_ratio=torch.zeros(5).double(), n_classes=k)
    assert solution.converged.all()
    for c in (1, 2):
        assert worst(solution.coef[c] / C[c], solution.coef[0] / C[0]) < 1e-9
    assert solution.coef[3:].abs().max() < 1e-140
    assert (solve(x, y, weights, C=C, l1_ratio=torch.ones(5).double(), n_classes=k).coef == 0).all()


def test_a_fold_with_inputs_that_are_not_finite_harms_no_other():
    x, y, weights = random_problem()
    x[0, 1, 0] = math.nan
    options = {"C": many(1.0), "l1_ratio": many(0.0), "n_classes": 3}
    alone, solution = (solve(x[f:], y, weights[f:], **options) for f in (1, 0))
    assert solution.coef[0].isnan().all()
    assert solution.converged.tolist() == [False, True]
    assert solution.coef[1].equal(alone.coef[0])


@pytest.mark.parametrize("k", [1, 3])
def test_slope_and_curvature_are_the_derivatives(k):
    x, y, _ = random_problem(folds=1, k=max(k, 2))
    rows = rows_of(x[0], y, torch.full((60,), 1 / 60).double(), k, intercept=True)
    g = torch.Generator().manual_seed(0)
    weight, direction = torch.randn(2, 2, k, 5, generator=g, dtype=torch.float64)
    start = origin(rows, many(0.1, 0.2), many(0, 0))

    leaf = weight.clone().requires_grad_()
    logits = leaf @ (rows.design / rows.root[:, None]).T
    point = point_at(rows, weight, logits.detach(), start.ridge, start.lasso)
    both = logits if k > 1 else torch.cat([torch.zeros_like(logits), logits], 1)
    plain = torch.nn.functional.cross_entropy(both, y.expand(2, -1), reduction="none")
    torch.testing.assert_close(point.loss, plain.mean(1).detach())
    (slope,) = torch.autograd.grad(plain.mean(1).sum(), leaf, create_graph=True)
    torch.testing.assert_close(point.slope, slope.detach() + start.ridge * weight)
    (bent,) = torch.autograd.grad((slope * direction).sum(), leaf, retain_graph=True)
    torch.testing.assert_close(curvature_times(rows, point.chance, direction), bent)
    unit = torch.zeros_like(weight)
    unit[:, 0, 2] = 1
    (column,) = torch.autograd.grad((slope * unit).sum(), leaf)
    torch.testing.assert_close(curvature_diagonal(rows, point.chance)[:, 0, 2], column[:, 0, 2])


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_scores_and_modules_equal_scikit_learn(task):
    data = make_data(task)
    classes = np.arange(data.n_outputs)
    configs = fill({"C": 0.1}, {"C": 2.0})
    outcome = solve_chunk(data, configs, range(2), make_scoring("neg_log_loss", task, classes))
    solution = solve_all(data, configs)
    for f, fold in enumerate(data.folds):
        x = data.x[f].numpy()
        y = data.y.numpy()
        for c, config in enumerate(configs):
            plain = LogisticRegression(C=config["C"], tol=1e-12, max_iter=10_000).fit(
                x[fold.train], y[fold.train]
            )
            p = plain.predict_proba(x[fold.valid])
            loss = -np.log(p[np.arange(len(p)), y[fold.valid]]).mean()
            assert outcome.curves[c, 0, f] == pytest.approx(-loss, abs=1e-7)
            module = solved_module(solution, f * 2 + c)
            np.testing.assert_allclose(
                module(data.x[f, fold.valid]).softmax(-1).detach().numpy(), p, atol=1e-6
            )


def test_one_fold_is_held_at_a_time_where_folds_are_large(monkeypatch):
    data = make_data()
    configs = fill({"C": 0.1}, {"C": 2.0, "l1_ratio": 1.0}, {"C": 1.0})
    whole = solve_all(data, configs)
    made = []
    alive = []

    def watched(*arguments, **more):
        alive.append(sum(rows() is not None for rows in made))
        rows = rows_of(*arguments, **more)
        made.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(solver, "HELD", 0)
    monkeypatch.setattr(solver, "rows_of", watched)
    apart = solve_all(data, configs)
    assert alive == [0, 0, 0, 0]  # two kinds of step in two folds
    assert torch.equal(apart.coef, whole.coef) and torch.equal(apart.steps, whole.steps)


@pytest.mark.parametrize("only", [0, 1])
def test_a_fold_with_rows_of_one_class_alone_predicts_that_class(only):
    data = make_data("binary")
    rows = torch.nonzero(data.y == only)[:, 0]
    present = torch.tensor([[only == 0, only == 1]])
    data = replace(
        data, folds=(Fold(train=rows, valid=torch.arange(61)),), copies=(0,), present=present
    )
    outcome = solve_chunk(
        data, fill({"C": 1.0}), [0], make_scoring("accuracy", "binary", np.arange(2))
    )
    assert outcome.curves[0, 0, 0] == pytest.approx(float((data.y == only).double().mean()))


def test_what_does_not_converge_is_said():
    data = make_data("binary", folds=3)
    data = replace(data, y=(data.x[0, :, 0] > 0).long())
    data = replace(data, target=data.y, inputs=(data.x[:1],), copies=(0, 0, 0))
    with pytest.warns(
        ConvergenceWarning, match="did not converge in 3 of 3 fits, for C = inf. Use a smaller C"
    ):
        solve_all(data, fill({"C": float("inf")}))
