"""Where ensembles that were pickled earlier look for their class."""

from gputune.population.population import Ensemble

__all__ = ["Ensemble"]
