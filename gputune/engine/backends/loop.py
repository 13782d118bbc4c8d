"""The backend "loop": plain modules train one after another, each in a plain PyTorch loop."""

from typing import cast

from gputune.engine.backends.base import Backend, Refusal, TrialWork
from gputune.engine.backends.cost import Cost, TrialSizes, one_by_one_cost
from gputune.engine.chunk import Chunk
from gputune.engine.reuse import ChunkPool
from gputune.modules.loop_chunk import LoopChunk
from gputune.modules.looped import LoopedModule
from gputune.population.kinds import is_module
from gputune.population.population import Network
from gputune.scoring.validation import Validation


class Loop(Backend):
    """The members of a user's module train one after another."""

    name = "loop"
    noun = "a plain loop"
    in_words = "one by one"
    trains_built_in = False
    takes_single_trials = True
    module_class = LoopedModule

    def refuses(self, work: TrialWork) -> Refusal | None:
        if is_module(work.kind):
            return None
        return Refusal("a plain loop trains only your own modules", "eager")

    def cost(self, sizes: TrialSizes) -> Cost:
        return one_by_one_cost(sizes)

    def make_chunk(
        self, network: Network, validation: Validation, pool: ChunkPool, *, seed: int, horizon: int
    ) -> Chunk:
        return LoopChunk(cast(LoopedModule, network), validation, seed=seed, horizon=horizon)


BACKEND = Loop()
