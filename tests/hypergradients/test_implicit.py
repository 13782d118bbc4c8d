"""Implicit differentiation in log C: finite differences of solved problems, and the odd cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

import gputune
from gputune import models
from gputune.ground.errors import DivergedError
from gputune.hypergradients.implicit import implicit_chunk, implicit_gradients
from gputune.solver.solve import LogisticProblem, Solution, solve
from problems import grid, make_data
from refused import refused

STEP = 1e-4  # of log C, in central differences
SIX = (0.02, 0.1, 0.4, 1.5, 6.0, 30.0)


def problem(folds=5, n=90, d=4, k=3, seed=0, weighted=True):
    """Overlapping classes, inputs of its own for each fold, folds of unequal length, weights on the
    training rows."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % k)
    x = rng.normal(size=(folds, n, d)) + y[:, None] * rng.normal(size=(1, 1, d)) / 2 + 3
    # the last part is in all trainings and in no validation
    fold_of = rng.integers(folds + 1, size=n)
    weights = (fold_of != np.arange(folds)[:, None]) * (
        rng.uniform(0.5, 2, (folds, n)) if weighted else 1.0
    )
    valid = [torch.from_numpy(np.flatnonzero(fold_of == f)) for f in range(folds)]
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(weights), valid


def many(*values):
    return torch.tensor(values, dtype=torch.float64)


def solved(data, C, l1_ratio, k, *, tolerance=1e-10, **options):
    return solve(
        LogisticProblem(*data[:3], C, l1_ratio, n_classes=k, tolerance=tolerance, **options)
    )


def implicit(data, solution, C, l1_ratio, **options):
    *arrays, valid = data
    problem = LogisticProblem(*arrays, C, l1_ratio, n_classes=max(2, solution.coef.shape[1]))
    return implicit_gradients(problem, solution, valid, **options)


def central_difference(data, C, l1_ratio, k):
    """Slope of the validation loss in log C from two solutions; no coefficient may come to zero or
    leave it between."""
    ends = [C * math.exp(STEP), C * math.exp(-STEP)]
    # A difference over 2e-4 is as good as the solutions are: as near as float64 lets them come.
    solutions = [solved(data, end, l1_ratio, k, tolerance=1e-15) for end in ends]
    assert all((s.residual < 1e-12).all() for s in solutions)
    up, down = (implicit(data, s, end, l1_ratio).value for s, end in zip(solutions, ends))
    return (up - down) / (2 * STEP)


def agree(found, reference):
    torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-9)


def differentiated(data, C, l1_ratio, k):
    """The solution and its slopes, which equal central differences."""
    solution = solved(data, C, l1_ratio, k)
    found = implicit(data, solution, C, l1_ratio)
    agree(found.gradient, central_difference(data, C, l1_ratio, k))
    return solution, found


@pytest.mark.parametrize("l1_ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("k", "weighted"), grid((2, 3, 4), (False, True), short=[(2, False), (4, True)])
)
def test_central_differences_over_six_C_and_three_folds(k, weighted, l1_ratio):
    data = problem(folds=3, n=60, k=k, weighted=weighted)
    solution, found = differentiated(data, many(*SIX), many(*[l1_ratio] * 6), k)
    assert len({len(rows) for rows in data[3]}) > 1
    assert found.gradient.shape == found.value.shape == (18,)
    assert (found.gradient != 0).sum() >= 12
    assert not l1_ratio or (solution.coef == 0).any()


@pytest.mark.parametrize("k", [2, 4])
def test_a_member_alone_is_the_member_in_the_batch(k):
    data = problem(folds=3, k=k)
    x, y, weights, valid = data
    C = many(*SIX)
    ratio = many(0, 1, 0.5, 0, 1, 1)
    solution = solved(data, C, ratio, k)
    together = implicit(data, solution, C, ratio)
    few = implicit(data, solution, C, ratio, memory=70_000)  # one or two members at once
    torch.testing.assert_close(few.gradient, together.gradient, rtol=1e-12, atol=1e-15)
    for p in range(18):
        f, c = divmod(p, 6)
        one = Solution(
            *(getattr(solution, name)[p : p + 1] for name in Solution.__dataclass_fields__)
        )
        alone = implicit(
            (x[f : f + 1], y, weights[f : f + 1], valid[f : f + 1]),
            one,
            C[c : c + 1],
            ratio[c : c + 1],
        )
        torch.testing.assert_close(
            alone.gradient, together.gradient[p : p + 1], rtol=1e-12, atol=1e-15
        )
        torch.testing.assert_close(alone.value, together.value[p : p + 1], rtol=1e-12, atol=0)


