"""How a model trains and is searched where nobody says otherwise, and the published spaces that have a name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from scipy import stats
from torch import nn

from gputune.errors import InputError
from gputune.methods.distributions import Choices
from gputune.methods.random import TAKERS
from gputune.models import CNN, GRU, RealMLP
from gputune.optimizers.classes import optimizer_defaults
from gputune.text import did_you_mean
from gputune.types import LR_FACTORS, ONLINE, PLAIN_LR_FACTORS, SEARCHED, Config, Goal

_REALMLP: Mapping[str, float | str] = (
    {
        "batch_size": 256, "beta2": 0.95, "schedule": "coslog4",
        "dropout": 0.15, "dropout_schedule": "flat_cos",
        "weight_decay": 0.02, "weight_decay_schedule": "flat_cos",
        "lr_factor__scale": 6.0, "lr_factor__bias": 0.1, "lr_factor__embedding": 0.1, "lr_factor__slopes": 0.1,
        # Of all but the biases by the square of its factor on the rate, as its authors' package has it.
        "weight_decay_factor__scale": 6.0, "weight_decay_factor__bias": 0.0,
        "weight_decay_factor__embedding": 0.1, "weight_decay_factor__slopes": 0.1,
    }
)  # fmt: skip
"""RealMLP-TD. Source: Holzmueller et al. (2024), arXiv:2407.04491, table A.1; pytabkit, default_params.py."""


_SIZES: Mapping[type[nn.Module], Mapping[str, Choices]] = {
    CNN: {"module__channels": [8, 16, 32]},
    GRU: {"module__hidden": [16, 32, 64]},
}
"""What else is searched in modules of ``gputune.models``."""


def recipe_of(builder: object, goal: Goal) -> Config:
    """Return what a trial of a model takes in the place of the common defaults, for classes, numbers, or neither."""
    if builder is not RealMLP:
        return {}
    if goal == "classes":
        return {**_REALMLP, "lr": 0.04, "module__activation": "selu", "loss__label_smoothing": 0.1}
    return {**_REALMLP, "lr": 0.2, "module__activation": "mish"}


def default_space(
    model: Literal["mlp", "logistic", "module"], optimizer: str, builder: object = None
) -> dict[str, Choices]:
    """Return the space of a search that was given none; ``builder`` is what makes the modules, if any.

    The learning rate matters most, on a log scale; sgd, without Adam's scaling of each step, wants one or two
    powers of ten more, and that of a class of torch.optim lies around its own default. Batch size and width come from
    short lists of powers of two, so that many trials share one tensor shape and train as one population. Depth,
    activation and dropout stay at their defaults: each splits populations or adds little on tables. The solved logistic
    regression has its penalty only.
    """
    if model == "logistic" and optimizer == "exact":
        return {"C": _choices_of("C"), "l1_ratio": _choices_of("l1_ratio")}
    plain, lr = optimizer.removesuffix("hd") in ("sgd", "nesterov"), optimizer_defaults(optimizer)["lr"]
    low, high = PLAIN_LR_FACTORS if plain else LR_FACTORS
    space = {"lr": stats.loguniform(low * lr, high * lr), "batch_size": _choices_of("batch_size")}
    if optimizer in TAKERS["weight_decay"]:
        space["weight_decay"] = _choices_of("weight_decay")
    if optimizer in ONLINE:
        space["hypergrad_lr"] = _choices_of("hypergrad_lr")
    if model == "mlp":
        return space | {"width": _choices_of("width")}
    return space | next((dict(sizes) for kind, sizes in _SIZES.items() if builder is kind), {})


def _choices_of(key: str) -> Choices:
    choices = SEARCHED[key]
    return list(choices) if isinstance(choices, tuple) else stats.loguniform(choices["low"], choices["high"])


def _realmlp(goal: Goal) -> list[dict[str, Choices]]:
    """RealMLP-HPO. Source: that paper, table C.2; values that are more likely stand several times."""
    common: dict[str, Choices] = {
        "module__embedding": ["none", "pbld", "pl", "plr"],
        "module__scaling": [True, True, True, False, False],
        "module__sigma": stats.loguniform(0.05, 0.5),
        "module__activation": ["relu", "selu", "mish"],
        "lr": stats.loguniform(0.02, 0.3),
        "dropout": [0.0, 0.0, 0.0, 0.15, 0.15, 0.15, 0.15, 0.15, 0.3, 0.3],
        "weight_decay": [0.0, 0.02],
    }
    if goal == "classes":
        common["loss__label_smoothing"] = [0.0, 0.0, 0.0, *[0.1] * 7]
    sizes = [(256, 3), (256, 3), (256, 3), (64, 5), (512, 1)]
    return [common | {"module__width": [width], "module__depth": [depth]} for width, depth in sizes]


def _realmlp_tabarena(goal: Goal) -> list[dict[str, Choices]]:
    """The space of TabArena for RealMLP. Source: pytabkit, "tabarena-new".

    Departures: one network a trial and not 8, as many epochs for all and no early end, label smoothing without a
    schedule, beta2 from a list, and at most 32 levels a category.
    """
    common: dict[str, Choices] = {
        "module__depth": [2, 3, 4],
        "module__width": [256, 384, 512],
        "module__activation": ["mish"],
        "module__sigma": stats.loguniform(0.01, 50),
        "module__one_hot": [4, 6, 9, 14, 21, 32],
        "module__category_size": [4, 8, 16],
        "lr": stats.loguniform(0.02, 0.3),
        "beta2": [0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995],
        "dropout": stats.uniform(0, 0.5),
        "weight_decay": stats.loguniform(0.001, 0.05),
        "lr_factor__embedding": stats.loguniform(0.05, 0.3),
        "lr_factor__scale": stats.loguniform(2, 10),
        "lr_factor__first": stats.loguniform(0.3, 1.5),
    }
    if goal == "classes":
        common["loss__label_smoothing"] = [0.0, 0.0, 0.0, 0.0, 0.005, 0.01, 0.03, 0.1]
    sizes = [8, 16, 32, 64]
    large: dict[str, Choices] = {"module__waves": [*sizes], "module__size": [*sizes]}
    return [common | {"module__waves": [16], "module__size": [4]}, common | large]


_KEYS = "lr batch_size weight_decay width depth dropout activation schedule ema numbers".split()

PORTFOLIOS: Mapping[str, Sequence[Config]] = {
    "mlp": [
        dict(zip(_KEYS, values, strict=True))
        for values in (
            (0.0197, 128, 0.0177, 128, 2, 0.0, "relu", "constant", 0.99, "standard"),
            (0.00257, 64, 0.114, 256, 1, 0.0, "gelu", "cosine", 0.0, "piecewise"),
            (0.0037, 32, 0.000865, 256, 3, 0.2, "relu", "constant", 0.99, "standard"),
            (0.00374, 128, 0.00403, 128, 1, 0.4, "relu", "constant", 0.99, "standard"),
            (0.00441, 32, 7.89e-05, 128, 2, 0.1, "relu", "cosine", 0.0, "quantile"),
            (0.0047, 256, 6.07e-05, 256, 1, 0.4, "silu", "constant", 0.0, "piecewise"),
            (0.00267, 256, 0.000267, 256, 3, 0.1, "gelu", "constant", 0.0, "piecewise"),
        )
    ]
}
"""Good configurations that a space of a name begins with, chosen over eleven tables (scripts/benchmark)."""

SPACES: Mapping[str, Callable[[Goal], list[dict[str, Choices]]]] = {
    "mlp": lambda goal: [default_space("mlp", "adamw")],
    "realmlp": _realmlp,
    "realmlp-tabarena": _realmlp_tabarena,
}


def named_space(name: str, goal: Goal) -> list[dict[str, Choices]]:
    """Return the space of a name. Raises InputError for a name that there is not."""
    if name not in SPACES:
        raise InputError(
            f"space must be a dict, a list of dicts, or one of {', '.join(SPACES)}, got {name!r}."
            f"{did_you_mean(name, SPACES)}"
        )
    return SPACES[name](goal)
