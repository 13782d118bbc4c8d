"""The backend "compiled": each core trains one member after another in compiled code on a CPU.

The built-in models train in code that comes with gputune. A user's module trains in code that
gputune generates for it, if a timing has shown that this is faster.
"""

import math
from typing import cast

import torch

from gputune.engine.backends.base import Backend, Machine, Refusal, TrialWork, Unfit
from gputune.engine.backends.stacked import refusal_to_stack
from gputune.engine.chunk import Chunk
from gputune.engine.compiled import CompiledChunk
from gputune.engine.members import MemberChunk
from gputune.engine.mlp import StackedMLP
from gputune.engine.reuse import ChunkPool
from gputune.ground.errors import InputError, option
from gputune.modules.module import StackedModule
from gputune.native.library import OPTIMIZERS, NotBuiltError, library
from gputune.optimizers.rules import RULES
from gputune.population.kinds import ModelKind, is_module
from gputune.population.population import Network, beyond_adam
from gputune.scoring.validation import Validation

_DEEPEST = 63  # most hidden layers that the compiled code can hold
# An epoch of compiled members is long compared with the work between two epochs. Large chunks also
# have advantages: the threads of a chunk wait for its longest member once per epoch, the members of
# a chunk share the draws of dropout, and a chunk of a user's module takes some tenths of a second to
# begin.
_CHUNK_BYTES = 256 << 20

_NOT_MEASURED = (
    f"a module trains in compiled code only if {option('backend', 'auto')} has timed it on this "
    "machine"
)


class Compiled(Backend):
    """Members train one after another in compiled code on the cores of a CPU."""

    name = "compiled"
    noun = "compiled code"
    in_words = "in compiled code"
    slower = "recorded"
    is_by_member = True
    shares_threads = True

    def check(self, machine: Machine) -> None:
        if machine.device.type != "cpu":
            raise InputError(
                "backend='compiled'",
                f"trains on the CPU, but the device is {str(machine.device)!r}",
                remedy=f"Choose {option('device', 'cpu')} or {option('backend', 'auto')}.",
            )
        try:
            library(machine.dtype)
        except NotBuiltError as error:
            raise InputError(
                "backend='compiled'",
                f"needs gputune's compiled code, but {error}",
                remedy=f"Or choose {option('backend', 'auto')}, which records steps without it.",
            ) from error

    def unfit(self, machine: Machine) -> Unfit | None:
        if machine.device.type != "cpu":
            return Unfit()
        if is_module(machine.kind):
            return None  # a timing decides for each trial
        if reason := machine.findings.why_not(self.name):
            return Unfit(reason, is_told=True)
        try:
            library(machine.dtype)
        except NotBuiltError as error:
            return Unfit(str(error), is_told=True)
        return None

    def refuses(self, work: TrialWork) -> Refusal | None:
        config = work.config
        if is_module(work.kind):
            if refusal := refusal_to_stack(work):
                return refusal
            if work.traits and work.traits.coded and config["optimizer"] in RULES:
                if work.mixes_sizes:
                    return Refusal("compiled code trains one batch size at a time", "recorded")
                return None
            reason = work.traits.uncoded if work.traits else ""
            return Refusal(reason or _NOT_MEASURED, "recorded")
        if config["optimizer"] not in OPTIMIZERS:
            optimizers = ", ".join(OPTIMIZERS)
            return Refusal(f"compiled code supports only the optimizers {optimizers}", "recorded")
        if config["clip_norm"] != math.inf:
            return Refusal("compiled code does not support clip_norm", "recorded")
        if keys := beyond_adam(config):
            return Refusal(f"compiled code does not support {keys[0]}", "recorded")
        if config["depth"] > _DEEPEST:
            rule = f"compiled code supports at most {_DEEPEST} hidden layers"
            return Refusal(rule, "eager")
        return None

    def chunk_bytes(self, kind: ModelKind, device: torch.device, free: int | None) -> int:
        return _CHUNK_BYTES

    def make_chunk(
        self, network: Network, validation: Validation, pool: ChunkPool, *, seed: int, horizon: int
    ) -> Chunk:
        if not is_module(network.kind):
            return CompiledChunk(cast(StackedMLP, network), validation, seed=seed, horizon=horizon)
        module = cast(StackedModule, network)
        chunk = MemberChunk(
            module, validation, seed=seed, horizon=horizon, code=pool.code_of(module)
        )
        pool.keep_code(module, chunk.code)
        return chunk


COMPILED = Compiled()
