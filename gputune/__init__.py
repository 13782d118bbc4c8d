"""gputune: hyperparameter search for PyTorch as one tensor program.

Names are imported when they are first used, so that ``gputune --help`` does not wait for torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gputune.errors import (
    ClusterError,
    DivergedError,
    InputError,
    InputWarning,
    MissingExtraError,
    SearchFailedError,
    SearchInterrupted,
    StudyCorruptError,
    StudyVersionError,
)
from gputune.garbage import without_collector
from gputune.version import __version__

if find_spec("gputune.models") is None:  # installation puts the folder models/ of the source in here
    raise ImportError(
        f"gputune is imported from its source, {__path__[0]}, and not as it is installed, with models and "
        "compiled code: start Python in another folder, or with -P (python -P -m gputune)."
    )

if TYPE_CHECKING:
    from gputune.api.study import Study
    from gputune.api.tuning import search, tune
    from gputune.executors.ray_cluster import Ray
    from gputune.hypergradients.hypergradient import hypergradient
    from gputune.methods.descent import Hypergradient
    from gputune.methods.distributions import log_int
    from gputune.methods.optuna import OptunaSampler
    from gputune.methods.stopping import Halving, Median
    from gputune.study.model import TunedModel, load_model
    from gputune.study.study import Trial

__all__ = [
    "ClusterError",
    "DivergedError",
    "Halving",
    "Hypergradient",
    "InputError",
    "InputWarning",
    "Median",
    "MissingExtraError",
    "OptunaSampler",
    "Ray",
    "SearchFailedError",
    "SearchInterrupted",
    "Study",
    "StudyCorruptError",
    "StudyVersionError",
    "Trial",
    "TunedModel",
    "__version__",
    "hypergradient",
    "load_model",
    "log_int",
    "search",
    "tune",
]

_HOMES = {
    "Halving": "gputune.methods.stopping",
    "Hypergradient": "gputune.methods.descent",
    "Median": "gputune.methods.stopping",
    "OptunaSampler": "gputune.methods.optuna",
    "Ray": "gputune.executors.ray_cluster",
    "Study": "gputune.api.study",
    "Trial": "gputune.study.study",
    "TunedModel": "gputune.study.model",
    "hypergradient": "gputune.hypergradients.hypergradient",
    "load_model": "gputune.study.model",
    "log_int": "gputune.methods.distributions",
    "callbacks": "gputune.callbacks",
    "models": "gputune.models",
    "optim": "gputune.optim",
    "search": "gputune.api.tuning",
    "sklearn": "gputune.sklearn",
    "tune": "gputune.api.tuning",
}

_MODULES = ("callbacks", "models", "optim", "sklearn")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gputune' has no attribute {name!r}")
    with without_collector():
        home = import_module(_HOMES[name])
    return home if name in _MODULES else getattr(home, name)


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
