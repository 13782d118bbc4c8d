"""Where a study that was pickled earlier looks for what makes its curves."""

from gputune.study.rows import stack_curves

__all__ = ["stack_curves"]
