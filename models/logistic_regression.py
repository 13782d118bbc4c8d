"""The linear model: one linear layer. Its softmax (or sigmoid) is in the loss, outside of the module."""

from torch import Tensor, nn

from .stacked import check_size, linear, plain_member


class LogisticRegression(nn.Module):
    """Logistic regression (multinomial for more than two outputs), or linear regression for one output.

    Shape: ``(B, D) -> (B, K)`` logits. With ``members=P`` the parameters carry a leading member axis and the
    shape is ``(P, B, D) -> (P, B, K)``; ``member(p)`` gives back the plain module of one member.
    """

    def __init__(self, n_features: int, n_outputs: int, *, members: int | None = None) -> None:
        super().__init__()
        check_size("n_features", n_features, 0)
        check_size("n_outputs", n_outputs, 1)
        if members is not None:
            check_size("members", members, 1)
        self.n_features, self.n_outputs = n_features, n_outputs
        self.layers = nn.ModuleList([linear(n_features, n_outputs, members)])

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers[0](x)
        return output

    def member(self, p: int) -> "LogisticRegression":
        """Return member p as a plain module that holds copies of its parameters."""
        plain = LogisticRegression(self.n_features, self.n_outputs)
        plain.layers = nn.ModuleList([plain_member(self.layers[0], p)])
        return plain.train(self.training)
