"""The public ``Study``: the results of a search, with methods that plot, train and write.

Each method imports its own dependencies when it is called. A study can then be opened to look at
its trials without importing torch.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gputune.ground.entry_points import integration
from gputune.ground.text import card, count, short
from gputune.study import study as data
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
    """The results of a search, with methods that make models, reports and plots from them.

    You do not construct a study. ``gputune.tune`` and ``gputune.search`` return a study.
    ``gputune.Study.open`` reads a study from its file.

    Scores follow scikit-learn: greater is better. Plots and reports show a score in the sign of its
    name, so a log_loss is positive there. The ``plot_...`` methods need matplotlib
    (``pip install ".[report]"`` in your clone of gputune). They draw on ``ax`` if you pass it, and return the Axes.

    Attributes:
        trials: all trials, in order of their number.
        curves: (C, epochs, F) validation scores after each epoch. Row c belongs to ``trials[c]``.
            NaN if a trial did not train that long.
        meta: the options of the search by name, read-only.
        file: the SQLite file that keeps the study. None if no file does.

    Example:
        The examples of the methods continue this one.

        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> search = {"n_trials": 10, "max_epochs": 5, "scoring": ["accuracy", "neg_log_loss"]}
        >>> study = gputune.tune("mlp", X, y, **search, study="study.db", verbose=0)
        >>> study
        Study(mlp, 10 trials, best accuracy 0.9... in trial ...)
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
        """Train the best trial, or the trial with a given number, again on all rows.

        Args:
            X: the rows of the search. You need ``X`` and ``y`` if the study was opened from a file
                and its input cannot be read again.
            y: the targets of the search, or the name of the target column.
            trial: number of the trial to train. None: the best trial.
            intervals: True keeps the residuals on the validation rows of the folds.
                ``TunedModel.predict_interval`` needs them.
            calibrate: True divides the logits by the temperature that is best on the validation
                rows of the folds (Guo et al., 2017). Calibration is only for models that predict
                class probabilities. None calibrates if the log loss ranks the trials, but not with
                ``check=False`` or for a hypergradient search.
            check: False accepts rows that differ from the rows of the search. The model then has no
                score.
            trust_code: True runs the code that the study names, if this program has not imported
                or trained the module class itself. The permission is for this call.

        Returns:
            The tuned model, which predicts from raw rows.

        Raises:
            InputError: no scored trial has this number, the rows differ (the message says how), a
                class is not trusted, or no file holds the rows or options.

        Example:
            >>> model = study.best_model()
            >>> model.predict(X[:3])
            array([0, 0, 0])
        """
        from gputune.tuning.refit import Access
        from gputune.tuning.validation import refit_with_folds

        access = Access(self, X, y, check, trust_code)
        return refit_with_folds(access, trial=trial, intervals=intervals, calibrate=calibrate)

    def best_models(
        self,
        trials: Sequence[int],
        X: object = None,
        y: object = None,
        *,
        check: bool = True,
        trust_code: bool = False,
    ) -> "list[TunedModel]":
        """Train several trials again on all rows.

        The result is the same as one call of ``best_model(trial=...)`` for each trial, but the
        trials share the cores of the machine. The models are not calibrated.

        Args:
            trials: numbers of the trials to train.
            X: the rows of the search, as in ``best_model``.
            y: the targets of the search, as in ``best_model``.
            check: False accepts rows that differ from the rows of the search, as in ``best_model``.
            trust_code: permission to run code, as in ``best_model``.

        Returns:
            One tuned model for each number in ``trials``, in the same order.

        Raises:
            InputError: no scored trial has one of the numbers, the study comes from a hypergradient
                search, or as in ``best_model``.

        Example:
            >>> models = study.best_models([trial.number for trial in study.ranking()[:3]])
            >>> [model.info["params"] == trial.params for model, trial in zip(models, study.ranking())]
            [True, True, True]
        """
        from gputune.tuning.refit import Access
        from gputune.tuning.validation import refit_several

        return refit_several(Access(self, X, y, check, trust_code, "best_models"), trials)

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
        """Return the weighted mean of several trials, trained again on all rows.

        The trials and their weights are chosen on validation rows. The choice is greedy, with
        repetition (Caruana et al., 2004). The choice uses the predictions of each trial on rows
        that the trial was not trained on. The study usually keeps these predictions. Otherwise the
        trials train on their folds once more.

        The model averages probabilities, or the values of a regression. It has the residuals that
        ``predict_interval`` needs. These are slightly too small, because the ensemble was chosen on
        the same rows.

        ``info["score"]`` accounts for the choice: each fold is scored by the ensemble that the
        other folds choose. With one fold (your own validation split), each half of its rows is
        scored by the ensemble of the other half. The halves do not split a group. If a half cannot
        be scored, gputune warns, and ``info`` has no score. The candidates are still the best
        trials of the search on the same rows.

        Args:
            X: the rows of the search, as in ``best_model``.
            y: the targets of the search, as in ``best_model``.
            size: number of greedy steps at most, at least 1 [default: 25].
            candidates: number of best trials to choose from, at least 2 [default: 25].
            refit: training of the chosen trials. "all" trains each once on all rows. An integer,
                for example 5, trains each that many times on all rows, with different initial
                weights and row orders. "folds" trains each once on the training rows of each fold,
                prepared like all rows.
            calibrate: calibration as in ``best_model``. It needs no extra training here.
            trust_code: permission to run code, as in ``best_model``.
            verbose: 0 is silent, 1 shows a progress bar.

        Returns:
            The ensemble as a tuned model.

        Raises:
            InputError: fewer than two trials have a score, the study comes from a hypergradient
                search, the target is custom, a custom scorer is lost, or as in ``best_model``.
            DivergedError: a trial diverges when it trains on all rows.

        Example:
            >>> ensemble = study.ensemble(size=5, candidates=4, verbose=0)
            >>> ensemble.predict(X[:3])
            array([0, 0, 0])
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
        """Return the out-of-fold predictions of the best trial, or of the trial with a given
        number.

        Each validation row is predicted by a member (one trial on one fold) that was not trained on
        this row. The study keeps these predictions in single precision. Otherwise the members train
        on their folds once more.

        Args:
            X: the rows of the search, as in ``best_model``.
            y: the targets of the search, as in ``best_model``.
            trial: number of the trial. None: the best trial.
            trust_code: permission to run code, as in ``best_model``.

        Returns:
            Probabilities of the classes or labels, (n, K), or values of a regression in their own
            units, (n,) or (n, K). A row that several folds validate on has their mean. A row that
            no fold validates on has NaN.

        Raises:
            InputError: no scored trial has this number, the study comes from a hypergradient search
                or ``gputune.search``, the target is custom, or as in ``best_model``.

        Example:
            >>> study.oof_predictions().shape  # 150 rows, the probabilities of 3 classes
            (150, 3)
        """
        from gputune.tuning.refit import Access
        from gputune.tuning.validation import oof_predictions

        return oof_predictions(Access(self, X, y, True, trust_code, "oof_predictions"), trial)

    def to_optuna(self, storage: object = None, *, name: str | None = None) -> "optuna.Study":
        """Write every trial into a new Optuna study, for Optuna's dashboard, plots and importances.

        The Optuna study is maximized. Each of its trials has:

        - its score as value, and the mean validation score of every epoch as intermediate values;
        - its state: COMPLETE, PRUNED, FAIL or WAITING. A trial that a deadline stopped is PRUNED,
          and a trial that has not run is WAITING;
        - its params, in the distributions of the space. A distribution is widened if the default or
          an included trial lies outside;
        - as user attributes ``number``, ``origin``, ``fold_scores``, ``std_error``, ``best_epoch``,
          ``seconds`` and ``state``, the fold scores by each of several ``metrics``, and
          ``other_params``, the params that do not fit into a distribution;
        - the duration of the trial. Its time of day is the time of the export.

        Args:
            storage: a URL such as "sqlite:///optuna.db", or an ``optuna.storages`` object. None: in
                memory.
            name: name of the new study. None: Optuna makes a name.

        Returns:
            The new Optuna study. If writing fails halfway, the study is deleted again.

        Raises:
            InputError: ``storage`` has a study with this name already.
            MissingExtraError: Optuna is not installed.

        Example:
            >>> optuna_study = study.to_optuna()
            >>> len(optuna_study.trials)
            10
        """
        module = integration("studies", "optuna")
        exported: optuna.Study = module.export_study(self, storage, name)
        return exported

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
        """Write an HTML report about the study.

        The ``confusion`` and ``importance`` parts need predictions on the validation rows of the
        folds. For these parts the best trial trains on its folds once more.

        Args:
            path: the HTML file to write. An existing file is replaced.
            model: the tuned model of this study. The report then shows its held-out score.
            confusion: whether to add the confusion matrix of the classes.
            importance: whether to add the permutation importance of the columns of X.
            X: the rows of the search, as in ``best_model``.
            y: the targets of the search, as in ``best_model``.
            trust_code: permission to run code, as in ``best_model``.

        Raises:
            InputError: ``path`` is a folder, its folder does not exist, its name does not end in
                .html or .htm, the model belongs to another study or to other rows, or as in
                ``oof_predictions``.

        Example:
            >>> study.report("report.html")
        """
        from gputune.ground.files import write_text
        from gputune.report.facts import check_place
        from gputune.report.page import page

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
        """The Pareto-optimal trials, best first.

        A trial is Pareto-optimal if every trial that is better in one metric is worse in another
        metric. ``best_trial`` is the first Pareto-optimal trial. The scores are taken at the
        trial's best epoch, which the first metric chooses. Pruned trials count only if all trials
        with scores were pruned. With one metric the tuple holds only the best trial.

        Example:
            >>> study.best_trials[0] == study.best_trial
            True
        """
        return pareto_trials(self)

    @property
    def default_trial(self) -> DefaultTrial | None:
        """The trial of the default configuration, and its comparison with the best trial.

        ``score`` is the score of the default configuration. ``best_score``, ``improvement`` and
        ``improvement_std_error`` compare this trial with ``best_trial`` on the same folds.
        ``improvement`` is positive if the best trial is better, for losses too. ``text`` is the
        comparison in sentences, as in the closing text of the command line.

        The value is a ``gputune.DefaultTrial``. It is None if no trial with a score is the default
        configuration. This is the case with ``include_default=False``, a space with keys that have
        no default, ``method="hypergradient"`` and ``gputune.search``.

        Example:
            >>> study.default_trial.number
            0
            >>> study.default_trial.improvement >= 0
            True
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
        """Return the HTML summary that a notebook shows.

        The summary has the count of trials by state, the best score, and the parameters of the best
        trial.
        """
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
