"""Checks that outputs have the form that their loss expects: logits or (log-)probabilities."""

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gputune.ground.errors import InputError, InputWarning, option, warn
from gputune.modules.trace import Args, Function, Kwargs
from gputune.scoring.losses import is_cross_entropy, is_divergence, takes_log_probabilities
from gputune.scoring.objective import Objective


def check_probabilities(name: str, objective: Objective, outputs: Tensor) -> None:
    """Check that a module's outputs in training mode have the form that its loss expects.

    Warns about probabilities if the loss takes logits. Raises InputError if the loss takes
    log-probabilities and the outputs are something else: the loss would then have no lower bound.
    """
    if objective.step is not None:
        return
    has_classes_apart = is_divergence(objective.loss) and outputs.dim() != 2
    is_checked = takes_log_probabilities(objective.loss) and not has_classes_apart
    if is_checked and not are_log_probabilities(outputs):
        kind = "logits"
        softmax = ""
        if are_probabilities(outputs):
            kind = "probabilities"
            softmax = ", without the softmax at its end"
        loss = option("loss=torch.nn.CrossEntropyLoss")
        raise InputError(
            None,
            f"{name} returns {kind}, but {objective.in_words} takes the logarithms of "
            "probabilities",
            remedy=f"Pass {loss}{softmax}, or end the module in log_softmax(1).",
        )
    if (
        is_cross_entropy(objective.loss)
        and outputs.shape[1:] != (1,)
        and are_probabilities(outputs)
    ):
        layer = "softmax"
    elif objective.loss == "bce" and _ends_in_sigmoid(outputs):
        layer = "sigmoid"
    else:
        return
    warn(
        f"{name} returns probabilities, but the cross-entropy takes logits. Leave out the {layer} "
        "at its end.",
        InputWarning,
    )


def are_probabilities(outputs: Tensor) -> bool:
    """Return whether the outputs (B, K) are probabilities: not negative, with the sum 1 per row."""
    real = outputs.dim() == 2 and not outputs.is_complex()
    return real and bool((outputs >= 0).all() and ((outputs.sum(1) - 1).abs() < 1e-3).all())


def are_log_probabilities(outputs: Tensor) -> bool:
    """Return whether outputs (B, K, ...) are log-probabilities: exp(outputs) sums to 1 over
    classes."""
    return outputs.dim() < 2 or bool(((outputs.exp().sum(1) - 1).abs() <= 0.01).all())


def _ends_in_sigmoid(outputs: Tensor) -> bool:
    """Return whether a sigmoid computed the outputs. Views of its result are skipped."""
    node = outputs.grad_fn
    views = ("View", "Squeeze", "Select", "Slice", "Reshape", "UnsafeView", "ToCopy")
    while node is not None and node.name().startswith(views):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("Sigmoid")


_ROUNDING = 1e-3  # the logarithm of a probability of 1 may lie above 0


class LikelihoodWatch(TorchFunctionMode):
    """Watches whether a loss passes logits or probabilities to a function of log-probabilities.

    Outputs count as logits if one row has values above and below 0. Other values pass, even if
    their exponentials do not have the sum 1: a focal loss and a policy gradient weigh the
    log-probabilities of a row.

    Attributes:
        kind: The form that was passed, "logits" or "probabilities"; "" if neither was passed.
        function: The name of the function that received them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = ""
        self.function = ""

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in (functional.nll_loss, functional.kl_div) and not self.kind:
            outputs = args[0] if args else kwargs.get("input")
            self._check(outputs, func)
        return func(*args, **kwargs)

    def _check(self, outputs: object, func: Function) -> None:
        """Note whether a loss received logits or probabilities instead of log-probabilities."""
        if not isinstance(outputs, Tensor) or not outputs.requires_grad or outputs.dim() < 2:
            return
        rows = outputs.detach().flatten(1)
        # (B,): rows with numbers above and below 0, which log-probabilities cannot have
        has_both = (rows > _ROUNDING).any(1) & (rows < -_ROUNDING).any(1)
        if are_probabilities(outputs):
            self.kind = "probabilities"
        elif bool(has_both.any()):
            self.kind = "logits"
        self.function = f"torch.nn.functional.{func.__name__}"