def test_a_common_shift_of_the_intercepts_changes_nothing():
    data = problem()
    C = many(0.1, 1.0)
    ratio = many(0, 1)
    solution = solved(data, C, ratio, 3)
    shifted = replace(solution, intercept=solution.intercept + 5)
    found = implicit(data, solution, C, ratio)
    again = implicit(data, shifted, C, ratio)
    torch.testing.assert_close(again.gradient, found.gradient, rtol=1e-10, atol=0)


def test_a_common_shift_of_coefficients_that_pure_l1_leaves_open_changes_nothing():
    # Of four coefficients one below zero, one at zero and two above: until the third is at zero, a
    # shift down is free.
    data = problem(folds=1, k=4)
    C = many(100.0)
    ratio = many(1.0)
    solution = solved(data, C, ratio, 4)
    coef = solution.coef[0].sort(0).values
    free = (coef[0] < 0) & (coef[1] == 0) & (coef[2] > 0)
    assert free.sum() >= 3
    shifted = replace(solution, coef=solution.coef - torch.where(free, coef[2] / 2, 0))
    found = implicit(data, solution, C, ratio)
    again = implicit(data, shifted, C, ratio)
    torch.testing.assert_close(again.gradient, found.gradient, rtol=1e-8, atol=0)
    assert found.gradient.abs() > 1e-9


@pytest.mark.parametrize(("k", "seed"), [(2, 0), (3, 1)])
def test_one_hot_columns_next_to_an_intercept(k, seed):
    # The columns of four levels add up to one, so that pure l1 can leave a direction without any
    # curvature.
    x, y, weights, valid = problem(folds=2, n=120, k=k, seed=seed)
    level = torch.from_numpy(np.random.default_rng(seed).integers(4, size=120))
    data = (
        torch.cat([x, functional.one_hot(level).double().expand(2, -1, -1)], -1),
        y,
        weights,
        valid,
    )
    differentiated(data, many(50.0, 50.0), many(0.0, 1.0), k)


def test_a_doubled_input_leaves_a_split_open_and_nothing_else():
    x, *rest = data = problem(folds=2, k=2)
    twice = (torch.cat([x, x], -1), *rest)
    C = many(0.7)
    differentiated(twice, C, many(0.0), 2)
    # pure l1: any split of a coefficient over both copies is as good
    solution = solved(data, C, many(1.0), 2)
    split = replace(solution, coef=torch.cat([solution.coef * 0.3, solution.coef * 0.7], -1))
    agree(
        implicit(twice, split, C, many(1.0)).gradient,
        implicit(data, solution, C, many(1.0)).gradient,
    )


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 1.0])
def test_more_inputs_than_rows(l1_ratio):
    differentiated(problem(folds=2, n=24, d=30), many(0.05, 5.0), many(l1_ratio, l1_ratio), 3)


