"""The backend "recorded": one step of all members is recorded once and replayed."""

from gputune.engine.backends.base import Backend, Machine, Refusal, TrialWork, Unfit
from gputune.engine.backends.eager import refusal_to_stack
from gputune.engine.chunk import Chunk
from gputune.engine.reuse import ChunkPool
from gputune.errors import InputError
from gputune.modules.recorder import RECORDERS, CudaRecorder
from gputune.optimizers.rules import RULES
from gputune.population.population import Network
from gputune.scoring.validation import Validation
from gputune.wording import option


class Recorded(Backend):
    """All members take each step in the same operations, which are recorded once and replayed."""

    name = "recorded"
    noun = "a recorded step"
    in_words = "in recorded steps"
    slower = "eager"
    adds_pieces = True

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

    def make_chunk(
        self, network: Network, validation: Validation, pool: ChunkPool, *, seed: int, horizon: int
    ) -> Chunk:
        return pool.take(network, validation, seed=seed, horizon=horizon, recorded=True)


BACKEND = Recorded()
