"""A transformed target: a fold equals a plain loop on it, and everything that is told is in the
target's own units."""

import numpy as np
import pytest
import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    PowerTransformer,
    QuantileTransformer,
)

import gputune
import reference
from command_line import run, write_table
from gputune.data.target_transform import (
    FittedTransform,
    fit_transform,
    transform_from_json,
    transform_to_json,
)
from gputune.ground.errors import InputWarning
from gputune.models import MLP
from gputune.population.population import complete
from problems import needs_compiled_code
from refused import refused

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3))
Y = np.exp(X @ [1.0, 0.5, 0.0] + 0.1 * RNG.normal(size=60))
FOLDS = [
    (np.flatnonzero(np.arange(60) % 2 != f), np.flatnonzero(np.arange(60) % 2 == f))
    for f in range(2)
]
HOW = {"n_trials": 1, "max_epochs": 3, "cv": FOLDS, "verbose": 0, "workers": 1}
QUANTILES = QuantileTransformer(n_quantiles=20, output_distribution="normal")
TRANSFORMERS = {
    "log": FunctionTransformer(np.log, np.exp),
    "log1p": FunctionTransformer(np.log1p, np.expm1),
}


@pytest.mark.parametrize("transform", ["log", "log1p", QUANTILES], ids=str)
@pytest.mark.parametrize("backend", [pytest.param("compiled", marks=needs_compiled_code), "eager"])
def test_a_fold_equals_a_plain_loop_on_the_transformed_target(transform, backend):
    params = {"lr": 0.01, "batch_size": 8, "width": 16}
    study = gputune.tune(
        "mlp",
        X,
        Y,
        space=params,
        target_transform=transform,
        dtype="float64",
        backend=backend,
        **HOW,
    )
    config = complete(params, optimizer="adamw", schedule="constant")
    of_rows = study.oof_predictions()
    for f, (train, valid) in enumerate(FOLDS):
        x = torch.tensor((X - X[train].mean(0)) / X[train].std(0))
        fitted = TRANSFORMERS.get(str(transform), transform).fit(Y[train, None])
        there = fitted.transform(Y[train, None])[:, 0]
        y = torch.tensor((there - there.mean()) / there.std())
        scores = []

        def after_epoch(
            epoch, module, x=x[valid], there=there, fitted=fitted, scores=scores, valid=valid
        ):
            with torch.no_grad():
                output = module(x).numpy() * there.std() + there.mean()
            scores.append(fitted.inverse_transform(output)[:, 0])

        reference.train_mlp(x[train], y, config, n_outputs=1, epochs=3, after_epoch=after_epoch)
        plain = [r2_score(Y[valid], predicted) for predicted in scores]
        np.testing.assert_allclose(study.curves[0, :, f], plain, rtol=1e-8)
        kept = scores[study.best_trial.best_epoch - 1]
        np.testing.assert_allclose(of_rows[valid], kept, rtol=1e-6)  # in single precision


def test_a_transformer_is_used_as_scikit_learn_uses_it():
    regressor = TransformedTargetRegressor(LinearRegression(), transformer=PowerTransformer()).fit(
        X, Y
    )
    fitted = fit_transform(PowerTransformer(), Y)
    line = LinearRegression().fit(X, fitted.forward(Y)).predict(X)
    expected = regressor.predict(X)
    known = np.isfinite(expected)
    inverse = fitted.inverse(torch.tensor(line[:, None])).numpy()[:, 0]
    np.testing.assert_allclose(inverse[known], expected[known])
    assert (
        np.isfinite(inverse).all()
        and np.isnan(fitted.inverse(torch.tensor([[np.nan]])).numpy()).all()
    )
    beyond = fitted.inverse(torch.tensor([[9.0]])).item()
    assert beyond == pytest.approx(Y.max())  # what has no inverse is the nearest training target