@pytest.mark.parametrize("l1_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [2, 3])
def test_without_a_penalty_and_with_all_coefficients_held_at_zero_nothing_moves(k, l1_ratio):
    data = problem(folds=2, k=k)
    C = many(math.inf, 1e-9)
    ratio = many(l1_ratio, 1.0)
    solution = solved(data, C, ratio, k)
    assert solution.converged.all()
    assert (solution.coef.view(2, 2, -1)[:, 1] == 0).all()
    found = implicit(data, solution, C, ratio)
    assert found.gradient.tolist() == [0, 0, 0, 0]
    assert found.value.isfinite().all()


def test_a_member_that_is_not_converged_is_nan_and_no_other():
    data = problem(folds=2)
    C = many(0.1, 1.0, math.inf)
    ratio = many(0, 1, 0)
    solution = solved(data, C, ratio, 3)
    told = replace(solution, converged=torch.tensor([True, False, True, True, True, False]))
    found = implicit(data, told, C, ratio)
    whole = implicit(data, solution, C, ratio)
    assert found.gradient.isnan().tolist() == [False, True, False, False, False, True]
    torch.testing.assert_close(
        found.gradient[[0, 2, 3, 4]], whole.gradient[[0, 2, 3, 4]], rtol=1e-12, atol=0
    )
    assert torch.equal(found.value, whole.value)


def test_no_curvature_left_is_nan():
    x = many(-1, 1)[None, :, None]
    sure = Solution(
        many(1e4)[None, None],
        many(0)[None],
        torch.tensor([1]),
        many(0),
        converged=torch.tensor([True]),
    )
    data = x, torch.tensor([0, 1]), torch.ones(1, 2, dtype=torch.float64), [torch.tensor([0, 1])]
    found = implicit(data, sure, many(1.0), many(1.0))
    assert found.gradient.isnan().all()
    assert found.value.tolist() == [0]


@pytest.mark.parametrize("l1_ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("missing", [[1], [0, 2]])
def test_an_absent_class_takes_no_part(missing, l1_ratio):
    x, y, weights, valid = problem(folds=2, k=4)
    absent = torch.isin(y, torch.tensor(missing))
    weights[1] = weights[1].masked_fill(absent, 0)
    own = [valid[0], valid[1][~absent[valid[1]]]]
    C = many(0.3, 4.0)
    ratio = many(l1_ratio, l1_ratio)
    solution, found = differentiated((x, y, weights, own), C, ratio, 4)
    assert (found.gradient != 0).all()
    # A validation row of a class never trained on costs inf, whatever C.
    unknown = implicit((x, y, weights, valid), solution, C, ratio)
    assert unknown.value.isinf().tolist() == [False, False, True, True]
    assert unknown.gradient[2:].tolist() == [0, 0]
    torch.testing.assert_close(unknown.gradient[:2], found.gradient[:2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("k", [2, 3])
def test_one_class_alone_is_certain(k, label):
    x, y, weights, _ = problem(folds=2, k=k)
    weights = weights * (y == label)
    valid = [(y == label).nonzero()[:, 0], torch.arange(90)]
    C = many(0.5, 0.5)
    ratio = many(0, 1)
    found = implicit((x, y, weights, valid), solved((x, y, weights, valid), C, ratio, k), C, ratio)
    assert found.value.tolist() == [0, 0, math.inf, math.inf]
    assert found.gradient.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(("task", "copies"), [("binary", False), ("multiclass", True)])
def test_a_dataset(task, copies, weights):
    data = make_data(task, copies=copies, weights=weights, folds=3)
    configs = [{"C": 0.2, "l1_ratio": 0.0}, {"C": 2.0, "l1_ratio": 0.5}]
    solution, found = implicit_chunk(data, configs)
    rows = torch.zeros(3, 61, dtype=torch.float64)
    for f, fold in enumerate(data.folds):
        rows[f, fold.train] = data.weights[f, fold.train] if weights else 1
    x = data.x if copies else data.x.expand(3, -1, -1)
    plain = x, data.y, rows, [fold.valid for fold in data.folds]
    expected, slopes = differentiated(plain, many(0.2, 2.0), many(0, 0.5), data.n_outputs)
    assert torch.equal(solution.coef, expected.coef) and torch.equal(
        found.gradient, slopes.gradient
    )


def test_a_dataset_that_does_not_converge_warns_and_is_nan():
    data = make_data("binary", n=12, d=20, folds=3)
    with pytest.warns(ConvergenceWarning, match="did not converge in 3 of 6 fits"):
        _, found = implicit_chunk(
            data, [{"C": 1.0, "l1_ratio": 0.0}, {"C": math.inf, "l1_ratio": 0.0}]
        )
    assert found.gradient.isnan().tolist() == [False, True] * 3


def test_memory_for_not_even_one_member_is_reported():
    data = make_data("multiclass", folds=3)
    config = {"C": 1.0, "l1_ratio": 0.0}
    # 18 x 18 numbers three times, 3 chances of 61 rows four times, 6 pairs of classes for 512 rows.
    needed = 8 * (3 * 18**2 + 4 * 3 * 61 + 512 * 6)
    implicit_chunk(data, [config, config], memory=needed)
    message = (
        rf"memory must be at least {needed} bytes .* 3 outputs of 6 coefficients, got {needed - 1}"
    )
    with refused(message):
        implicit_chunk(data, [config, config], memory=needed - 1)


def test_inputs_whose_squares_overflow_give_no_slope_and_no_error():
    x, y, weights, valid = problem(folds=1)
    data = x * 1e200, y, weights, valid
    C = many(1.0)
    l1_ratio = many(0.0)
    found = implicit(data, solved(data, C, l1_ratio, 3), C, l1_ratio)
    assert found.gradient.isnan().all()
    assert found.value.isfinite().all()


def rows(classes=3):
    X, y = load_iris(return_X_y=True)
    X = X[y < classes]
    y = y[y < classes]
    X = torch.as_tensor(X[:, :2] - X[:, :2].mean(0))
    y = torch.as_tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts = [(X[i], y[i]) for i in order.split(20)]
    return parts[:-2], (
        torch.cat([x for x, _ in parts[-2:]]),
        torch.cat([y for _, y in parts[-2:]]),
    )


def differentiate(
    C=1.0, classes=3, *, module=None, loss=cross_entropy, batches=None, valid=None, **options
):
    given = rows(classes)
    return gputune.hypergradient(
        models.LogisticRegression(2, classes) if module is None else module,
        loss,
        given[0] if batches is None else batches,
        given[1] if valid is None else valid,
        **{"hyperparameters": {"C": C}, "optimizer": "exact", **options},
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("C", [0.03, 1.0, 30.0])
def test_the_derivative_equals_differences_of_scikit_learns_solutions(C, classes):
    batches, valid = rows(classes)
    X, y = (torch.cat(part).numpy() for part in zip(*batches))

    def loss(C):
        model = LogisticRegression(C=C, tol=1e-10, max_iter=1000, solver="newton-cholesky").fit(
            X, y
        )
        return log_loss(valid[1], model.predict_proba(valid[0].numpy()), labels=range(classes))

    found = differentiate(C, classes)
    h = 1e-3
    slope = (loss(C * math.exp(h)) - loss(C * math.exp(-h))) / (2 * h)
    assert found.value == pytest.approx(loss(C), rel=1e-6)
    assert float(found.log_gradient["C"]) == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert float(found.gradient["C"]) * C == pytest.approx(float(found.log_gradient["C"]))
    assert found.mode == "implicit"


def test_the_parameters_are_those_of_the_minimum():
    found, (batches, valid) = differentiate(1.0), rows()
    assert differentiate(loss=nn.CrossEntropyLoss()).value == found.value
    module = models.LogisticRegression(2, 3).double()
    module.load_state_dict(found.parameters)
    assert cross_entropy(module(valid[0]), valid[1]).item() == pytest.approx(found.value, rel=1e-12)
    total = sum(cross_entropy(module(x), y, reduction="sum") for x, y in batches)
    objective = total + (module.layers[0].weight ** 2).sum() / 2
    slopes = torch.autograd.grad(objective, list(module.parameters()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-6


BATCHES, VALID = rows()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"C": C}, r"hyperparameters\['C'\] must be one finite number > 0, got ")
            for C in (0, -1.0, math.inf, math.nan, [1.0, 2.0], "much")
        ),
        *(
            (
                {"hyperparameters": names},
                "hyperparameters must be only C for optimizer='exact', got",
            )
            for names in ({"lr": 0.1}, {"C": 1.0, "lr": 0.1}, {})
        ),
        (
            {"batches": [(x.numpy(), y.numpy()) for x, y in BATCHES]},
            "must be pairs of tensors for optimizer='exact'.*Convert",
        ),
        (
            {"valid": (VALID[0].numpy(), VALID[1])},
            "must be pairs of tensors .* Convert each x and y with torch.from_",
        ),
        (
            {"module": models.MLP(2, 3)},
            r"minimum of a convex problem, got MLP. Train the model with another optimizer",
        ),
        *(
            (
                {"loss": nn.CrossEntropyLoss(**words)},
                "loss must be torch.nn.functional.cross_entropy",
            )
            for words in (
                {"label_smoothing": 0.1},
                {"weight": torch.ones(3)},
                {"reduction": "sum"},
                {"ignore_index": 0},
            )
        ),
        (
            {"module": models.LogisticRegression(2, 2)},
            r"y must be class codes 0 \.\. 1, one integer per row",
        ),
        ({"batches": [(x, y.double()) for x, y in BATCHES]}, "y must be class codes"),
    ],
)
def test_what_is_not_that_convex_problem(options, message):
    with refused(message):
        differentiate(**options)


def test_a_problem_without_a_minimum_within_reach():
    x = torch.as_tensor(np.linspace(-1, 1, 20))[:, None]
    pair = (x, (x[:, 0] > 0).long())
    with pytest.raises(DivergedError, match="reached no minimum .* Choose a smaller C"):
        differentiate(1e300, module=models.LogisticRegression(1, 2), batches=[pair], valid=pair)
