"""HalvingRandomSearchCV: successive halving on the fold mean, where training goes on from rung to
rung."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from sklearn.model_selection import _search_successive_halving as successive_halving

from gputune.sklearn.base import constructor, last_step
from gputune.sklearn.networks import TrainedEstimator
from gputune.sklearn.recipe import Member, RungState
from gputune.sklearn.record import Fit
from gputune.sklearn.replay import Candidates, SearchRun
from gputune.sklearn.search import FusedSearch


@dataclass(eq=False)
class HalvingRun(SearchRun):
    """A run whose candidates train on from where the rung before left them, each up to its own
    ``resource``."""

    resource: str = ""
    horizon: int = 0
    kept: dict[Hashable, RungState] = field(default_factory=dict)

    def train(self, candidates: Candidates, fits: Sequence[Fit], states: object = None) -> None:
        """Train to the rung, and keep where everyone is; one that failed at the rung before in a
        fold begins again."""
        # What a candidate keeps from rung to rung: scikit-learn copies its dict, and not its
        # values.
        keys = [
            tuple(sorted((n, id(v)) for n, v in params.items() if n != self.resource))
            for params in candidates
        ]
        begin = RungState(0, self.horizon, None, {})
        super().train(
            candidates, fits, {trial: self.kept.get(key, begin) for trial, key in enumerate(keys)}
        )
        by_trial: dict[int, list[Fit]] = defaultdict(list)
        for fit in fits:
            by_trial[fit.trial].append(fit)
        self.kept = {}
        for trial, own in by_trial.items():
            members = {fit.fold: fit.fitted for fit in own if isinstance(fit.fitted, Member)}
            # their parameters are in the buffers too: what else they have goes
            if len(members) == len(own):
                buffers = {
                    fold: member.buffers
                    for fold, member in members.items()
                    if member.buffers is not None
                }
                last = members[own[0].fold]
                self.kept[keys[trial]] = RungState(last.epochs, self.horizon, last.seed, buffers)


class HalvingRandomSearchCV(FusedSearch, successive_halving.HalvingRandomSearchCV):  # type: ignore[misc]
    """scikit-learn's HalvingRandomSearchCV with epochs as the resource: candidates train on from
    rung to rung.

    At each rung the mean over all folds decides which 1/``factor`` of the candidates go on. Those
    train on from where they are, in all folds at once, where scikit-learn trains them anew.
    Candidates, decisions, ``cv_results_`` (with
    ``iter`` and ``n_resources``) and all attributes (``n_candidates_``, ``n_resources_``,
    ``n_remaining_candidates_``,
    ...) are scikit-learn's. The best candidate is trained anew on all rows, for as many epochs as the last rung has.

    estimator      one of gputune's that train, or a Pipeline that ends in one
    resource       "auto" is "max_iter", or the "max_epochs" of a NeuralNet (in a pipeline the name
                   of the step may be left out), and for any other estimator "n_samples", the
                   default of scikit-learn. With another resource, as "n_samples", every rung trains
                   anew
    max_resources  epochs of the last rung at most; "auto" is the estimator's own number, or the
                   number of rows
    min_resources  epochs of the first rung; "smallest" is 1, or for rows what scikit-learn says
    device         where candidates train; "auto" leaves it to the estimator's own ``device``
    n_jobs         accepted, and without effect

    A schedule of the learning rate runs over ``max_resources`` epochs, so that with "cosine" a rung
    is not what a training of that length would be. A score of a rung with the "constant" one is, to
    rounding. Other parameters are scikit-learn's; ``mean_fit_time`` is a fit's share of its rung's
    training.
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
        """Return the parameter of the estimator that is the resource where that is its epochs, else
        None.

        Raises InputError for what other estimators call them.
        """
        prefix, last = last_step(self.estimator)
        if not isinstance(last, TrainedEstimator):
            return None
        word = str(self.resource).removeprefix(prefix)
        last._check_names([word])
        return prefix + last._epochs if word in ("auto", last._epochs) else None

    def _make_run(self, X: object, y: object) -> SearchRun:
        run = super()._make_run(X, y)
        if self._epochs_parameter() is None:
            return run
        return HalvingRun(run.estimator, run.cv, resource=self.resource, horizon=self.max_resources)
