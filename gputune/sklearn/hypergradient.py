"""HypergradientSearchCV: drawn candidates descend along the derivative of their validation loss, all at once."""

import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from sklearn import model_selection
from sklearn.base import is_regressor
from sklearn.utils._param_validation import Interval, StrOptions

from gputune.errors import InputError
from gputune.search.descent import Hypergradient
from gputune.sklearn.descended_loss import neg_log_loss
from gputune.sklearn.descent import Descended, DescentRun, moved_names
from gputune.sklearn.running import Run, Trained
from gputune.sklearn.search import FusedSearch, current_run


class HypergradientSearchCV(FusedSearch, model_selection.RandomizedSearchCV):  # type: ignore[misc]
    """A search whose candidates move: ``n_iter`` starts are drawn, and descend on their cross-validated loss.

    At each outer step all starts train in all folds at once, the mean over the folds of the loss on their validation
    rows is differentiated through the training, and every start moves against its slope, in the logarithm of its
    hyperparameters (momentum in the logit). What else a start was drawn with stays. Every point on the way is a
    candidate in ``cv_results_``, which has ``start`` and ``outer_step`` (0 for the starts) beside scikit-learn's keys;
    the best of all of them is refitted. Attributes are those of RandomizedSearchCV.

    estimator        one of gputune's, or a Pipeline that ends in one
    hyperparameters  what is moved, in the estimator's words: "lr" ("learning_rate_init"), "weight_decay" ("alpha"),
                     "momentum". The LogisticRegression moves C, at its minimum. Where one is drawn from a distribution
                     in ``param_distributions``, it stays within its range; else a start has the estimator's own value
    n_iter           starts
    outer_steps      points that follow a start at most; a start ends sooner where its steps are short or lead nowhere
    step             "sign": every value moves by its own step, halved when the sign of its slope flips; "normalized":
                     all move along the slope, by a length divided by ten when the loss rises
    first_step       length of the first step in the logarithm; None: 1.5 for one value, 1.0 for several
    smallest_step    a start whose steps are all shorter has ended
    scoring          None is the loss that is descended: the negative log loss, also on folds whose validation rows lack
                     a class, for a regressor "neg_mean_squared_error"; the method ``score`` is then the estimator's
                     own, as in every search of scikit-learn. Any other one ranks the points, and does not move them.
    device, study, timeout, n_jobs   as in gputune's RandomizedSearchCV; after ``timeout`` seconds no start moves on

    A point whose training diverges, or whose slope is noise, steps down with its learning rate; after the second time
    its slopes come from wide finite differences. ``mean_fit_time`` is a fit's share of all training, the differentiated
    one included. The descended loss is not weighted by ``sample_weight``; training is, and newer releases of
    scikit-learn weight the scores too. Folds are split once. A parameter of an estimator is one number: for schedules
    and rates of each layer use ``gputune.tune(method=gputune.Hypergradient(...))``.

    Raises InputError, before anything trains, for an estimator that is none of gputune's, a hyperparameter that it or
    its optimizer has not, a start that cannot move, and a fold whose validation rows have a class of their own.
    """

    _space_name = "param_distributions"
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **model_selection.RandomizedSearchCV._parameter_constraints,
        "outer_steps": [Interval(Integral, 1, None, closed="left")],
        "hyperparameters": [str, tuple, list],
        "step": [StrOptions({"sign", "normalized"})],
        "first_step": [Interval(Real, 0, None, closed="neither"), None],
        "smallest_step": [Interval(Real, 0, None, closed="neither")],
        "device": [str],
        "study": [str, os.PathLike, None],
        "timeout": [Interval(Real, 0, None, closed="neither"), None],
    }

    def __init__(
        self,
        estimator: Any,
        param_distributions: Any,
        *,
        n_iter: int = 4,
        outer_steps: int = 10,
        hyperparameters: str | Sequence[str] = ("lr",),
        step: str = "sign",
        first_step: float | None = None,
        smallest_step: float = 0.05,
        scoring: Any = None,
        n_jobs: int | None = None,
        refit: Any = True,
        cv: Any = None,
        verbose: int = 0,
        random_state: Any = None,
        error_score: Any = np.nan,
        return_train_score: bool = False,
        device: str = "auto",
        study: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(
            estimator,
            param_distributions,
            n_iter=n_iter,
            scoring=scoring,
            n_jobs=n_jobs,
            refit=refit,
            cv=cv,
            verbose=verbose,
            random_state=random_state,
            error_score=error_score,
            return_train_score=return_train_score,
        )
        self.outer_steps = outer_steps
        self.hyperparameters = hyperparameters
        self.step = step
        self.first_step = first_step
        self.smallest_step = smallest_step
        self.device = device
        self.study = study
        self.timeout = timeout

    def score(self, X: Any, y: Any = None, **params: Any) -> Any:
        """Return the score of the refitted estimator: by ``scoring`` where it was given, else its own ``score``."""
        if self.scoring is None and hasattr(self, "best_estimator_"):
            return self.best_estimator_.score(X, y, **params)
        return super().score(X, y, **params)

    def _effective_scoring(self) -> Any:
        if self.scoring is not None:
            return self.scoring
        return "neg_mean_squared_error" if is_regressor(self.estimator) else neg_log_loss

    def _lent(self, *, together: bool) -> dict[str, Any]:
        return super()._lent(together=together) | {"scoring": self._effective_scoring()}

    def _leave_to_own_loop(self, reason: str) -> None:
        raise InputError(
            f"HypergradientSearchCV differentiates the training of gputune's estimators, and {reason}; use "
            "RandomizedSearchCV."
        )

    def _make_run(self, given: Trained | None, X: Any, y: Any) -> Run:
        run = super()._make_run(given, X, y)
        return DescentRun(run.estimator, run.cv, run.deadline, X=X, y=y)

    def _run_search(self, evaluate_candidates: Callable[..., Any], *, callback_ctx: Any = None) -> None:
        run = current_run.get()
        assert isinstance(run, DescentRun)
        descended = self._descend(run)
        run.given = descended.trained
        evaluate = {"more_results": {"start": descended.starts, "outer_step": descended.outer_steps}}
        if callback_ctx is None:  # before scikit-learn 1.9
            run.evaluate(evaluate_candidates, descended.trained.candidates, **evaluate)
            return
        searching = callback_ctx.subcontext(
            task_name="search",
            max_subtasks=len(descended.starts) * self.n_splits_,
            sequential_subtasks=False,
        ).call_on_fit_task_begin(estimator=self)
        run.evaluate(evaluate_candidates, descended.trained.candidates, callback_ctx=searching, **evaluate)
        searching.call_on_fit_task_end(estimator=self)

    def _descend(self, run: DescentRun) -> Descended:
        """Draw the starts, and let them descend."""
        names = moved_names(self.hyperparameters, self.estimator)
        method = Hypergradient(
            outer_steps=int(self.outer_steps),
            hyperparameters=names,
            step=self.step,  # type: ignore[arg-type]  # scikit-learn has checked it
            first_step=None if self.first_step is None else float(self.first_step),
            smallest_step=float(self.smallest_step),
        )
        space = self.param_distributions
        starts = model_selection.ParameterSampler(space, self.n_iter, random_state=self.random_state)
        return run.descend(list(starts), space, names, method)
