"""The backend "merged": the user's module runs once on the rows of all members."""

from gputune.engine.backends.base import Backend, Refusal, TrialWork
from gputune.engine.chunk import Chunk
from gputune.engine.reuse import ChunkPool
from gputune.modules.merged import MergedModule
from gputune.optimizers.classes import loop_reason
from gputune.population.kinds import is_module
from gputune.population.population import Network
from gputune.scoring.validation import Validation


class Merged(Backend):
    """All members take each step together, in one call of the user's module."""

    name = "merged"
    noun = "training on merged rows"
    in_words = "on merged rows"
    slower = "loop"
    trains_built_in = False
    module_class = MergedModule

    def refuses(self, work: TrialWork) -> Refusal | None:
        if not is_module(work.kind):
            return Refusal("only your own modules train on merged rows", "eager")
        if work.traits and not work.traits.unstackable:
            return Refusal("only members that cannot be stacked train on merged rows", "eager")
        if work.traits and not work.traits.merges:
            reason = work.traits.unmergeable or "their layers cannot be called for all members"
            return Refusal(f"its members cannot train on merged rows: {reason}", "loop")
        reason = work.traits.slow if work.traits else ""
        reason = reason or loop_reason(work.config)
        return Refusal(reason, "loop") if reason else None

    def make_chunk(
        self, network: Network, validation: Validation, pool: ChunkPool, *, seed: int, horizon: int
    ) -> Chunk:
        return pool.take(network, validation, seed=seed, horizon=horizon, recorded=False)


BACKEND = Merged()
