"""The backend "eager": operations on stacked tensors take each step of all members."""

from gputune.engine.backends.base import Backend, Refusal, TrialWork
from gputune.engine.chunk import Chunk
from gputune.engine.reuse import ChunkPool
from gputune.optimizers.classes import loop_reason
from gputune.population.kinds import is_module
from gputune.population.population import Network
from gputune.scoring.scoring import Validation


def one_by_one_reason(work: TrialWork) -> str:
    """Return the reason why the members of a trial cannot be stacked or should not be, or ""."""
    if not is_module(work.kind):
        return ""
    if work.traits and work.traits.unstackable:
        return f"its members cannot be stacked: {work.traits.unstackable}"
    slow = work.traits.slow if work.traits else ""
    return slow or loop_reason(work.config)


class Eager(Backend):
    """All members take each step in the same operations on stacked tensors."""

    name = "eager"
    noun = "stacked training"
    in_words = "eagerly"

    def refuses(self, work: TrialWork) -> Refusal | None:
        reason = one_by_one_reason(work)
        return Refusal(reason, "loop") if reason else None

    def make_chunk(
        self, network: Network, validation: Validation, pool: ChunkPool, *, seed: int, horizon: int
    ) -> Chunk:
        return pool.take(network, validation, seed=seed, horizon=horizon, recorded=False)


BACKEND = Eager()
