"""Small searches, one for each way through the product; tables.json holds what they gave when they
were recorded."""

import contextlib
import io
import json

import numpy as np
import optuna
import polars
import torch
from scipy.stats import loguniform
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import ParameterSampler
from torch import nn

import gputune
from gputune import sklearn as face
from gputune.cli.main import main

X, Y = (part[::2] for part in load_iris(return_X_y=True))
DIABETES, PROGRESS = (part[:60] for part in load_diabetes(return_X_y=True))
SPACE = {"lr": loguniform(1e-3, 3e-2), "batch_size": [7, 16], "width": [5, 12]}
RATES = {"lr": loguniform(1e-3, 3e-2)}
OPTIONS = {
    "n_trials": 4,
    "cv": 3,
    "max_epochs": 4,
    "dtype": "float64",
    "include_default": False,
    "workers": 1,
    "device": "cpu",
    "verbose": 0,
}


class Net(nn.Module):
    """A user's module with a norm, dropout and a hyperparameter of its own."""

    def __init__(self, n_features, n_outputs, hidden=6):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(n_features, hidden), nn.LayerNorm(hidden), nn.Tanh(), nn.Dropout(0.2)
        )
        self.head = nn.Linear(hidden, n_outputs)

    def forward(self, x):
        return self.head(self.body(x))


def tune(model="mlp", x=X, y=Y, *, space=SPACE, **options):
    return gputune.tune(model, x, y, space=space, **(OPTIONS | options))


def study_table(study):
    """Parameters, states, best epochs and curves of a study's trials, and what its best model
    predicts."""
    trials = [
        {
            "params": t.params,
            "state": t.state,
            "best_epoch": t.best_epoch,
            "origin": t.origin,
            "scores": t.fold_scores,
        }
        for t in study.trials
    ]
    return {"trials": trials, "best": study.best_trial.number, "curves": study.curves}


def with_model(study, x=X):
    return study_table(study) | {"predictions": study.best_model().predict(x)[:12]}


def backend_of(backend):
    return lambda: with_model(tune(backend=backend))


def optimizer_of(optimizer, **space):
    return lambda: study_table(tune(space=SPACE | space, optimizer=optimizer, n_trials=3))


def of_method(method, model="mlp", *, space=SPACE, **options):
    return lambda: study_table(tune(model, space=space, method=method, **options))


def deep():
    space = RATES | {
        "depth": [1, 3],
        "activation": ["gelu", "tanh"],
        "dropout": [0.0, 0.3],
        "schedule": ["constant", "cosine"],
    }
    return study_table(tune(space=space, n_trials=6))


def weighted():
    weights = np.linspace(0.5, 2, len(Y))
    return with_model(tune(class_weight="balanced", sample_weight=weights, epoch="last"))


def regression():
    return with_model(tune(x=DIABETES, y=PROGRESS, numbers="quantile"), DIABETES)


def frame():
    table = polars.DataFrame(
        {
            "size": [None if i % 9 == 0 else float(i % 13) for i in range(60)],
            "colour": ["red" if i % 3 else "blue" if i % 2 else None for i in range(60)],
            "open": [i % 4 == 0 for i in range(60)],
            "kind": ["ant" if i * i % 7 < 3 else "bee" for i in range(60)],
        }
    )
    study = tune(x=table.drop("kind"), y=table["kind"], scoring="roc_auc")
    return with_model(study, table.drop("kind"))


