"""Studies of any size without a training: scores follow a smooth law of the hyperparameters, some
trials end early."""

import math
from dataclasses import asdict, replace

import numpy as np

from gputune.api.study import Study
from gputune.methods.halving import Halving
from gputune.methods.hypergradient import Hypergradient
from gputune.study.study import Trial

META = {
    "model": "mlp",
    "spec": {"kind": "mlp"},
    "optimizer": "adamw",
    "schedule": "constant",
    "space": "batch_size=[16, 32, 64, 128], dropout=uniform(loc=0.0, scale=0.5), "
    "lr=loguniform(a=0.0001, b=0.1), width=log_int(16, 512)",
    "method": "random",
    "task": "multiclass",
    "target": "target",
    "classes": [0, 1, 2],
    "source": {"path": "sklearn:wine", "target": "target", "groups": None},
    "fingerprint": {"rows": 178},
    "features": 13,
    "notes": [],
    "columns": "drop-constant",
    "numbers": "standard",
    "class_weight": None,
    "sample_weight": None,
    "cv": "5",
    "folds": 5,
    "splits": "0",
    "scoring": "accuracy",
    "epoch": "best",
    "max_epochs": 30,
    "seed": 0,
    "dtype": "float32",
    "device": "cpu",
    "versions": {"gputune": "0.1.0"},
}

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'-alert(1)-'",
    "{{ 7 * 7 }}{% raw %}",
    "</style><style>*{display:none}",
    "a\x00\x1b[2J\u202eb",
    "</title><h1>",
    "]]><!--",
)


def study_of(params, scores=None, *, epochs=1, **meta):
    """Return a study of trials with these hyperparameters and scores, a trial without a finite one
    having diverged."""
    scores = scores or [0.5 + c / 100 for c in range(len(params))]
    trials = [
        Trial(c, p, s, (s, s), 1, "complete" if math.isfinite(s) else "failed", 1.0, "random")
        for c, (p, s) in enumerate(zip(params, scores))
    ]
    meta = {**META, "folds": 2, "space": "", **meta}
    return Study(meta=meta, trials=trials, curves=np.ones((len(trials), epochs, 2)))


def made_study(n, *, epochs=30, folds=5, seed=0, halved=False, waiting=0, file=None, **meta):
    """Return a study of ``n`` trials, the last ``waiting`` of them not trained; ``halved``: with
    rungs at 3 and 9."""
    rng = np.random.default_rng(seed)
    trials = []
    configs = [_config(rng) for _ in range(n)]
    curves = np.array([_curve(config, epochs, folds, rng) for config in configs]).reshape(
        n, epochs, folds
    )
    for c, (config, curve) in enumerate(zip(configs, curves)):
        if c >= n - waiting:
            curve[:] = np.nan
            trials.append(Trial(c, config, math.nan, (), 0, "waiting", math.nan, "random"))
            continue
        if config["lr"] > 0.07:
            at = int(rng.integers(0, epochs))
            curve[at:] = np.nan
            trials.append(
                Trial(c, config, math.nan, tuple(curve[at].tolist()), at, "failed", 0.2, "random")
            )
            continue
        rung = next(
            (r for r, low in ((3, 0.55), (9, 0.8)) if halved and curve[r - 1].mean() < low), None
        )
        state, detail = ("pruned", {"rung": rung}) if rung else ("complete", {})
        curve[rung or epochs :] = np.nan
        means = curve[: rung or epochs].mean(1)
        at = int(means.argmax())
        result = float(means[at]), tuple(curve[at].tolist()), at + 1, state, 0.31 + c / n
        trials.append(Trial(c, config, *result, "random" if c else "default", detail))
    method = {"method": Halving(min_epochs=3).to_json()} if halved else {}
    meta = {**META, "folds": folds, "max_epochs": epochs, **method, **meta}
    return Study(meta=meta, trials=trials, curves=curves, file=file)


def _config(rng):
    return {
        "activation": str(rng.choice(["relu", "gelu", "tanh"])),
        "batch_size": int(rng.choice([16, 32, 64, 128])),
        "dropout": float(rng.uniform(0, 0.5)),
        "lr": float(10 ** rng.uniform(-4, -1)),
        "width": int(2 ** rng.uniform(4, 9)),
    }


