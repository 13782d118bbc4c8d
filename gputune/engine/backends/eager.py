"""The backend "eager": operations on stacked tensors take each step of all members."""

from gputune.engine.backends.base import Backend, Refusal, TrialWork
from gputune.engine.chunk import Chunk
from gputune.engine.reuse import ChunkPool
from gputune.optimizers.classes import loop_reason
from gputune.population.kinds import is_module
from gputune.population.population import Network
from gputune.scoring.validation import Validation


def one_by_one_reason(work: TrialWork) -> str:
    """Return the reason why the members of a trial cannot be stacked or should not be, or ""."""
    if not is_module(work.kind):
        return ""
    if work.traits and work.traits.unstackable:
        return f"its members cannot be stacked: {work.traits.unstackable}"
    slow = work.traits.slow if work.traits else ""
    return slow or loop_reason(work.config)


def refusal_to_stack(work: TrialWork) -> Refusal | None:
    """Return the refusal of a trial whose members cannot be stacked or should not be, or None.

    Members that cannot be stacked train on merged rows if possible.
    """
    reason = one_by_one_reason(work)
    if not reason:
        return None
    merges = work.traits is not None and bool(work.traits.unstackable and work.traits.merges)
    return Refusal(reason, "merged" if merges else "loop")


class Eager(Backend):
    """All members take each step in the same operations on stacked tensors."""

    name = "eager"
    noun = "stacked training"
    in_words = "eagerly"
    adds_pieces = True

    def refuses(self, work: TrialWork) -> Refusal | None:
        return refusal_to_stack(work)

    def make_chunk(
        self, network: Network, validation: Validation, pool: ChunkPool, *, seed: int, horizon: int
    ) -> Chunk:
        return pool.take(network, validation, seed=seed, horizon=horizon, recorded=False)


BACKEND = Eager()
