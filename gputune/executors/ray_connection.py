"""Where what was pickled earlier looks for the class of a cluster."""

from gputune.executors.ray_cluster import Ray

__all__ = ["Ray"]
