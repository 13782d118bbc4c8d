"""The search spaces that have a name."""

from collections.abc import Callable, Mapping

from scipy import stats

from gputune.ground.errors import InputError, per_interface
from gputune.ground.text import did_you_mean
from gputune.ground.types import Goal
from gputune.spaces.distributions import CheckedSpace, Choices
from gputune.spaces.space import default_space


def _realmlp(goal: Goal) -> CheckedSpace:
    """Return the published search space RealMLP-HPO. A list repeats a value that is more likely.

    Source: Holzmueller et al. (2024), arXiv:2407.04491, table C.2.
    """
    common: dict[str, Choices] = {
        "module__embedding": ["none", "pbld", "pl", "plr"],
        "module__scaling": [True] * 3 + [False] * 2,
        "module__sigma": stats.loguniform(0.05, 0.5),
        "module__activation": ["relu", "selu", "mish"],
        "lr": stats.loguniform(0.02, 0.3),
        "dropout": [0.0] * 3 + [0.15] * 5 + [0.3] * 2,
        "weight_decay": [0.0, 0.02],
    }
    if goal == "classes":
        common["loss__label_smoothing"] = [0.0] * 3 + [0.1] * 7
    sizes = [(256, 3)] * 3 + [(64, 5), (512, 1)]
    return [common | {"module__width": [width], "module__depth": [depth]} for width, depth in sizes]


def _realmlp_tabarena(goal: Goal) -> CheckedSpace:
    """Return TabArena's search space for RealMLP. Source: pytabkit, "tabarena-new".

    Differences from the source: one network per trial instead of 8, the same number of epochs for
    all trials without early stopping, label smoothing without a schedule, beta2 from a list, and at
    most 32 levels per category.
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
        common["loss__label_smoothing"] = [0.0] * 4 + [0.005, 0.01, 0.03, 0.1]
    embeddings = (([16], [4]), ([8, 16, 32, 64], [8, 16, 32, 64]))
    return [common | {"module__waves": waves, "module__size": size} for waves, size in embeddings]


def _realmlp_large(goal: Goal) -> CheckedSpace:
    """Return gputune's search space for RealMLP on tables of 10,000 rows and more.

    The frequencies of the embedding (``module__sigma``) go up to 10 instead of 0.5. The numbers are
    scaled in two ways. No value is the best on all tables, so the space leaves the choice to the
    search and to the ensemble of its trials.
    """
    space: dict[str, Choices] = {
        "module__embedding": ["pbld", "pbld", "plr"],
        "module__sigma": stats.loguniform(0.1, 10),
        "module__activation": ["mish"],
        "numbers": ["robust", "quantile"],
        "lr": stats.loguniform(0.05, 0.2),
        "dropout": [0.0, 0.15, 0.15, 0.3],
        "weight_decay": [0.0, 0.02],
    }
    if goal == "classes":
        space |= {
            "module__activation": ["selu", "mish"],
            "lr": stats.loguniform(0.005, 0.05),
            "loss__label_smoothing": [0.0, 0.1],
        }
    return [space]


SPACES: Mapping[str, Callable[[Goal], CheckedSpace]] = {
    "mlp": lambda goal: [default_space("mlp", "adamw")],
    "realmlp": _realmlp,
    "realmlp-large": _realmlp_large,
    "realmlp-tabarena": _realmlp_tabarena,
}

MODELS_OF_SPACES: Mapping[str, str] = {
    "mlp": "mlp",
    "realmlp": "realmlp",
    "realmlp-large": "realmlp",
    "realmlp-tabarena": "realmlp",
}
"""The model of each named space."""


def named_space(name: str, goal: Goal) -> CheckedSpace:
    """Return the search space with a given name. Raises InputError for an unknown name."""
    if name not in SPACES:
        names = ", ".join(SPACES)
        forms = per_interface("a dict, a list of dicts,", "KEY=SPEC,")
        raise InputError(
            "space",
            f"must be {forms} or one of {names}",
            got=name,
            remedy=did_you_mean(name, SPACES).strip(),
        )
    return SPACES[name](goal)
