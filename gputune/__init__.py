"""gputune: hyperparameter search for PyTorch as one tensor program.

Each public name is imported on its first use, so that ``gputune --help`` does not wait for torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gputune.ground.errors import (
    ClusterError,
    DivergedError,
    InputError,
    InputWarning,
    MissingExtraError,
    SearchFailedError,
    SearchInterrupted,
    StudyCorruptError,
    StudyVersionError,
    UntrustedCodeError,
)
from gputune.ground.memory import without_collector
from gputune.version import __version__

# Installation maps the top-level folder models/ of the source to this package.
if find_spec("gputune.models") is None:
    raise ImportError(
        f"gputune is imported from its source, {__path__[0]}, which has no compiled code. Start "
        "Python in another folder, or with -P (python -P -m gputune), to import the installed "
        "gputune."
    )

if TYPE_CHECKING:
    from gputune.api.many import train_many
    from gputune.api.search import search
    from gputune.api.study import Study
    from gputune.api.tuning import tune
    from gputune.executors.worker import Report
    from gputune.hypergradients.hypergradient import hypergradient
    from gputune.hypergradients.inner import HypergradientResult
    from gputune.integrations.clusters.ray import Ray
    from gputune.methods.halving import Halving
    from gputune.methods.hypergradient import Hypergradient
    from gputune.methods.median import Median
    from gputune.methods.optuna import OptunaSampler
    from gputune.methods.pbt import PopulationBased
    from gputune.modules.pretrained import frozen, lora
    from gputune.spaces.distributions import log_int
    from gputune.study.model import TunedModel, load_model
    from gputune.study.study import Trial
    from gputune.tuning.many import TrainedModules
    from gputune.views.default_trial import DefaultTrial

__all__ = [
    "ClusterError",
    "DefaultTrial",
    "DivergedError",
    "Halving",
    "Hypergradient",
    "HypergradientResult",
    "InputError",
    "InputWarning",
    "Median",
    "MissingExtraError",
    "OptunaSampler",
    "PopulationBased",
    "Ray",
    "Report",
    "SearchFailedError",
    "SearchInterrupted",
    "Study",
    "StudyCorruptError",
    "StudyVersionError",
    "TrainedModules",
    "Trial",
    "TunedModel",
    "UntrustedCodeError",
    "__version__",
    "frozen",
    "hypergradient",
    "load_model",
    "log_int",
    "lora",
    "search",
    "train_many",
    "tune",
]

_MODULES = ("callbacks", "models", "optim", "sklearn")
_HOMES = {
    # module of gputune -> the public names that it defines
    "api.many": ("train_many",),
    "api.search": ("search",),
    "api.study": ("Study",),
    "api.tuning": ("tune",),
    "executors.worker": ("Report",),
    "hypergradients.hypergradient": ("hypergradient",),
    "hypergradients.inner": ("HypergradientResult",),
    "integrations.clusters.ray": ("Ray",),
    "methods.halving": ("Halving",),
    "methods.hypergradient": ("Hypergradient",),
    "methods.median": ("Median",),
    "modules.pretrained": ("frozen", "lora"),
    "spaces.distributions": ("log_int",),
    "methods.optuna": ("OptunaSampler",),
    "methods.pbt": ("PopulationBased",),
    "study.model": ("TunedModel", "load_model"),
    "study.study": ("Trial",),
    "tuning.many": ("TrainedModules",),
    "views.default_trial": ("DefaultTrial",),
    **{name: (name,) for name in _MODULES},
}


def __getattr__(name: str) -> Any:
    """Import a public name, such as ``gputune.tune``, when a program uses the name for the first
    time."""
    for home, names in _HOMES.items():
        if name in names:
            with without_collector():
                module = import_module(f"gputune.{home}")
            return module if name in _MODULES else getattr(module, name)
    raise AttributeError(f"module 'gputune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]
