"""A chunk that does not fit into memory is halved and run again; a trial that does not fit alone is given up."""

import gc
from dataclasses import dataclass

import numpy as np
import torch

from gputune.data.dataset import Dataset
from gputune.engine.chunk import Job, Outcome, Progress
from gputune.engine.population import Population
from gputune.errors import TOO_BIG

# What torch says in a plain RuntimeError: its allocator on the CPU, and cuDNN where it finds no room to work in.
_TEXTS = ("can't allocate memory", "CUDNN_STATUS_NOT_SUPPORTED")


@dataclass(frozen=True)
class GivenUp:
    """A trial (its place in the search) that cannot be trained, and why."""

    index: tuple[int]
    reason: str


class DoesNotFit(GivenUp):
    """A trial that does not fit into memory even alone, and what was said."""


def run_in_parts(
    job: Job, data: Dataset, chunk: Population, progress: Progress | None = None
) -> list[Outcome | GivenUp]:
    """Train one chunk, in as many parts as the memory makes necessary.

    Parts that have not begun when training is over are left out.
    """
    waiting, done = [chunk], list[Outcome | GivenUp]()
    while waiting and not (done and job.is_over()):
        part = waiting.pop()
        if (most := job.fits.most(part)) < len(part.index):
            waiting += [part.part(most, len(part.index)), part.part(0, most)]
            continue
        outcome = _attempt(job, data, part, progress)
        if not isinstance(outcome, str):
            done.append(outcome)
            continue
        # Only here, where the error and the frames that it holds are gone, is there anything to free.
        gc.collect()
        if data.device.type == "cuda":
            torch.cuda.empty_cache()
        job.fits.refused(part)
        if len(part.index) == 1:
            done.append(DoesNotFit((part.index[0],), outcome))
        else:
            waiting.append(part)
    return done


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on the device or on the host.

    A graph that ends with such an error may say only that it failed; why is then the error before it.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)


def _attempt(job: Job, data: Dataset, chunk: Population, progress: Progress | None) -> Outcome | str:
    """Train a chunk; where memory runs out, take back what was told of it and return the reason."""
    told = 0

    def tell(trial_epochs: int, curves: np.ndarray) -> None:
        nonlocal told
        told += trial_epochs
        if progress is not None:
            progress(trial_epochs, curves)

    try:
        return job.run(data, chunk, tell)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"{TOO_BIG}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if progress is not None and told:
        progress(-told, np.full((1, 1, 1), np.nan))
    return reason