def grouped():
    return study_table(
        tune(groups=np.arange(len(Y)) // 5, cv=4, scoring="neg_log_loss", include=[{"width": 9}])
    )


def included():
    return study_table(tune(space={"lr": [0.001, 0.01]}, n_trials=2, include_default=True))


def resumed(folder):
    file = folder / "study.db"
    tune(study=file, n_trials=2)
    return study_table(tune(study=file, n_trials=4))


def halved_in_parts(folder):
    file = folder / "study.db"
    halving = gputune.Halving(factor=2, min_epochs=1)
    tune(study=file, method=halving)
    return study_table(tune(study=file, method=halving, n_trials=8))


def sampled():
    sampler = gputune.OptunaSampler(optuna.samplers.RandomSampler(seed=3), batch=2)
    return study_table(tune(space=RATES | {"width": [5, 12]}, method=sampler))


def command(*words):
    """Standard output of a command that ends well."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = main([str(word) for word in words])
    assert code == 0
    return out.getvalue()


def command_line(folder):
    table = folder / "table.csv"
    polars.DataFrame(
        {**{f"x{j}": X[:, j] for j in range(4)}, "y": [f"kind {k}" for k in Y]}
    ).write_csv(table)
    place = folder / "out"
    words = (
        "--target y --trials 4 --epochs 4 --cv 3 --dtype float64 --no-default --workers 1 "
        "--device cpu --quiet"
    )
    command("tune", table, *words.split(), "--out", place)
    shown = json.loads(command("best", place, "--format", "json"))
    predictions = command("predict", place / "model", table, "--proba").splitlines()[1:7]
    rows = [
        [part if part.startswith("kind") else float(part) for part in row.split(",")]
        for row in predictions
    ]
    study = gputune.Study.open(place / "study.db")
    return study_table(study) | {"shown": shown["params"], "rows": rows}


def searched(search, x=X, y=Y):
    """Parameters and scores of a search of the scikit-learn face, and what its best estimator
    predicts."""
    results = search.fit(x, y).cv_results_
    kept = {
        name: values
        for name, values in results.items()
        if name == "params" or name.startswith(("split", "n_res", "start", "outer"))
    }
    kept["params"] = [in_words_of_tune(params) for params in kept["params"]]
    return kept | {"predictions": search.predict(x)[:12]}


def in_words_of_tune(params):
    """The parameters of an MLP in the words that the tables have."""
    words = {"learning_rate_init": "lr", "hidden_layer_sizes": "width", "max_iter": "max_epochs"}
    return dict(
        sorted((words.get(k, k), v[0] if isinstance(v, tuple) else v) for k, v in params.items())
    )


MLP = face.MLPClassifier(
    (6,), solver="adamw", max_iter=4, batch_size=16, learning_rate_init=0.01, random_state=0
)
MLP_RATES = {"learning_rate_init": RATES["lr"]}
FACE = {"cv": 3, "random_state": 0}


def random_face():
    # Drawn in the order of the words that the table has.
    drawn = ParameterSampler(RATES | {"width": [5, 12]}, 4, random_state=0)
    grid = [{"learning_rate_init": [p["lr"]], "hidden_layer_sizes": [(p["width"],)]} for p in drawn]
    return searched(face.GridSearchCV(MLP, grid, return_train_score=True, cv=3))


def regressor_face():
    estimator = face.MLPRegressor(
        hidden_layer_sizes=(6,), solver="adamw", max_iter=4, random_state=0
    )
    return searched(
        face.RandomizedSearchCV(estimator, MLP_RATES, n_iter=3, **FACE), DIABETES, PROGRESS
    )


def halving_face():
    return searched(
        face.HalvingRandomSearchCV(
            MLP, MLP_RATES, n_candidates=6, resource="max_iter", max_resources=4, **FACE
        )
    )


def descent_face():
    sgd = MLP.set_params(solver="sgd", alpha=0, nesterovs_momentum=False, momentum=0.0)
    return searched(face.HypergradientSearchCV(sgd, MLP_RATES, n_iter=2, outer_steps=2, **FACE))


def solved_face():
    grid = {"C": [0.1, 1.0, 10.0], "l1_ratio": [0, 0.5]}
    return searched(face.GridSearchCV(face.LogisticRegression(solver="saga"), grid, cv=3))


def net_face():
    net = face.NeuralNetClassifier(
        Net, max_epochs=3, batch_size=16, optimizer="adam", random_state=0
    )
    return searched(face.GridSearchCV(net, {"module__hidden": [4, 8], "lr": [0.003, 0.03]}, cv=3))


def derivative(mode, optimizer="adamw"):
    """Hypergradients of a small net in three hyperparameters."""

    def run():
        g = torch.Generator().manual_seed(0)
        x = torch.randn(5, 12, 4, generator=g, dtype=torch.float64)
        y = (x.sum(-1) > 0).long()
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / 3)
        names = {"lr": [0.05, 0.02], "weight_decay": 0.01}
        result = gputune.hypergradient(
            net,
            nn.functional.cross_entropy,
            list(zip(x[:4], y[:4])),
            (x[4], y[4]),
            hyperparameters=names,
            optimizer=optimizer,
            mode=mode,
            seed=0,
        )
        return {
            "value": result.value,
            "gradients": {name: np.asarray(result.gradient[name]) for name in names},
        }

    return run


def online_optimizers():
    """Where four steps of each adaptive optimizer lead."""
    ends = {}
    for name in ("SGDHD", "AdamHD", "AdamWHD"):
        p = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
        optimizer = getattr(gputune.optim, name)([p], lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            ((p - 0.3) ** 4).sum().backward()
            optimizer.step()
        ends[name] = p.detach()
    return ends


LR = gputune.Hypergradient(outer_steps=2)
SEVERAL = gputune.Hypergradient(
    outer_steps=2,
    hyperparameters=("lr", "weight_decay"),
    segments=2,
    per_layer=True,
    step="normalized",
)
SMOOTH = RATES | {"activation": "tanh", "width": [5, 12], "batch_size": [16]}

SEARCHES = {
    "mlp compiled": backend_of("compiled"),
    "mlp eager": backend_of("eager"),
    "mlp graph": backend_of("graph"),
    "sgd": optimizer_of("sgd", momentum=[0.0, 0.9]),
    "nesterov": optimizer_of("nesterov", weight_decay=[0.0, 0.1]),
    "adam": optimizer_of("adam", weight_decay=[0.0, 0.1]),
    "sgdhd": optimizer_of("sgdhd"),
    "adamwhd": optimizer_of(
        "adamwhd", hypergrad_rule=["additive", "multiplicative"], hypergrad_lr=[1e-6, 1e-5]
    ),
    "deep": deep,
    "weighted": weighted,
    "regression": regression,
    "frame": frame,
    "groups and include": grouped,
    "default configuration": included,
    "linear": lambda: with_model(
        tune("logistic", space=RATES | {"batch_size": [7, 16]}, optimizer="adamw")
    ),
    "solved": lambda: with_model(
        tune("logistic", space={"C": loguniform(0.01, 100), "l1_ratio": [0, 0.5]})
    ),
    "module": lambda: with_model(tune(Net, space=RATES | {"module__hidden": [4, 8]})),
    "module graph": lambda: with_model(
        tune(Net, space=RATES | {"module__hidden": [4, 8]}, backend="graph")
    ),
    "halving": of_method("halving", n_trials=9),
    "halving brackets": of_method(gputune.Halving(factor=2, min_epochs=1, brackets=2), n_trials=8),
    "halving module": of_method("halving", Net, space=RATES, n_trials=6),
    "median": of_method(gputune.Median(every=1), n_trials=6),
    "descent": of_method(LR, space=SMOOTH, n_trials=2),
    "descent of several": of_method(SEVERAL, space=SMOOTH, n_trials=2),
    "descent of a module": of_method(LR, Net, space=RATES, n_trials=2),
    "descent solved": of_method(
        gputune.Hypergradient(outer_steps=2, hyperparameters="C"),
        "logistic",
        space={"C": [0.1, 10.0]},
        n_trials=2,
    ),
    "optuna": sampled,
    "resumed": resumed,
    "halving in parts": halved_in_parts,
    "command line": command_line,
    "face random": random_face,
    "face regressor": regressor_face,
    "face halving": halving_face,
    "face descent": descent_face,
    "face solved": solved_face,
    "face net": net_face,
    "derivative reverse": derivative("reverse"),
    "derivative forward": derivative("forward"),
    "derivative differences": derivative("fd"),
    "derivative sgd": derivative("reverse", "momentum"),
    "online optimizers": online_optimizers,
}
