"""Portfolios: good configurations that a search of a named space tries right after the default
configuration.

The configurations were chosen on eleven tables (scripts/benchmark). A key may lie outside of the
space.
"""

from collections.abc import Collection, Mapping, Sequence

from gputune.ground.types import Config, Goal

_KEYS = "lr batch_size weight_decay width depth dropout activation schedule ema numbers".split()
_MLPS = (
    (0.0197, 128, 0.0177, 128, 2, 0.0, "relu", "constant", 0.99, "standard"),
    (0.00257, 64, 0.114, 256, 1, 0.0, "gelu", "cosine", 0.0, "piecewise"),
    (0.0037, 32, 0.000865, 256, 3, 0.2, "relu", "constant", 0.99, "standard"),
    (0.00374, 128, 0.00403, 128, 1, 0.4, "relu", "constant", 0.99, "standard"),
    (0.00441, 32, 7.89e-05, 128, 2, 0.1, "relu", "cosine", 0.0, "quantile"),
    (0.0047, 256, 6.07e-05, 256, 1, 0.4, "silu", "constant", 0.0, "piecewise"),
    (0.00267, 256, 0.000267, 256, 3, 0.1, "gelu", "constant", 0.0, "piecewise"),
)

_REALMLPS: Sequence[Config] = (
    # Source: AutoGluon 1.6, zeroshot_portfolio_noncommercial_2026_08_05.py, where each trial
    # averages eight networks and label smoothing follows a schedule.
    {
        "module__depth": 4,
        "module__width": 256,
        "module__activation": "mish",
        "module__sigma": 0.108,
        "module__waves": 64,
        "module__size": 8,
        "module__one_hot": 5,
        "module__category_size": 16,
        "lr": 0.0283,
        "beta2": 0.9556,
        "dropout": 0.465,
        "weight_decay": 0.041,
        "lr_factor__embedding": 0.072,
        "lr_factor__scale": 4.97,
        "lr_factor__first": 0.553,
        "loss__label_smoothing": 0.056,
    },
    # Chosen on eleven tables of 2,000 rows (scripts/benchmark --realmlp-portfolio).
    {
        "module__depth": 4,
        "module__width": 512,
        "module__activation": "mish",
        "module__sigma": 0.142,
        "module__waves": 16,
        "module__size": 4,
        "module__one_hot": 6,
        "module__category_size": 16,
        "lr": 0.148,
        "beta2": 0.99,
        "dropout": 0.109,
        "weight_decay": 0.0456,
        "lr_factor__embedding": 0.12,
        "lr_factor__scale": 3.01,
        "lr_factor__first": 0.433,
        "loss__label_smoothing": 0.005,
    },
    {
        "module__depth": 3,
        "module__width": 256,
        "module__activation": "selu",
        "module__embedding": "plr",
        "module__sigma": 0.0812,
        "module__scaling": False,
        "lr": 0.0262,
        "dropout": 0.0,
        "weight_decay": 0.02,
        "loss__label_smoothing": 0.0,
    },
    {
        "module__depth": 5,
        "module__width": 64,
        "module__activation": "mish",
        "module__embedding": "none",
        "module__scaling": False,
        "lr": 0.0465,
        "dropout": 0.15,
        "weight_decay": 0.02,
        "loss__label_smoothing": 0.0,
    },
    {
        "module__depth": 3,
        "module__width": 256,
        "module__activation": "selu",
        "module__embedding": "none",
        "module__scaling": True,
        "lr": 0.0712,
        "dropout": 0.0,
        "weight_decay": 0.0,
        "loss__label_smoothing": 0.1,
    },
    {
        "module__depth": 3,
        "module__width": 256,
        "module__activation": "mish",
        "module__embedding": "plr",
        "module__sigma": 0.185,
        "module__scaling": False,
        "lr": 0.0409,
        "dropout": 0.15,
        "weight_decay": 0.0,
        "loss__label_smoothing": 0.1,
    },
    {
        "module__depth": 3,
        "module__width": 256,
        "module__activation": "relu",
        "module__embedding": "none",
        "module__scaling": True,
        "lr": 0.273,
        "dropout": 0.3,
        "weight_decay": 0.02,
        "loss__label_smoothing": 0.1,
    },
)

PORTFOLIOS: Mapping[str, Sequence[Config]] = {
    "mlp": [dict(zip(_KEYS, values, strict=True)) for values in _MLPS],
    "realmlp": _REALMLPS,
}
"""The portfolio of each space that has one, without the default configuration, which runs first."""

_OF_CLASSES = "loss__label_smoothing"


def portfolio_of(space: str, goal: Goal, *, without: Collection[str] = ()) -> list[Config]:
    """Return the portfolio of a named space for a kind of target.

    Only networks for classes have label smoothing. The keys in ``without`` are left out. The list
    is empty for a space without a portfolio.
    """
    left_out = {*without} if goal == "classes" else {*without, _OF_CLASSES}
    portfolio = []
    for config in PORTFOLIOS.get(space, ()):
        portfolio.append({key: config[key] for key in config if key not in left_out})
    return portfolio
