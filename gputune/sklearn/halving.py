"""HalvingRandomSearchCV: successive halving in which training continues from rung to rung.

A rung is one round of the search: the remaining candidates train up to the same epoch, then the
best of them are selected.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from sklearn.model_selection import _search_successive_halving as successive_halving

from gputune.ground.types import Config
from gputune.sklearn.base import constructor, last_step
from gputune.sklearn.networks import TrainedEstimator
from gputune.sklearn.recipe import FitOptions, FoldStates, TrainedMember
from gputune.sklearn.record import RecordedFit
from gputune.sklearn.replay import Candidates, SearchRun
from gputune.sklearn.search import FusedSearch


@dataclass(eq=False)
class HalvingRun(SearchRun):
    """One run of HalvingRandomSearchCV, in which candidates continue training from rung to rung.

    A candidate trains up to the epoch that its ``resource`` names.
    """

    resource: str = ""
    horizon: int = 0
    states: dict[Hashable, tuple[int, FoldStates]] = field(default_factory=dict)
    """The seed and the training states of each candidate after the last rung (pruning decision), by
    key."""

    def fit_options(self, candidates: Candidates) -> FitOptions:
        keys = enumerate(map(self._key, candidates))
        states = {trial: self.states[key] for trial, key in keys if key in self.states}
        return replace(super().fit_options(candidates), horizon=self.horizon, states=states)

    def train(self, candidates: Candidates, fits: Sequence[RecordedFit]) -> None:
        """Train the candidates up to the epoch of the rung, and store their states.

        A candidate that failed in a fold at the previous rung trains again from the beginning.
        """
        super().train(candidates, fits)
        by_trial: dict[int, list[RecordedFit]] = defaultdict(list)
        for fit in fits:
            by_trial[fit.trial].append(fit)
        self.states = {}
        for trial, trial_fits in by_trial.items():
            members = [fit.fitted for fit in trial_fits if isinstance(fit.fitted, TrainedMember)]
            if len(members) < len(trial_fits):
                continue  # a fold failed
            # The states hold the parameters too, so the rest of a member is not stored.
            states = {fit.fold: member.state for fit, member in zip(trial_fits, members)}
            self.states[self._key(candidates[trial])] = members[0].seed, states

    def _key(self, params: Config) -> Hashable:
        """Return a key that identifies a candidate at all rungs.

        scikit-learn copies the dict of a candidate, but not the values in it. So the ids of the
        values stay the same and can form the key.
        """
        return tuple(sorted((n, id(value)) for n, value in params.items() if n != self.resource))


class HalvingRandomSearchCV(FusedSearch, successive_halving.HalvingRandomSearchCV):  # type: ignore[misc]
    """scikit-learn's HalvingRandomSearchCV with epochs as the resource.

    At each rung the mean over all folds selects the best 1/``factor`` of the candidates. The
    selected candidates continue training from their current state, in all folds at once.
    scikit-learn trains them again from scratch. You need no experimental import. Source: Jamieson
    and Talwalkar (2016), arXiv:1502.07943.

    Candidates, decisions, ``cv_results_`` (with ``iter`` and ``n_resources``) and all attributes
    (``n_candidates_``, ``n_resources_``, ``n_remaining_candidates_``, ...) are scikit-learn's. The
    best candidate is trained again on all rows, for the number of epochs of the last rung.

    A schedule of the learning rate spans ``max_resources`` epochs. With "cosine", a rung therefore
    differs from a training of that length. With "constant" both are equal, up to rounding.
    ``mean_fit_time`` is the share of one fit in the training of its rung.

    Further parameters are scikit-learn's.

    Args:
        estimator: an estimator of gputune that trains, or a Pipeline that ends in one.
        resource: "auto" is "max_iter", or "max_epochs" of a NeuralNet. In a pipeline you can omit
            the name of the step. For any other estimator "auto" is "n_samples", scikit-learn's
            default. With another resource, such as "n_samples", every rung trains from scratch.
        max_resources: number of epochs of the last rung at most. "auto" is the estimator's own
            number of epochs, or the number of rows.
        min_resources: number of epochs of the first rung. "smallest" is 1. For rows it is
            scikit-learn's value.
        device: device on which candidates train. "auto" [default] uses the estimator's own
            ``device``.
        n_jobs: accepted, without effect.

    Raises:
        InputError: ``study`` exists already, or its folder does not exist. It is raised by ``fit``,
            like scikit-learn's errors.

    Example:
        >>> from gputune.sklearn import MLPClassifier, HalvingRandomSearchCV
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> estimator = MLPClassifier(max_iter=20, random_state=0)
        >>> rates = {"learning_rate_init": [0.0001, 0.001, 0.01, 0.1]}
        >>> search = HalvingRandomSearchCV(
        ...     estimator, rates, n_candidates=4, min_resources=2, factor=2, cv=3, random_state=0
        ... )
        >>> search.fit(X, y).n_candidates_  # at each rung
        [4, 2, 1]
    """

    _space_name = "param_distributions"
    study = None
    timeout = None
    pre_dispatch = "2*n_jobs"
    _parameter_constraints: ClassVar = (
        successive_halving.HalvingRandomSearchCV._parameter_constraints | {"device": [str]}
    )

    __init__ = constructor(
        successive_halving.HalvingRandomSearchCV, {"resource": "auto", "device": "auto"}
    )

    def _overrides(self, *, together: bool) -> dict[str, object]:
        overrides = super()._overrides(together=together)
        epochs = self._epochs_parameter()
        if epochs is not None:
            overrides["resource"] = epochs
            if isinstance(self.max_resources, str) and self.max_resources == "auto":
                overrides["max_resources"] = self.estimator.get_params()[epochs]
        elif self.resource == "auto":
            overrides["resource"] = "n_samples"
        return overrides

    def _epochs_parameter(self) -> str | None:
        """Return the estimator's parameter for the number of epochs, or None if the resource is not
        epochs.

        Raises InputError for the names that other estimators use.
        """
        prefix, last = last_step(self.estimator)
        if not isinstance(last, TrainedEstimator):
            return None
        resource = str(self.resource).removeprefix(prefix)
        last._check_names([resource])
        return prefix + last._epochs if resource in ("auto", last._epochs) else None

    def _make_run(self, X: object, y: object) -> SearchRun:
        run = super()._make_run(X, y)
        if self._epochs_parameter() is None:
            return run
        return HalvingRun(run.estimator, run.cv, resource=self.resource, horizon=self.max_resources)
