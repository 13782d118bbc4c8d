"""How a study is looked at: its page, its plots, its card in a notebook; what draws is imported when it is asked."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gputune.study.model import TunedModel


class StudyViews:
    """The methods of ``Study`` that show it. Scores are shown in the sign of their name: a log_loss is positive.

    The plots need matplotlib (``pip install "gputune[report]"``), draw on ``ax`` where it is given, and return
    the Axes.
    """

    def report(self: Any, path: str | os.PathLike[str], *, model: "TunedModel | None" = None) -> None:
        """Write one page of HTML about the study to ``path``, which is replaced where it exists.

        ``model`` is the tuned model of the study, whose held-out score the page then shows. Raises InputError for a
        folder, one that does not exist, a name that does not end in .html, and for a model of another study or of
        other rows.
        """
        from gputune.report.page import write_page

        write_page(self, path, model=None if model is None else model.info)

    def plot_history(self: Any, *, ax: Any = None) -> Any:
        """Score of each trial in the order of their numbers, and the best so far."""
        from gputune.views.plots import plot_history

        return plot_history(self, ax)

    def plot_curves(self: Any, *, best: int = 5, ax: Any = None) -> Any:
        """Learning curves: the ``best`` trials with one standard deviation over the folds, the others behind."""
        from gputune.views.plots import plot_curves

        return plot_curves(self, ax, best=best)

    def plot_slice(self: Any, parameter: str | None = None, *, ax: Any = None) -> Any:
        """Score against one hyperparameter; without a name an array of Axes, one for each that varied (no ``ax``)."""
        from gputune.views.plots import plot_slice

        return plot_slice(self, parameter, ax)

    def plot_parallel(self: Any, *, ax: Any = None) -> Any:
        """Parallel coordinates: a line a trial through all hyperparameters that varied, its colour the score."""
        from gputune.views.plots import plot_parallel

        return plot_parallel(self, ax)

    def plot_importance(self: Any, *, seed: int = 0, ax: Any = None) -> Any:
        """Permutation importance of the hyperparameters, by a random forest on the trials."""
        from gputune.views.plots import plot_importance

        return plot_importance(self, ax, seed=seed)

    def plot_contour(self: Any, x: str | None = None, y: str | None = None, *, ax: Any = None) -> Any:
        """Score over two hyperparameters, the two most important ones without names."""
        from gputune.views.plots import plot_contour

        return plot_contour(self, x, y, ax)

    def plot_path(self: Any, parameter: str | None = None, *, ax: Any = None) -> Any:
        """Paths of a search by hypergradients: a hyperparameter from outer step to outer step, a line a start."""
        from gputune.views.plots import plot_path

        return plot_path(self, parameter, ax)

    def _repr_html_(self: Any) -> str:
        from gputune.study.cards import study_card

        return study_card(self)
