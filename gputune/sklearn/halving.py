"""HalvingRandomSearchCV: successive halving on the fold mean, where training goes on from rung to rung."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import _search_successive_halving as scikit_learns

from gputune.sklearn.base import TrainedEstimator
from gputune.sklearn.pipelines import last_step
from gputune.sklearn.replay import Fit, train
from gputune.sklearn.running import Candidates, Run, Trained, workers
from gputune.sklearn.search import FusedSearch
from gputune.sklearn.words import MAX_EPOCHS, Begun

_WORDS = ("max_epochs", "max_iter")
"""What an estimator calls its epochs."""


@dataclass(eq=False)
class HalvingRun(Run):
    """A run whose candidates train on from where the rung before left them, each up to its own ``resource``."""

    resource: str = ""
    horizon: int = 0
    begun: dict[Hashable, Begun] = field(default_factory=dict)

    def train(self, candidates: Candidates, fits: Sequence[Fit]) -> None:
        """Train to the rung, and keep where everyone is."""
        fresh = Begun(0, self.horizon, None, {})
        keys = [self._key(params) for params in candidates]
        train(fits, workers=workers(), deadline=self.deadline, begun=[self.begun.get(k, fresh) for k in keys])
        of_trial: dict[Hashable, list[Fit]] = {}
        for fit in fits:
            of_trial.setdefault(keys[fit.trial], []).append(fit)
        self.begun = {key: place for key, own in of_trial.items() if (place := self._place(own)) is not None}

    def _key(self, params: Mapping[str, Any]) -> Hashable:
        """Return what a candidate keeps from rung to rung: scikit-learn copies its dict, and not its values."""
        return tuple(sorted((name, id(value)) for name, value in params.items() if name != self.resource))

    def _place(self, fits: Sequence[Fit]) -> Begun | None:
        """Return where a trial is after the rung; None where it failed in a fold, and would begin again."""
        members = {fit.fold: fit.member() for fit in fits}
        states = {fold: getattr(member, "state", None) for fold, member in members.items()}
        kept = {fold: state for fold, state in states.items() if state is not None}
        if len(kept) < len(states):
            return None
        first = members[fits[0].fold]
        return Begun(first.epochs, self.horizon, first.seed, kept)


class HalvingRandomSearchCV(FusedSearch, scikit_learns.HalvingRandomSearchCV):  # type: ignore[misc]
    """scikit-learn's HalvingRandomSearchCV with epochs as the resource: candidates train on from rung to rung.

    At each rung the mean over all folds decides which 1/``factor`` of the candidates go on. Those train on from where
    they are, in all folds at once, where scikit-learn trains them anew. Candidates, decisions, ``cv_results_`` (with
    ``iter`` and ``n_resources``) and all attributes (``n_candidates_``, ``n_resources_``, ``n_remaining_candidates_``,
    ...) are scikit-learn's. The best candidate is trained anew on all rows, for as many epochs as the last rung has.

    estimator      one of gputune's that train, or a Pipeline that ends in one
    resource       "auto" is "max_epochs" where the estimator trains, and for any other one "n_samples", the default of
                   scikit-learn; or "max_epochs", "max_iter" where a script calls it so (in a pipeline the name of
                   the step may be left out). With another resource, as "n_samples", every rung trains anew
    max_resources  epochs of the last rung at most; "auto" is the estimator's own max_epochs, or the number of rows
    min_resources  epochs of the first rung; "smallest" is 1, or for rows what scikit-learn says
    device         where candidates train; "auto" leaves it to the estimator's own ``device``
    n_jobs         accepted, and without effect

    A schedule of the learning rate runs over ``max_resources`` epochs, so that with "cosine" a rung is not what a
    training of that length would be. A score of a rung with the "constant" one is, to rounding. Other parameters are
    scikit-learn's; ``mean_fit_time`` is a fit's share of its rung's training.
    """

    _space_name = "param_distributions"
    study = None
    timeout = None
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **scikit_learns.HalvingRandomSearchCV._parameter_constraints,
        "device": [str],
    }

    def __init__(
        self,
        estimator: Any,
        param_distributions: Any,
        *,
        n_candidates: int | str = "exhaust",
        factor: float = 3,
        resource: str = "auto",
        max_resources: int | str = "auto",
        min_resources: int | str = "smallest",
        aggressive_elimination: bool = False,
        cv: Any = 5,
        scoring: Any = None,
        refit: bool = True,
        error_score: Any = np.nan,
        return_train_score: bool = True,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
        device: str = "auto",
    ) -> None:
        super().__init__(
            estimator,
            param_distributions,
            n_candidates=n_candidates,
            factor=factor,
            resource=resource,
            max_resources=max_resources,
            min_resources=min_resources,
            aggressive_elimination=aggressive_elimination,
            cv=cv,
            scoring=scoring,
            refit=refit,
            error_score=error_score,
            return_train_score=return_train_score,
            random_state=random_state,
            n_jobs=n_jobs,
            verbose=verbose,
        )
        self.device = device

    def _lent(self, *, together: bool) -> dict[str, Any]:
        prefix, last = last_step(self.estimator)
        trains, word = isinstance(last, TrainedEstimator), str(self.resource).removeprefix(prefix)
        if word == "auto":
            word = _WORDS[0] if trains else "n_samples"
        lent: dict[str, Any] = super()._lent(together=together)
        if not (trains and word in _WORDS):
            return lent | ({"resource": word} if self.resource == "auto" else {})
        lent["resource"] = prefix + word
        if isinstance(self.max_resources, str) and self.max_resources == "auto":
            lent["max_resources"] = _own_epochs(last)
        # What the estimator says itself would contradict a rung's number in the other word.
        other = {prefix + name: None for name in _WORDS if name != word and name in last.get_params()}
        lent["estimator"] = clone(lent.get("estimator", self.estimator)).set_params(**other)
        return lent

    def _make_run(self, given: Trained | None, X: Any, y: Any) -> Run:
        run = super()._make_run(given, X, y)
        prefix, last = last_step(self.estimator)
        if str(self.resource).removeprefix(prefix) not in _WORDS or not isinstance(last, TrainedEstimator):
            return run
        return HalvingRun(run.estimator, run.cv, resource=self.resource, horizon=self.max_resources)


def _own_epochs(estimator: TrainedEstimator) -> int:
    """Return how long an estimator trains by itself."""
    given = (getattr(estimator, name, None) for name in _WORDS)
    return next((epochs for epochs in given if epochs is not None), MAX_EPOCHS)