def _curve(config, epochs, folds, rng):
    """Accuracy that rises the faster the nearer the rate is to 0.008, and the higher the wider the
    network is."""
    off = abs(math.log10(config["lr"] / 8e-3))
    top = 0.985 - 0.06 * off**2 - 0.05 * config["dropout"] - 0.1 / math.sqrt(config["width"])
    speed = 0.45 / (1 + 2.0 * off)
    rise = 1 - np.exp(-speed * np.arange(1, epochs + 1))
    mean = 0.3 + (top - 0.3) * rise
    return mean[:, None] + rng.normal(0, 0.012, folds) + rng.normal(0, 0.004, (epochs, folds))


def made_batches(n, *, batch=8, sampler="TPESampler", halving=None, **options):
    """Return a study in which an Optuna sampler proposed the trials after the default one in
    batches.
    """
    study = made_study(n, halved=halving is not None, **options)
    trials = [
        trial
        if trial.number == 0
        else replace(trial, origin=f"batch {1 + (trial.number - 1) // batch}")
        for trial in study.trials
    ]
    plain = None if halving is None else asdict(halving)
    meta = {**study.meta, "method": {"name": "optuna", "sampler": sampler, "halving": plain}}
    return replace(study, meta=meta, trials=tuple(trials))


def made_descent(starts=6, steps=8, *, seed=0):
    """Return a search by hypergradients on lr and weight_decay that goes down to a valley, some
    slopes noisy."""
    rng = np.random.default_rng(seed)
    trials = []
    curves = []
    for start in range(starts):
        lr = 10 ** rng.uniform(-5, -0.8)
        decay = 10 ** rng.uniform(-5, -1)
        for step in range(steps + 1):
            loss = 0.08 + 0.05 * math.log10(lr / 5e-3) ** 2 + 0.01 * math.log10(decay / 1e-2) ** 2
            folds = (-loss + rng.normal(0, 0.004, 5)).tolist()
            slopes = {"slope": {}, "slope_error": {}, "mode": "exact", "usable": bool(lr < 0.012)}
            params = {"batch_size": 32, "lr": lr, "weight_decay": decay}
            result = float(np.mean(folds)), tuple(folds), 10, "complete", 0.4, (start, step)
            trials.append(
                Trial(len(trials), params, *result, {"loss": loss, "ratio": 0.2, **slopes})
            )
            rise = np.linspace(2.0, 1.0, 10)[:, None]
            curves.append(np.array(folds) * rise)
            lr *= 10 ** (-0.5 * np.sign(math.log10(lr / 5e-3)) / (1 + step / 2))
            decay *= 10 ** (-0.4 * np.sign(math.log10(decay / 1e-2)) / (1 + step / 2))
    method = Hypergradient(hyperparameters=("lr", "weight_decay"), outer_steps=steps).to_json()
    meta = {**META, "method": method, "scoring": "neg_log_loss", "max_epochs": 10}
    return Study(meta=meta, trials=trials, curves=np.stack(curves))


def hostile_study(text):
    """A study in which every text is hostile."""
    n = 14
    rng = np.random.default_rng(0)
    trials = []
    for c in range(n):
        params = {
            "lr": 0.01 * (c + 1),
            f"module__{text}": text if c % 2 else "b",
            text: [text, (text,)],
        }
        score = math.nan if c == 3 else 0.5 + c / 100
        state = "failed" if c == 3 else "complete"
        trials.append(Trial(c, params, score, (score, score), 2, state, 1.0, text))
    meta = {
        **META,
        "model": text,
        "target": text,
        "classes": [text, "b"],
        "space": text,
        "optimizer": text,
        "device": text,
        "source": {"path": f"/tmp/{text}.csv", "target": text, "groups": text},
        "notes": [text],
        "scoring": text,
        "versions": {text: text},
        "cv": text,
        "class_weight": text,
        "task": text,
        "dtype": text,
        "method": {"name": text},
        "spec": {"kind": "module", "path": f"{text}.py", "class": text, "sha256": ""},
    }
    return Study(meta=meta, trials=trials, curves=rng.normal(size=(n, 3, 2)))
