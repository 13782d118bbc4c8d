"""Words of scikit-learn's and skorch's estimators that have no counterpart: harmless ones are taken, others refused."""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gputune.errors import InputError


@dataclass(frozen=True)
class Foreign:
    """What an estimator takes without an effect, and what it refuses.

    taken    parameter -> the values that change nothing (None: any), and what to do in place of another one
    refused  word that is no parameter -> what to do instead
    """

    taken: Mapping[str, tuple[tuple[Any, ...] | None, str]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def ours(self, params: Mapping[str, Any], owner: str) -> dict[str, Any]:
        """Return the parameters that mean something. Raises InputError for a value that would change the result."""
        for name, (harmless, remedy) in self.taken.items():
            if harmless is not None and not any(params[name] is v or params[name] == v for v in harmless):
                raise InputError(f"{owner} has no {name}={params[name]!r}: {remedy}.")
        return {name: value for name, value in params.items() if name not in self.taken}

    def check_names(self, owner: type, names: Any) -> None:
        """Raise InputError for a refused word, unless a subclass has made a parameter of it."""
        for name in names:
            if name in self.refused and name not in inspect.signature(owner.__init__).parameters:  # type: ignore[misc]
                raise InputError(f"{owner.__name__} has no parameter {name!r}: {self.refused[name]}.")


def check_constructor(owner: type, given: Mapping[str, Any], foreign: Foreign) -> None:
    """Raise InputError for a refused word, and TypeError for one that the constructor does not know."""
    parameters = inspect.signature(owner.__init__).parameters  # type: ignore[misc]
    unknown = [name for name in given if name not in parameters]
    foreign.check_names(owner, unknown)
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        near = difflib.get_close_matches(unknown[0], [name for name in parameters if name != "self"], 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{owner.__name__} has no parameter {unknown[0]!r}.{hint}")


_LAST_EPOCH = (
    "training always goes to the last epoch; leave it out and search max_iter, or use HalvingRandomSearchCV"
)
_SOLVED = "the objective has one solution, whichever solver finds it"

MLP = Foreign(
    taken={
        "verbose": (None, ""),
        "shuffle": ((True,), "rows are shuffled anew in every epoch; leave it True"),
        "warm_start": ((False,), "fit always begins anew; leave it False, or train longer with max_iter"),
        "early_stopping": ((False,), _LAST_EPOCH),
        "learning_rate": (("constant",), "use schedule='cosine', or an optimizer that adapts its rate"),
    },
    refused={
        **dict.fromkeys(("tol", "n_iter_no_change", "validation_fraction"), _LAST_EPOCH),
        "power_t": "there is no learning_rate='invscaling'; use schedule='cosine'",
        "nesterovs_momentum": "optimizer='nesterov' has it and optimizer='sgd' has not; give one of them",
        **dict.fromkeys(("beta_1", "beta_2", "epsilon"), "adam has 0.9, 0.999 and 1e-8; leave it out"),
        "max_fun": "there is no solver='lbfgs'; leave it out",
        "loss": "the loss is the log loss of classes, or the squared error; leave it out",
    },
)

LOGISTIC = Foreign(
    taken={
        "solver": (
            (None, "lbfgs", "newton-cg", "newton-cholesky", "sag", "saga"),
            f"{_SOLVED}, but for 'liblinear', which penalises the intercept too; leave it out",
        ),
        "warm_start": (None, ""),
        "n_jobs": (None, ""),
        "verbose": (None, ""),
    },
    refused={
        "dual": f"{_SOLVED}; leave it out",
        "intercept_scaling": "the intercept is not penalised; leave it out",
        "multi_class": "more than two classes are one softmax; leave it out, or use "
        "sklearn.multiclass.OneVsRestClassifier(LogisticRegression())",
    },
)

NET = Foreign(
    taken={
        "train_split": (
            (None, False),
            "every row is trained on; leave it out, and let a search split the rows",
        ),
        "verbose": (None, ""),
    },
    refused={
        "callbacks": "there are none; for a schedule of the learning rate use MLPClassifier or gputune.tune",
        "warm_start": "fit always begins anew; train longer with max_epochs",
        "iterator_train__shuffle": "rows are shuffled anew in every epoch; leave it out",
        "optimizer__lr": "give lr",
        "optimizer__nesterov": "give optimizer='nesterov'",
    },
)
