"""The backend "kernel": each thread block of a GPU trains one member after another."""

from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import cast

import torch

from gputune.data.dataset import Dataset
from gputune.engine.backends.base import Backend, Machine, Refusal, TrialWork, Unfit
from gputune.engine.chunk import Chunk
from gputune.engine.kernel import KernelChunk, compiled, kernel_of, lacks, obstacle
from gputune.engine.mlp import StackedMLP
from gputune.engine.reuse import ChunkPool
from gputune.ground.errors import InputError, option
from gputune.ground.types import Config, Say
from gputune.native.library import NotBuiltError
from gputune.population.kinds import ModelKind, is_module
from gputune.population.population import Network
from gputune.scoring.validation import Validation

_BUILT_IN = "supports only the built-in MLP and linear models"


class KernelBackend(Backend):
    """Members train one after another in the thread blocks of a CUDA kernel."""

    name = "kernel"
    noun = "the kernel"
    in_words = "in a kernel"
    slower = "recorded"
    is_by_member = True

    @property
    def failure(self) -> str:
        return KernelChunk.failure

    def check(self, machine: Machine) -> None:
        error = obstacle(machine.device)
        if error is not None:
            raise error

    def unfit(self, machine: Machine) -> Unfit | None:
        if machine.device.type != "cuda":
            return Unfit()
        if is_module(machine.kind):
            return Unfit(f"{self.noun} {_BUILT_IN}")
        if machine.dtype != torch.float32:
            return Unfit("the kernel is chosen only for float32")
        findings = machine.findings
        if findings.failed is None:
            return Unfit("gputune check has not checked the kernel on this device")
        if reason := findings.why_not(self.name):
            return Unfit(reason)
        if findings.fastest() != self.name:
            return Unfit("gputune check has not measured that the kernel is the fastest")
        return None

    def refuses(self, work: TrialWork) -> Refusal | None:
        if is_module(work.kind):
            return Refusal(f"{self.noun} {_BUILT_IN}", "recorded")
        assert work.data is not None
        if KernelChunk.failure:
            return Refusal(KernelChunk.failure.rstrip("."), "recorded")
        part = lacks(work.config, work.kind, work.data)
        return Refusal(f"the kernel does not support {part}", "recorded") if part else None

    def check_search(
        self, configs: Sequence[Config], kind: ModelKind, data: Dataset, cluster: str
    ) -> None:
        if cluster:
            workers = option("workers", cluster)
            rule = f"is for a GPU of this machine, but {workers} trains on others"
        elif is_module(kind):
            rule = f"{_BUILT_IN}, but this is your own module"
        else:
            parts = [lacks(config, kind, data) for config in configs]
            if not configs or not all(parts):
                return
            rule = f"does not support {parts[0]}"
        recorded = option("backend", "recorded")
        remedy = f"Choose {recorded}, which records steps, or {option('backend', 'auto')}."
        raise InputError("backend='kernel'", rule, remedy=remedy)

    def prepare(self, configs: Sequence[Config], kind: ModelKind, data: Dataset, say: Say) -> None:
        supported = [config for config in configs if not lacks(config, kind, data)]
        with suppress(NotBuiltError):  # a warning was already shown
            kernels = [kernel_of([config], kind, data) for config in supported]
            for kernel in dict.fromkeys(kernels):
                compiled(kernel, data.device, say)

    def separate_steps(self, work: TrialWork) -> Hashable:
        # Members that train in the same kernel share the tile size, which decides the order of
        # sums. So the other members of a chunk change no bits.
        assert work.data is not None
        return kernel_of([work.config], work.kind, work.data)

    def make_chunk(
        self, network: Network, validation: Validation, pool: ChunkPool, *, seed: int, horizon: int
    ) -> Chunk:
        return KernelChunk(cast(StackedMLP, network), validation, seed=seed, horizon=horizon)


KERNEL = KernelBackend()
