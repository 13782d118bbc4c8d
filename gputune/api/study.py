"""The Study with all that can be done with it; what draws, trains or writes is imported when it is
asked.

Opening a study to look at its trials must not wait for torch.
"""

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gputune.study import study as data
from gputune.text import card, count, short
from gputune.views import plots
from gputune.views.default_trial import DefaultTrial, default_trial
from gputune.views.scores import pareto_trials, ranked_by

if TYPE_CHECKING:
    import numpy as np
    import optuna
    from numpy.typing import NDArray

    from gputune.study.model import TunedModel
    from gputune.study.study import Trial


class Study(data.Study):
    """What a search found, and what can be done with it: a model, a page, plots, a study of
    Optuna's.

    Scores are shown in the sign of their name: a log_loss is positive. The plots need matplotlib
    (``pip install "gputune[report]"``), draw on ``ax`` where it is given, and return the Axes.
    """

    def best_model(
        self,
        X: object = None,
        y: object = None,
        *,
        trial: int | None = None,
        intervals: bool = False,
        calibrate: bool | None = None,
        check: bool = True,
        trust_code: bool = False,
    ) -> "TunedModel":
        """The best configuration, or that of the ``trial`` of a number, trained again on all rows.

        ``X`` and ``y`` are needed where the study was opened from a file and its input cannot be
        read again; they must be the rows of the search. ``check=False`` trains on others: the model
        then has no score. ``trust_code=True`` runs the code of a class that a study names, also
        where this user has not trained it on this machine.
        ``intervals=True`` keeps the residuals on the rows that its folds validate on, which
        ``predict_interval`` needs.
        ``calibrate=True`` is for the probabilities of classes: logits are divided by the
        temperature that is best on the rows that the folds validate on (Guo et al., 2017). None:
        where trials are ranked by the log loss, unless
        ``check=False``, or the study is of a hypergradient search.

        Raises InputError for a number of no scored trial, for other rows, saying what differs, for
        a class that is not trusted, and where rows or options are in no file.
        """
        from gputune.tuning.refit import Access
        from gputune.tuning.validation import refit_with_folds

        access = Access(self, X, y, check, trust_code)
        return refit_with_folds(access, trial=trial, intervals=intervals, calibrate=calibrate)

    def ensemble(
        self,
        X: object = None,
        y: object = None,
        *,
        size: int = 25,
        candidates: int = 25,
        refit: int | Literal["all", "folds"] = "all",
        calibrate: bool | None = None,
        trust_code: bool = False,
        verbose: int = 1,
    ) -> "TunedModel":
        """The weighted mean of several trials, chosen on validation rows and trained again on all
        rows.

        Of what the best ``candidates`` trials predict on the rows that they have not seen, which
        the study keeps (else they train on their folds once more), an ensemble is chosen greedily
        with repetition (Caruana et al., 2004), in at most ``size`` steps. Those chosen are trained
        on all rows (``refit="all"``), each from so many starts and orders (``refit=5``), or once on
        the training rows of each fold, prepared as all rows are (``refit="folds"``). Probabilities,
        or values of a regression, are averaged. The model has the residuals that
        ``predict_interval`` needs; chosen on the same rows, they are a little small.
        ``calibrate`` is as in ``best_model``, and costs nothing here.

        ``info["score"]`` is honest about the choice: each fold is scored by what the other folds
        choose (of one fold, as a validation split of your own, each half of its rows by the other
        half); the trials are still the best of the search on the same rows. ``X``, ``y`` and
        ``trust_code`` are as in ``best_model``.

        Raises InputError for fewer than two finished trials, a study of a hypergradient search, a
        custom target, and as
        ``best_model`` does; DivergedError where a trial diverges on all rows.
        """
        from gputune.tuning.refit import Access
        from gputune.tuning.validation import ensemble

        return ensemble(
            Access(self, X, y, True, trust_code, "ensemble"),
            size=size,
            candidates=candidates,
            refit=refit,
            calibrate=calibrate,
            verbose=verbose,
        )

    def oof_predictions(
        self,
        X: object = None,
        y: object = None,
        *,
        trial: int | None = None,
        trust_code: bool = False,
    ) -> "NDArray[np.float64]":
        """What the best trial, or the ``trial`` of a number, predicts of the rows that its folds
        validate on.

        The study keeps them, in single precision; else its members train on their folds once more.
        Returns probabilities of the classes, or of the labels, (n, K); values of a regression in
        their units, (n,) or (n, K). A row of several folds has their mean, one that no fold
        validates on has NaN. ``X``, ``y`` and ``trust_code`` are as in ``best_model``.

        Raises InputError for a number of no scored trial, a study of a hypergradient search, of
        ``search`` or of a custom target, and as ``best_model`` does.
        """
        from gputune.tuning.refit import Access
        from gputune.tuning.validation import oof_predictions

        return oof_predictions(Access(self, X, y, True, trust_code, "oof_predictions"), trial)

    def to_optuna(self, storage: object = None, *, name: str | None = None) -> "optuna.Study":
        """Write every trial into a new study of Optuna's and return it: for its dashboard, plots
        and importances.

        storage: a URL such as "sqlite:///optuna.db" or an ``optuna.storages`` object; None: in
        memory. name: of the new study, else Optuna makes one.

        It is maximized. Each trial has its score as value, the fold mean of every epoch as
        intermediate values, its state (COMPLETE, PRUNED, FAIL; one that a deadline stopped is
        PRUNED, one that has not run is WAITING), its params in the distributions of the space,
        widened where the default or an included trial lies outside, and as user attributes number,
        origin, fold_scores, std_error, best_epoch, seconds, state, metrics, which are the fold
        scores by each of several, and other_params, those that have no place in the distribution.
        Its duration is the trial's; its time of day is that of the export.

        Raises InputError where ``storage`` has a study of that name, MissingExtraError without
        Optuna. A study that could not be written to its end is deleted again.
        """
        from gputune.methods.optuna import export_to_optuna

        return export_to_optuna(self, storage, name)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        model: "TunedModel | None" = None,
        confusion: bool = False,
        importance: bool = False,
        X: object = None,
        y: object = None,
        trust_code: bool = False,
    ) -> None:
        """Write one page of HTML about the study to ``path``, which is replaced where it exists.

        ``model`` is the tuned model of the study, whose held-out score the page then shows. For the
        ``confusion`` matrix of classes and the permutation ``importance`` of the columns of X the
        best trial trains on its folds once more; both are of the rows that they validate on. ``X``,
        ``y`` and ``trust_code`` are as in ``best_model``.

        Raises InputError for a folder, one that does not exist, a name that does not end in .html,
        for a model of another study or of other rows, and as ``oof_predictions`` does.
        """
        from gputune.report.facts import check_place
        from gputune.report.page import page
        from gputune.scratch import write_text

        check_place(f"report({str(path)!r})", Path(path), self.file)
        folds = None
        if confusion or importance:
            from gputune.tuning.refit import Access
            from gputune.tuning.validation import fold_report

            access = Access(self, X, y, True, trust_code, "report")
            folds = fold_report(access, confusion=confusion, importance=importance)
        write_text(Path(path), page(self, model=None if model is None else model.info, folds=folds))

    @property
    def best_trials(self) -> "tuple[Trial, ...]":
        """The trials that no other one equals in all metrics and beats in one (the Pareto front),
        best first.

        ``best_trial`` is the first of them. Scores are those at a trial's best epoch by the first
        metric; pruned trials count where there are no others. With one metric it is the best trial
        alone.
        """
        return pareto_trials(self)

    @property
    def default_trial(self) -> DefaultTrial | None:
        """The trial of the default configuration, compared with the best trial: did tuning help?

        Its ``score`` is the default's score. ``best_score``, ``improvement`` and
        ``improvement_std_error`` compare it with ``best_trial`` on the same folds. ``improvement``
        is positive if the best trial is better, for losses too.

        None if no trial with a score is the default configuration: with ``include_default=False``,
        a space with keys that have no default, ``method="hypergradient"`` and ``gputune.search``.
        """
        return default_trial(self)

    ranked_by = ranked_by
    plot_history = plots.plot_history
    plot_curves = plots.plot_curves
    plot_slice = plots.plot_slice
    plot_parallel = plots.plot_parallel
    plot_importance = plots.plot_importance
    plot_contour = plots.plot_contour
    plot_pareto = plots.plot_pareto
    plot_path = plots.plot_path

    def _repr_html_(self) -> str:
        """What a notebook shows: what it searched, its best score and parameters, how many trials
        ended how."""
        states = Counter(trial.state for trial in self.trials)
        rows = [
            ("trials", ", ".join(f"{number} {state}" for state, number in states.items()) or "none")
        ]
        if (best := data.best_trial(self)) is not None:
            measure = self.record.measure(best.score)
            folds = count(len(best.fold_scores), "fold")
            rows += [
                (measure.title, f"{measure.with_error(best.score, best.std_error)} over {folds}"),
                ("best trial", f"{best.number}, epoch {best.best_epoch}"),
                *((name, short(value)) for name, value in best.params.items()),
            ]
        return card(f"Study of {self.record.model}" if self.record.model else "Study", rows)
