"""A report function for tests of callbacks of other libraries."""

from gputune.executors.worker import TrialEnd


def reporter(n_reports):
    """A report that ends the trial at a number of reports, and the list of reported values."""
    values = []

    def report(value):
        values.append(value)
        if len(values) == n_reports:
            raise TrialEnd

    return report, values
