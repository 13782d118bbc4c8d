"""What a stopped search goes on from: the checkpoints beside its study, as chunks that have begun."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gputune.engine.checkpoint import Checkpoint, CheckpointFolder
from gputune.engine.job import BegunChunk
from gputune.engine.plan import Plan
from gputune.engine.population import Population
from gputune.study.record import PARTS, SearchRecord
from gputune.study.rows import to_json
from gputune.types import Config


def checkpoint_folder(study: str | Path | None, record: SearchRecord) -> CheckpointFolder | None:
    """Return the folder of a study's checkpoints, ``study.db.state`` beside ``study.db``; None without a study."""
    if study is None:
        return None
    values = {name: getattr(record, name) for name, part in PARTS.items() if part.training}
    text = to_json(values, name="checkpoint")
    return CheckpointFolder(Path(f"{study}.state"), hashlib.sha256(text.encode()).hexdigest())


def with_begun(
    plan: Plan, found: Sequence[Checkpoint], numbers: Sequence[int], configs: Sequence[Config]
) -> Plan:
    """Return a plan whose chunks go on from checkpoints: these come first, in their old company, for the same bits.

    ``numbers`` are those of the plan's trials; a checkpoint with a trial that is not among them is left out.
    """
    place = {number: i for i, number in enumerate(numbers)}
    begun: list[Population] = []
    taken: set[int] = set()
    kind = plan.chunks[0].kind
    for one in found:
        index = tuple(place.get(number, -1) for number in one.trials)
        if min(index) < 0 or taken & set(index):
            continue
        taken |= set(index)
        own = tuple(configs[i] for i in index)
        begun.append(BegunChunk(kind, index, own, one.state, one.alive, one.curves, one.seconds))
    rest = [_without(chunk, taken) for chunk in plan.chunks]
    return replace(plan, chunks=(*begun, *(chunk for chunk in rest if chunk.index)))


def latest(found: Sequence[Checkpoint]) -> dict[int, tuple[Checkpoint, int]]:
    """Return of each trial its furthest checkpoint, and its position there."""
    best: dict[int, tuple[Checkpoint, int]] = {}
    for one in found:
        for position, number in enumerate(one.trials):
            if number not in best or best[number][0].state.epoch < one.state.epoch:
                best[number] = (one, position)
    return best


def _without(chunk: Population, taken: set[int]) -> Population:
    stays = [c for c, i in enumerate(chunk.index) if i not in taken]
    if len(stays) == len(chunk.index):
        return chunk
    return Population(
        chunk.kind, tuple(chunk.index[c] for c in stays), tuple(chunk.configs[c] for c in stays)
    )
