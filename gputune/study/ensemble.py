"""Several modules of one study as one: the weighted mean of what they predict."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gputune.population.network import class_logits, first_output
from gputune.types import Task


class Ensemble(nn.Module):
    """The weighted mean of the probabilities of its members, as logits; of a regression that of their values.

    ``weights`` (M,) add up to 1. Shape: as each member, inputs -> (B, K).
    """

    weights: Tensor

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[float], task: Task) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float64))
        self.task = task

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        outputs = torch.stack([first_output(member(*inputs, **named)) for member in self.members])
        outputs = class_logits(outputs, self.task, 2)
        weights = self.weights.to(outputs.dtype).view(-1, *[1] * (outputs.dim() - 1))
        if self.task == "regression":
            return (weights * outputs).sum(0)
        if self.task == "multilabel":
            # log p - log (1 - p) of the mean probability p, both as sums in logarithms
            yes, no = (
                (weights.log() + functional.logsigmoid(sign * outputs)).logsumexp(0) for sign in (1, -1)
            )
            return yes - no
        return (weights.log() + outputs.log_softmax(-1)).logsumexp(0)
