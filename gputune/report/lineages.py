"""The HTML report's family tree of population based training: which trial copied which trial."""

from gputune.report.charts import STARTS
from gputune.report.digits import page_scores
from gputune.report.svg import Chart, Frame, element, line_path, path
from gputune.study.study import Study, Trial
from gputune.views.scores import BEST, linear_scale

_SIZE = (960.0, 420.0)


def tree_chart(study: Study) -> Chart | None:
    """Return a chart with one line for each lineage, or None if no trial has copied another.

    A line runs along the row of a trial. At a copy, it moves to the row of the copying trial. The
    lines of the best trials have colors.
    """
    trials = [study.trials[row] for row in page_scores(study).order]
    if not any(len(trial.lineage) > 1 for trial in trials):
        return None
    drawn = trials[:STARTS]
    last = max(trial.number for trial in study.trials)
    x = linear_scale(0, study.record.max_epochs, whole=True)
    frame = Frame(*_SIZE, x, linear_scale(0, last, pad=0.05, whole=True)).with_room()
    lines = []
    for rank, trial in enumerate(drawn):
        epochs, rows = _corners(trial, study.record.max_epochs)
        words = " -> ".join(str(number) for _, number in trial.lineage)
        line = path("line", line_path(frame.across(epochs), frame.down(rows)))
        title = element("title", f"trial {trial.number}: {words}")
        lines.append(element("g", title, line, class_=f"c{rank}" if rank < BEST else "other"))
    notes = []
    if len(drawn) < len(trials):
        notes.append(f"The best {len(drawn)} of {len(trials)} lineages are drawn.")
    heading = f"the lineages of {len(drawn)} trials by epoch"
    return frame.chart(heading, frame.axes("epoch", "trial"), *lines[::-1], notes=notes)


def _corners(trial: Trial, max_epochs: int) -> tuple[list[int], list[int]]:
    """Return the epochs and the trial numbers at the corners of a lineage's line."""
    epochs = []
    rows: list[int] = []
    for epoch, number in trial.lineage:
        if rows:  # along the row of the source up to the copy
            epochs.append(epoch)
            rows.append(rows[-1])
        epochs.append(epoch)
        rows.append(number)
    epochs.append(max_epochs)
    rows.append(rows[-1])
    return epochs, rows
