"""Check if the gradients of a minibatch's pieces add up to the gradient of the minibatch.

Trials with different batch sizes then train together (``population/pieces.py``).
"""

from torch import Tensor

from gputune.modules.adapters import member_buffers
from gputune.modules.module_trial import ModuleTrial, is_close
from gputune.population.traits import Traits


def why_indivisible(trial: ModuleTrial, traits: Traits, outputs: Tensor) -> str:
    """Return the property of a module that excludes pieces of minibatches, as a clause, or "".

    ``outputs`` are the module's outputs in training for all tried rows.
    """
    changing = set(traits.changing) - set(member_buffers(trial.module))
    if traits.draws:
        return "the module draws random numbers in training"
    if trial.objective.augment is not None:
        return "augment changes whole minibatches"
    if not trial.objective.is_named:
        return "only losses with a name are added up over pieces of a minibatch"
    if changing:
        return f"a training step of the module changes {min(changing)!r}"
    if traits.branches:
        return "the module branches on a tensor's value"
    if traits.least_rows > 1 or not traits.alone:
        return "a row may affect the outputs of other rows"
    few = trial.forward(trial.rows(slice(2)), training=True)
    return "" if is_close(few, outputs[:2]) else "a row may affect the outputs of other rows"
