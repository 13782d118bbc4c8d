"""Time only compiled code for a module that is like an earlier module of the same search.

The timing of three ways to train takes longer than the training of a small trial. If compiled code
was clearly the fastest way for one set of constructor arguments, it is most likely the fastest for
another set. gputune then times only compiled code, whose chunk the training uses anyway.
"""

from collections.abc import Sequence
from typing import NamedTuple

from gputune.data.dataset import Dataset
from gputune.engine.choice import (
    CODED_SHARE,
    MARGIN,
    TOO_SHORT,
    WORTH_SECONDS,
    WRITING_SECONDS,
    NotWorthItError,
    compiled_seconds,
    try_way,
)
from gputune.engine.job import Job
from gputune.population.population import Population
from gputune.population.traits import FastestWay

# The factor by which compiled code must have been faster than the other ways for a similar module.
_CLEARLY = 1.5


class TimedModule(NamedTuple):
    """The result of a timing, and the number of trained parameters of the timed module."""

    parameters: int
    way: FastestWay

    @property
    def is_clear(self) -> bool:
        """True if all ways were timed and compiled code was clearly the fastest."""
        coded = self.way.seconds.get("compiled")
        if coded is None or len(self.way.seconds) == 1:
            return False
        return self.way.gain >= (_CLEARLY - 1) * coded


def way_like_earlier(
    job: Job,
    data: Dataset,
    group: Population,
    earlier: Sequence[TimedModule],
    *,
    member_steps: float,
) -> FastestWay | None:
    """Return compiled code as the fastest way to train a group of trials, if it was clearly the
    fastest for a similar module.

    The most similar module has the number of parameters that is the nearest to the group's number.
    Returns None if all ways must be timed.
    """
    traits = job.traits.get(group.arguments)
    clear = [timed for timed in earlier if timed.is_clear]
    if not clear or traits is None or traits.common_rows:
        return None
    parameters = max(1, traits.parameters)
    similar = min(clear, key=lambda timed: abs(timed.parameters - parameters))
    size = parameters / max(1, similar.parameters)
    coded = similar.way.seconds["compiled"]
    without = similar.way.gain + coded
    expected = min(1.0, size) * without  # seconds of a step in the fastest other way
    saved = (1 - CODED_SHARE) * expected * member_steps  # CPU seconds that compiled code saves
    if expected * member_steps < WORTH_SECONDS or saved < WRITING_SECONDS:
        return None
    data = data.of(group.configs[0])

    def check_build(build: float) -> None:
        if build > saved:
            raise NotWorthItError(TOO_SHORT)

    code = try_way("compiled code", job, lambda: compiled_seconds(job, data, group, check_build))
    if code.error is None and MARGIN * code.seconds < max(1.0, size) * without:
        gain = (without / coded - 1) * code.seconds
        return FastestWay(gain=gain, seconds={"compiled": code.seconds})
    job.pool.drop_timed(group.configs)
    return None