@pytest.mark.parametrize("transform", ["log", PowerTransformer(), TRANSFORMERS["log"]], ids=str)
def test_models_are_saved_and_studies_opened(transform, tmp_path):
    how = {**HOW, "target_transform": transform, "study": tmp_path / "study.db"}
    study = gputune.tune("mlp", X, Y, **how)
    model = study.best_model()
    model.save(tmp_path / "model")
    loaded = gputune.load_model(tmp_path / "model")
    opened = gputune.Study.open(tmp_path / "study.db")
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    np.testing.assert_array_equal(opened.best_model(X, Y).predict(X), model.predict(X))
    assert len(gputune.tune("mlp", X, Y, **{**how, "n_trials": 2}).trials) == 2
    with refused("differs from this call in: target_transform"):
        gputune.tune("mlp", X, Y, **{**how, "target_transform": "log1p"})
    opened.report(tmp_path / "report.html")
    assert f"target_transform={repr(transform)[:9]}" in (
        tmp_path / "report.html"
    ).read_text().replace("&#39;", "'")


def test_several_numbers_a_custom_loss_and_an_ensemble():
    two = np.stack([Y, Y**2], 1)
    study = gputune.tune(MLP, X, two, target_transform=QUANTILES, **{**HOW, "n_trials": 2})
    assert (study.best_model().predict(X).max(0) <= two.max(0) * (1 + 1e-6)).all()
    together = study.ensemble(candidates=2, size=2, verbose=0).predict(X)
    assert together.shape == two.shape and (together.min(0) >= two.min(0) * (1 - 1e-6)).all()


def test_a_custom_loss_sees_the_target_transformed():
    def loss(outputs, y):
        return (outputs[:, 0] - y) ** 2

    how = {**HOW, "loss": loss, "epoch": "last"}
    transformed = gputune.tune(MLP, X, Y, target_transform="log", **how).oof_predictions()
    np.testing.assert_allclose(
        transformed, np.exp(gputune.tune(MLP, X, np.log(Y), **how).oof_predictions())
    )


@pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=pytest.mark.long), ".pt2"])
def test_an_export_inverts_words_and_refuses_code(suffix, tmp_path):
    pytest.importorskip("onnxscript")
    model = gputune.tune("mlp", X, Y, target_transform="log", **HOW).best_model()
    path = tmp_path / f"model{suffix}"
    model.export(path)
    if suffix == ".onnx":
        (found,) = pytest.importorskip("onnxruntime").InferenceSession(path).run(None, {"X": X})
    else:
        found = torch.export.load(path).module()(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(found, model.predict(X), rtol=1e-5)
    model = gputune.tune("mlp", X, Y, target_transform=PowerTransformer(), **HOW).best_model()
    with refused(
        r"export\(\) cannot write target_transform=PowerTransformer\(\), .* 'log' or 'log1p'"
    ):
        model.export(tmp_path / f"other{suffix}")


def test_the_command_line(tmp_path):
    file = write_table(tmp_path / "houses.csv", price=np.round(np.exp(RNG.normal(size=40)), 3))
    out = tmp_path / "out"
    words = [
        "--target",
        "price",
        "--target-transform",
        "log",
        "--epochs",
        "2",
        "--cv",
        "2",
        "--workers",
        "1",
    ]
    code, text, err = run("tune", file, *words, "--trials", "2", "--out", out)
    assert (code, err) == (0, "") and "Scores   r2\n  held-out " in text
    assert run("resume", out, "--trials", "3")[0] == 0
    study = gputune.Study.open(out / "study.db")
    assert study.record.target_transform == "log" and len(study.trials) == 3
    predicted = run("predict", out / "model", file)[1].split()
    assert predicted[0] == "price" and all(float(value) > 0 for value in predicted[1:])
    assert run("train", file, *words, "--out", tmp_path / "one")[0] == 0
    code, _, err = run("tune", file, *words[:3], "sqrt", "--out", tmp_path / "no")
    assert code == 2 and "--target-transform must be 'log' or 'log1p', got" in err


class Halved(FunctionTransformer):
    def __init__(self):
        super().__init__(lambda y: y / 2, lambda y: y * 2)


def test_a_custom_object_is_known_to_its_process_only(tmp_path):
    how = {**HOW, "target_transform": Halved(), "study": tmp_path / "study.db"}
    study = gputune.tune("mlp", X, Y, **how)
    model = study.best_model()
    assert study.record.target_transform == {"object": "Halved()"}
    with refused(
        r"save\(\) cannot write target_transform=Halved\(\), because it is a Halved, not a transformer of sklearn"
    ):
        model.save(tmp_path / "model")
    with refused(
        "cannot read target_transform, which is your own object, from the study file. Call this method on"
    ):
        gputune.Study.open(tmp_path / "study.db").best_model(X, Y)
    assert "target_transform, an object of your own" in study.record.arguments.lacking


class Failing(FunctionTransformer):
    def transform(self, X):
        raise RuntimeError("no")


class Wide(FunctionTransformer):
    def transform(self, X):
        return np.concatenate([X, X], 1)


@pytest.mark.parametrize(
    ("transform", "y", "words"),
    [
        (
            "log",
            Y - 2,
            r"above 0 in y, but .* of 60 are not \(the smallest is -1.*\). Choose a PowerTransformer, or",
        ),
        (
            "log",
            np.r_[0.0, Y[1:]],
            r"but 1 of 60 are not \(the smallest is 0\). Choose 'log1p' .for numbers above -1., or",
        ),
        ("log1p", Y - 2, "needs numbers above -1 in y, but"),
        (
            "log",
            X[:, 0] > 0,
            "is only for a numeric target, but y is 2 classes. Leave it out, or",
        ),
        (
            "sqrt",
            Y,
            "must be 'log', 'log1p' or a scikit-learn transformer .* inverse_transform, or None, got 'sqrt'",
        ),
        ("lg", Y, "Did you mean 'log'"),
        (PowerTransformer, Y, "target_transform must be"),
        (LinearRegression(), Y, "target_transform must be"),
        (
            Failing(),
            Y,
            r"target_transform=Failing\(\) raised RuntimeError on the training rows of a fold: no. Choose",
        ),
        (
            Wide(),
            Y,
            r"raised ValueError on .*: it turned values of shape \(30,\) into shape \(30, 2\), or",
        ),
        (PowerTransformer(method="box-cox"), -Y, "raised ValueError on the training rows"),
    ],
)
def test_what_is_refused(transform, y, words):
    with refused(words):
        gputune.tune("mlp", X, y, target_transform=transform, **HOW)


def test_a_descent_is_refused():
    with refused(
        "method='hypergradient' minimizes the squared error .* target_transform='log'. Choose "
        "another"
    ):
        gputune.tune("mlp", X, Y, target_transform="log", method="hypergradient", **HOW)


def test_a_poor_inverse_is_warned_of_and_a_function_without_a_name_refused(tmp_path):
    with pytest.warns(InputWarning, match="does not restore the target"):
        fit_transform(KBinsDiscretizer(3, encode="ordinal", strategy="uniform"), Y)
    nameless = FunctionTransformer(lambda y: y / 2, lambda y: y * 2)
    with refused("has no name by which study='.*' could find it again"):
        gputune.tune("mlp", X, Y, target_transform=nameless, study=tmp_path / "study.db", **HOW)


def test_a_file_makes_no_other_object():
    for value in (
        {"class": "os", "params": {}},
        {"class": "normalize", "params": {}},
        {"ufunc": "save"},
        "sqrt",
    ):
        with pytest.raises((ValueError, AttributeError, TypeError)):
            transform_from_json(value)
    assert str(transform_from_json(transform_to_json(QUANTILES))) == str(QUANTILES)
    assert FittedTransform.from_json("log").transform == "log"
