"""Training losses of all members at once, with their gradient in the outputs written out by hand.

A minibatch's loss is ``sum(weight * loss) / sum(weight)`` over its rows: cross-entropy for classes, squared
error for regression, as ``torch.nn.functional.cross_entropy`` and ``mse_loss`` define them.
"""

import torch
from torch import Tensor
from torch.nn import functional

# With fewer classes than fill a vector register, torch's softmax on a CPU goes one number at a time: 7 times slower.
_FULL_REGISTER = 16
_FEW = 4096  # numbers, of which one operation costs less than the five that go around it


def cross_entropy_slope_(logits: Tensor, onehot: Tensor, share: Tensor | float) -> Tensor:
    """Turn logits (..., B, K) into the slope of the loss in them, in place.

    ``onehot`` (..., B, K) is the target, ``share`` (..., B, 1) each row's weight over the sum of weights (a
    float where all are equal). Source: d/dz of -log softmax(z)[y] is softmax(z) - onehot(y). Classes that take
    no part carry a logit of -inf and get slope 0.
    """
    return _softmax_(logits).sub_(onehot).mul_(share)


def _softmax_(logits: Tensor) -> Tensor:
    if logits.device.type != "cpu" or logits.shape[-1] >= _FULL_REGISTER:
        return torch.softmax(logits, -1, out=logits)
    logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    return logits.div_(logits.sum(-1, keepdim=True))


def squared_error_slope_(outputs: Tensor, y: Tensor, share: Tensor | float) -> Tensor:
    """Turn outputs (..., B, 1) into the slope of the squared error in them, in place: 2 (output - y) share."""
    return outputs.sub_(y).mul_(share).mul_(2)


def row_losses(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each row, (..., B), of outputs (..., B, K), twice differentiable.

    y (..., B) is codes (classes) or values. A class that takes no part has the output -inf.
    """
    if y.is_floating_point():
        return (outputs.squeeze(-1) - y) ** 2
    y = y.expand(outputs.shape[:-1])
    if outputs.device.type != "cpu" or outputs.shape[-1] >= _FULL_REGISTER or outputs.numel() < _FEW:
        flat = functional.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="none")
        return flat.view(y.shape)
    shifted = outputs - outputs.detach().amax(-1, keepdim=True)
    picked = shifted.gather(-1, y[..., None]).squeeze(-1)
    return shifted.exp().sum(-1).log() - picked
