"""Numbers of the report: at most four significant digits.

Whole numbers, such as a count, a seed, a trial number or a width, are exact. Texts of the user, such
as class labels and paths, stay unchanged. The code on the page has all digits, because it is run.
"""

import math
from dataclasses import replace

from gputune.study.study import Study
from gputune.text import Measure
from gputune.views.scores import (
    LearningCurves,
    ParetoFront,
    Scores,
    curve_view,
    limited,
    other_measures,
    pareto_front,
    score_view,
)


class PageMeasure(Measure):
    """The way to show scores on the page."""

    def size(self, value: float) -> str:
        """Return the text of a value in the score's unit with at most four significant digits."""
        if not math.isfinite(value) or abs(value) >= 1e7:
            return super().size(value)
        return limited(value, self.decimals)


def page_measure(measure: Measure) -> PageMeasure:
    """Return the way in which the page shows scores of a measure."""
    return PageMeasure(**vars(measure))


def page_scores(study: Study) -> Scores:
    """Return the scores of a study's trials, with the measure of the page."""
    view = score_view(study)
    return replace(view, measure=page_measure(view.measure))


def page_curves(study: Study) -> LearningCurves:
    """Return the learning curves of a study, with the measure of the page."""
    view = curve_view(study)
    return replace(view, measure=page_measure(view.measure))


def page_front(study: Study, x: str, y: str) -> ParetoFront:
    """Return the scores by two metrics, with their measures of the page."""
    front = pareto_front(study, x, y)
    x_measure, y_measure = front.measures
    return replace(front, measures=(page_measure(x_measure), page_measure(y_measure)))


def page_measures(study: Study) -> dict[str, Measure]:
    """Return a dict from metric to its measure of the page, for the metrics that do not rank."""
    return {name: page_measure(measure) for name, measure in other_measures(study).items()}
