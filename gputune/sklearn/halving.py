"""Where searches that were pickled earlier look for their class."""

from gputune.sklearn.search import HalvingRandomSearchCV

__all__ = ["HalvingRandomSearchCV"]
