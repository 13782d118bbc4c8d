"""Random search: all trials are sampled at the start, and each one trains to its end."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gputune.tuning.method import Method

if TYPE_CHECKING:
    from gputune.spaces.distributions import CheckedSpace
    from gputune.tuning.context import Context


@dataclass(frozen=True)
class RandomSearch(Method):
    """Random search, the method of ``tune(method="random")``. It has no options."""

    name = "random"
    shares_trials = True

    def run(self, context: "Context", space: "CheckedSpace") -> None:
        """Train all trials of the study to their end."""
        from gputune.methods.training import train_batches

        train_batches(context)

    def to_json(self) -> str:
        """Return the name of the method."""
        return self.name
