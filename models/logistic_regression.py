"""The linear model: one linear layer.

The softmax or sigmoid is part of the loss, not of the module.
"""

from torch import Tensor, nn

from .layers import check_size


class LogisticRegression(nn.Module):
    """Logistic regression (multinomial for more than two outputs), or linear regression for one
    output.

    ``gputune.tune("logistic", ...)`` solves the regression for each C instead of training it. Use
    the class to train it in your own loop, or with ``gputune.hypergradient(optimizer="exact")``.

    Shape: ``(B, D) -> (B, K)`` logits.

    Args:
        n_features: number of inputs D, at least 0.
        n_outputs: number of outputs K, at least 1.

    Raises:
        ValueError: a size is out of range.

    Example:
        >>> import gputune, torch
        >>> model = gputune.models.LogisticRegression(4, 3)
        >>> model(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, n_features: int, n_outputs: int) -> None:
        super().__init__()
        check_size("n_features", n_features, 0)
        check_size("n_outputs", n_outputs, 1)
        self.n_features = n_features
        self.n_outputs = n_outputs
        self.layers = nn.ModuleList([nn.Linear(n_features, n_outputs)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K) for inputs (B, D)."""
        output: Tensor = self.layers[0](x)
        return output
