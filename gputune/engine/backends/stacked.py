"""The backends that train members with PyTorch: recorded, eager, merged and loop."""

from typing import cast

from gputune.engine.backends.base import Backend, Machine, Refusal, TrialWork, Unfit
from gputune.engine.backends.cost import Cost, TrialSizes, one_by_one_cost
from gputune.engine.chunk import Chunk
from gputune.engine.reuse import ChunkPool
from gputune.ground.errors import InputError, option
from gputune.modules.looped import LoopChunk, LoopedModule
from gputune.modules.merged import MergedModule
from gputune.modules.recorder import RECORDERS, CudaRecorder
from gputune.optimizers.classes import loop_reason
from gputune.optimizers.rules import RULES
from gputune.population.kinds import is_module
from gputune.population.population import Network
from gputune.scoring.validation import Validation


class Recorded(Backend):
    """All members take each step in the same operations, which are recorded once and replayed."""

    name = "recorded"
    noun = "a recorded step"
    in_words = "in recorded steps"
    slower = "eager"

    @property
    def failure(self) -> str:
        return CudaRecorder.failure

    def check(self, machine: Machine) -> None:
        if machine.device.type not in RECORDERS:
            raise InputError(
                "backend='recorded'",
                f"records steps on a CPU or a CUDA device, but the device is {str(machine.device)!r}",
                remedy=f"Choose one of these devices, or {option('backend', 'auto')}.",
            )

    def unfit(self, machine: Machine) -> Unfit | None:
        if machine.device.type not in RECORDERS:
            return Unfit()
        # On a CPU these findings do not decide: recorded steps are compiled there.
        if machine.device.type != "cuda":
            return None
        if reason := machine.findings.why_not(self.name):
            return Unfit(reason, is_told=True)
        seconds = machine.findings.seconds()
        if self.name in seconds and seconds.get("eager", seconds[self.name]) < seconds[self.name]:
            return Unfit("gputune check has measured that eager steps are faster")
        return None

    def refuses(self, work: TrialWork) -> Refusal | None:
        if refusal := refusal_to_stack(work):
            return refusal
        optimizer = work.config["optimizer"]
        if CudaRecorder.failure and work.is_on_gpu:
            return Refusal(CudaRecorder.failure.rstrip("."), "eager")
        if optimizer not in RULES:
            return Refusal(f"steps of the optimizer {optimizer!r} cannot be recorded", "eager")
        return None


class Eager(Backend):
    """All members take each step in the same operations on stacked tensors."""

    name = "eager"
    noun = "stacked training"
    in_words = "eagerly"

    def refuses(self, work: TrialWork) -> Refusal | None:
        return refusal_to_stack(work)


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
        reason = _slow_reason(work)
        return Refusal(reason, "loop") if reason else None


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


def refusal_to_stack(work: TrialWork) -> Refusal | None:
    """Return why the members of a trial are not stacked, or None if they are stacked.

    Members that cannot be stacked train on merged rows if possible.
    """
    if not is_module(work.kind):
        return None
    traits = work.traits
    if traits and traits.unstackable:
        reason = f"its members cannot be stacked: {traits.unstackable}"
        return Refusal(reason, "merged" if traits.merges else "loop")
    reason = _slow_reason(work)
    return Refusal(reason, "loop") if reason else None


def _slow_reason(work: TrialWork) -> str:
    """Return the reason why the members of a trial should train one by one, or ""."""
    slow = work.traits.slow if work.traits else ""
    return slow or loop_reason(work.config)


RECORDED = Recorded()
EAGER = Eager()
MERGED = Merged()
LOOP = Loop()
