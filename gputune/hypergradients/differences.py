"""Hypergradients by antithetic finite differences: two more trainings for each hyperparameter, on the same numbers.

With a small step they check the other modes, and serve operations without a second derivative; with a wide one they
see the trend through chaotic training, where the exact derivative is noise (Metz et al. 2021, arXiv:2111.05803).
"""

import torch

from gputune.hypergradients.coordinates import from_coordinate, speed, to_coordinate
from gputune.hypergradients.inner import Tables, Training
from gputune.hypergradients.unrolled import Hypergradients, Watch, train_plainly


def default_width(dtype: torch.dtype) -> float:
    """Return the cube root of the dtype's spacing: where rounding and curvature do equal harm."""
    return float(torch.finfo(dtype).eps ** (1 / 3))


@torch.no_grad()
def differences(
    training: Training,
    optimizer: str,
    tables: Tables,
    wanted: tuple[str, ...],
    *,
    width: float,
    watch: Watch | None = None,
) -> Hypergradients:
    """Return the hypergradients of ``wanted`` from trainings at +-``width`` in the hyperparameter's coordinate.

    Every value must be above 0. ``ratio`` is |weights(+) - weights(-)| / (2 width |weights|) after the last step.
    """
    weights = train_plainly(training, optimizer, tables, watch)
    gradients = {name: torch.zeros_like(tables[name]) for name in wanted}
    ratio = weights.new_zeros(len(weights))
    for name in wanted:
        table = tables[name]
        for s, layer in ((s, layer) for s in range(table.shape[1]) for layer in range(table.shape[2])):
            shift = torch.zeros_like(table)
            shift[:, s, layer] = width
            ends = []
            for sign in (1, -1):
                moved = from_coordinate(name, to_coordinate(name, table) + sign * shift)
                ends.append(train_plainly(training, optimizer, {**tables, name: moved}))
            up, down = (training.validation(end) for end in ends)
            gradients[name][:, s, layer] = (up - down) / (2 * width) / speed(name, table)[:, s, layer]
            apart = (ends[0] - ends[1]).norm(dim=1) / (2 * width * weights.norm(dim=1))
            ratio = torch.maximum(ratio, apart)
    return Hypergradients(training.validation(weights), gradients, ratio, weights)
