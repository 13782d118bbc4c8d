"""Show the numbers of the HTML report with at most four significant digits.

Whole numbers, such as a count, a seed, a trial number or a width, are exact. Texts of the user,
such as class labels and paths, stay unchanged. The code in the report has all digits, so that
running the code repeats the scores.
"""

import math
from dataclasses import replace

from gputune.ground.text import Measure
from gputune.study.study import Study
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
    """The name of a score and its number format in the HTML report."""

    def size(self, value: float) -> str:
        """Return a score, or a difference of scores, as text with at most four significant
        digits."""
        if not math.isfinite(value) or abs(value) >= 1e7:
            return super().size(value)
        return limited(value, self.decimals)


def page_measure(measure: Measure) -> PageMeasure:
    """Return a copy of a measure that formats scores as the HTML report shows them."""
    return PageMeasure(**vars(measure))


def page_scores(study: Study) -> Scores:
    """Return the scores of a study's trials, with the number format of the HTML report."""
    view = score_view(study)
    return replace(view, measure=page_measure(view.measure))


def page_curves(study: Study) -> LearningCurves:
    """Return the learning curves of a study, with the number format of the HTML report."""
    view = curve_view(study)
    return replace(view, measure=page_measure(view.measure))


def page_front(study: Study, x: str, y: str) -> ParetoFront:
    """Return the trials' scores by two metrics, with the number format of the HTML report."""
    front = pareto_front(study, x, y)
    x_measure, y_measure = front.measures
    return replace(front, measures=(page_measure(x_measure), page_measure(y_measure)))


def page_measures(study: Study) -> dict[str, Measure]:
    """Return the report's number format for each metric except the ranking metric, by metric
    name."""
    return {name: page_measure(measure) for name, measure in other_measures(study).items()}
