"""Optimizers that adapt their learning rate while they train.

Each optimizer uses the slope of the loss in the last lr. After a step w_t = w_{t-1} - lr u_{t-1}
the loss is a function of lr. With the gradient g_t at w_t, its slope is

    dL(w_t)/dlr = -g_t . u_{t-1} = -h_t.

Every step first changes lr according to h_t, and then moves the parameters with the new lr. The
first step has no u, so it does not change lr.

Here u is everything that lr multiplies: momentum, Adam's scaling and decoupled weight decay. L2
weight decay is part of g. The sums run over all parameters of a group, because a group has one
rate.

The docstring of ``SGDHD`` has the three rules.

Sources: "additive" is the rule of Baydin, Cornish, Martinez Rubio, Schmidt and Wood (2018), "Online
learning rate adaptation with hypergradient descent", arXiv:1703.04782. "multiplicative" is the same
rule, made independent of the model's scale. "normalized" is the rule of Chu, Gao, Ye and Udell
(2025), arXiv:2502.11229. For plain gradient descent it divides by |g_{t-1}|^2.

Departure from Baydin et al.: lr does not fall below 0 unless ``lr_min`` is None.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from gputune.ground.errors import InputError, Verbatim, option
from gputune.ground.types import DEFAULTS, ONLINE_RULES

__all__ = ["SGDHD", "AdamHD", "AdamWHD"]

HypergradRule = Literal["multiplicative", "additive", "normalized"]
Group = dict[str, Any]
Tensors = list[Tensor]


class _Online(Optimizer):
    """Base class of optimizers with parameter groups that adapt their ``lr``.

    A subclass computes the direction of a step. If the last step moved a parameter, the parameter's
    state has the step's ``direction``. A group has ``grad_norm``, the norm of its gradient at the
    last step, for the "normalized" rule.
    """

    _decoupled = False  # whether weight decay is part of the direction, not of the gradient

    def __init__(self, params: ParamsT, **defaults: object) -> None:
        for group in params if isinstance(params, list | tuple) else [params]:
            if isinstance(group.get("params") if isinstance(group, dict) else group, nn.Module):
                rule = "must be the parameters of a module"
                remedy = f"Pass {type(self).__name__}(module.parameters())."
                raise InputError("params", rule, got=Verbatim("a module"), remedy=remedy)
        super().__init__(params, {**defaults, "grad_norm": 0.0})

    def _directions(self, group: Group, params: Tensors, grads: Tensors) -> Tensors:
        """Return the directions of this step as new tensors, and update the moments."""
        raise NotImplementedError

    def _gradients(self, group: Group, params: Tensors) -> Tensors:
        """Return the gradients of the parameters, including L2 weight decay.

        The method does not change ``p.grad``.
        """
        grads = [p.grad for p in params if p.grad is not None]
        for grad in grads:
            if grad.layout != torch.strided or grad.is_complex():
                raise InputError(
                    "params",
                    "must have dense, real gradients",
                    got=Verbatim(f"a gradient of {grad.layout} and {grad.dtype}"),
                    remedy="Build an embedding with sparse=False, and a complex parameter from "
                    "torch.view_as_real.",
                )
        decay = group["weight_decay"]
        if self._decoupled or not decay or not grads:
            return grads
        return list(torch._foreach_add(grads, params, alpha=decay))

    def _moments(self, name: str, params: Tensors) -> Tensors:
        """Return the optimizer's state tensor ``name`` of each parameter, which is zero before the
        first step."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, which may have its own hyperparameters.

        Args:
            param_group: A dict with "params" and any of the optimizer's hyperparameters. A missing
                hyperparameter has the optimizer's value.

        Raises:
            InputError: A hyperparameter is out of its range.
        """
        super().add_param_group({**param_group, **_check_group({**self.defaults, **param_group})})

    def load_state_dict(self, state_dict: Group) -> None:
        """Continue, bit for bit, from the state of an optimizer of the same class.

        Args:
            state_dict: The result of ``state_dict()`` of that optimizer.

        Raises:
            InputError: The state belongs to another class.
        """
        # torch itself adds "differentiable" when it loads a state.
        keys = self.defaults.keys() - {"differentiable"}
        lacking = set[str]()
        for group in state_dict["param_groups"]:
            lacking |= keys - group.keys()
        if lacking:
            rule = f"must be the state of {type(self).__name__}"
            got = Verbatim(f"groups without {', '.join(sorted(lacking))}")
            remedy = "Leave out the state of a different optimizer, and pass only the parameters."
            raise InputError("state_dict", rule, got=got, remedy=remedy)
        super().load_state_dict(state_dict)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Adapt the ``lr`` of every parameter group, then take a step with the new ``lr``.

        Args:
            closure: A function that computes the loss and its gradients again, and returns the
                loss; or None.

        Returns:
            The loss of ``closure``, or None without a closure.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = self._gradients(group, params)
            self._adapt(group, params, grads)
            for part in parts_together(list(zip(params, grads)), group["foreach"]):
                moved = [params[i] for i in part]
                downhill = [grads[i] for i in part]
                directions = self._directions(group, moved, downhill)
                torch._foreach_add_(moved, directions, alpha=-group["lr"])
                for p, direction in zip(moved, directions):
                    self.state[p]["direction"] = direction
            for p in group["params"]:
                # Without a gradient the parameter does not move, so it must not contribute to the
                # next h.
                if p.grad is None and p in self.state:
                    self.state[p].pop("direction", None)
        return loss

    def _adapt(self, group: Group, params: Tensors, grads: Tensors) -> None:
        """Change the learning rate of a parameter group by the group's rule.

        All tensors of the group share one rate, and their order does not matter.
        """
        rule = group["rule"]
        lr = group["lr"]
        moved = [p for p in group["params"] if "direction" in self.state.get(p, ())]
        last = {p: self.state[p]["direction"] for p in moved}
        slope = [(g, last[p]) for p, g in zip(params, grads) if p in last]
        if rule == "additive":
            (h,) = sums_of_products([slope], group["foreach"])
            change = share(h, 1.0)
        else:
            squares = [list(zip(tensors, tensors)) for tensors in (grads, last.values())]
            h, grad_square, square = sums_of_products([slope, *squares], group["foreach"])
            grad_norm = math.sqrt(grad_square)
            norm = math.sqrt(square)
            if rule == "multiplicative":
                change = share(lr * h, grad_norm * norm)
            else:
                change = share(h, group["grad_norm"] * norm)
            group["grad_norm"] = grad_norm
        lr += group["hypergrad_lr"] * change
        if group["lr_min"] is not None:
            lr = max(lr, group["lr_min"])
        if group["lr_max"] is not None:
            lr = min(lr, group["lr_max"])
        group["lr"] = float(lr)


class SGDHD(_Online):
    """torch.optim.SGD with a learning rate that adapts itself.

    The optimizer supports heavy-ball and Nesterov momentum.

    After a step w = w - lr u, the loss is a function of lr with the slope -h, where h = g . u is
    the new gradient times the last direction. Every step first changes the learning rate by
    ``rule``, and then moves the parameters:

    - "multiplicative" adds ``lr * hypergrad_lr * h / (|g| |u|)``. ``hypergrad_lr`` is the largest
      relative change of one step.
    - "additive" adds ``hypergrad_lr * h``, the rule of Baydin et al. ``hypergrad_lr`` has the unit
      of lr squared over loss.
    - "normalized" adds ``hypergrad_lr * h / (|last g| |u|)``, the rule of Chu et al.
      ``hypergrad_lr`` has the unit of lr.

    If a norm is zero or not finite, the rate does not change. A parameter without a gradient is
    skipped, and counts as zero in g and u. A scheduler that multiplies the rate (StepLR,
    ExponentialLR) works with this optimizer. A scheduler that sets the rate (LambdaLR, OneCycleLR)
    overwrites the learned rate.

    Use it to repair a rate that is much too small. It does not replace a search for lr: it
    minimizes the loss after one step, and such rates are too small for a long training (Wu et al.,
    2018, arXiv:1803.02021). A rate that is much too large may ruin the parameters before it has
    fallen. The page "Hypergradients" has measurements.

    Sources: Baydin et al. (2018), arXiv:1703.04782; Chu et al. (2025), arXiv:2502.11229.

    Args:
        params: The parameters, or parameter groups, as in torch.optim.SGD.
        lr: The starting rate, > 0 (>= 0 with the other rules). ``param_groups[i]["lr"]`` is the
            current rate, a float.
        hypergrad_lr: The speed at which the rate moves. None means 0.02 with rule="multiplicative",
            for which the range is [0, 1). With 0.02, the rate doubles after 35 steps whose
            directions agree. The other rules depend on the scale of the model and need a finite
            value >= 0.
        rule: "multiplicative" (independent of the model's scale, the default), "additive" or
            "normalized".
        momentum: As in torch.optim.SGD, in [0, 1). Default 0.
        nesterov: As in torch.optim.SGD. Default False.
        weight_decay: L2 weight decay, as in torch.optim.SGD, >= 0. Default 0.
        lr_min: Lower bound of the rate, default 0. With None there is no bound, and the rate may
            become negative.
        lr_max: Upper bound of the rate. None, the default, means no bound.
        foreach: True processes all tensors of a group at once, False one after the other. None
            means True for tensors on a GPU. The results are the same.

    Raises:
        InputError: An argument is out of its range, or, in a step, a gradient is sparse or complex.

    Example:
        >>> import gputune, torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 3)
        >>> module = torch.nn.Linear(3, 1)
        >>> optimizer = gputune.optim.SGDHD(module.parameters(), lr=0.001)
        >>> for step in range(50):
        ...     optimizer.zero_grad()
        ...     loss = ((module(x) - x.sum(1, keepdim=True)) ** 2).mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> optimizer.param_groups[0]["lr"] > 0.001  # it has grown
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        hypergrad_lr: float | None = None,
        rule: HypergradRule = "multiplicative",
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        lr_min: float | None = 0.0,
        lr_max: float | None = None,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(**_arguments(locals()))

    def _directions(self, group: Group, params: Tensors, grads: Tensors) -> Tensors:
        mu = group["momentum"]
        if not mu:
            return list(torch._foreach_mul(grads, 1.0))  # copies, in one launch
        buffers = self._moments("momentum_buffer", params)
        torch._foreach_mul_(buffers, mu)
        torch._foreach_add_(buffers, grads)
        if group["nesterov"]:
            return list(torch._foreach_add(grads, buffers, alpha=mu))
        return list(torch._foreach_mul(buffers, 1.0))


class AdamHD(_Online):
    """torch.optim.Adam with a learning rate that adapts itself.

    Expect a smaller benefit than from ``SGDHD``, because Adam already scales its steps. The page
    "Hypergradients" has measurements.

    Sources: as for ``SGDHD``.

    Args:
        params: The parameters, or parameter groups, as in torch.optim.Adam.
        lr: The starting rate, > 0 (>= 0 with the other rules). Default 1e-3.
        hypergrad_lr: The speed at which the rate moves, as in ``SGDHD``. None means 0.02 with
            rule="multiplicative". The other rules need a value.
        rule: "multiplicative" (the default), "additive" or "normalized", as in ``SGDHD``.
        betas: As in torch.optim.Adam, two numbers in [0, 1). Default (0.9, 0.999).
        eps: As in torch.optim.Adam, >= 0. Default 1e-8.
        weight_decay: L2 weight decay, which is part of the gradient, >= 0. Default 0.
        lr_min: Lower bound of the rate, default 0. None means no bound.
        lr_max: Upper bound of the rate. None, the default, means no bound.
        foreach: True processes all tensors of a group at once, False one after the other. None
            means True for tensors on a GPU.

    Raises:
        InputError: An argument is out of its range, or, in a step, a gradient is sparse or complex.

    Example:
        >>> import gputune, torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 3)
        >>> module = torch.nn.Linear(3, 1)
        >>> optimizer = gputune.optim.AdamHD(module.parameters(), lr=0.001)
        >>> for step in range(50):
        ...     optimizer.zero_grad()
        ...     loss = ((module(x) - x.sum(1, keepdim=True)) ** 2).mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> optimizer.param_groups[0]["lr"] > 0.001  # it has grown
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        hypergrad_lr: float | None = None,
        rule: HypergradRule = "multiplicative",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lr_min: float | None = 0.0,
        lr_max: float | None = None,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(**_arguments(locals()))

    def _directions(self, group: Group, params: Tensors, grads: Tensors) -> Tensors:
        beta1, beta2 = group["betas"]
        steps = []
        for p in params:
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            steps.append(state["step"])
        m = self._moments("exp_avg", params)
        v = self._moments("exp_avg_sq", params)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        # Direction: m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
        denominator = torch._foreach_sqrt(v)
        torch._foreach_div_(denominator, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_mul_(denominator, [1 - beta1**step for step in steps])
        return list(torch._foreach_div(m, denominator))


class AdamWHD(AdamHD):
    """torch.optim.AdamW with a learning rate that adapts itself.

    The decoupled weight decay is part of the direction u. ``AdamWHD`` has the same limits as
    ``AdamHD``.

    Sources: as for ``SGDHD``.

    Args:
        params: The parameters, or parameter groups, as in torch.optim.AdamW.
        lr: The starting rate, > 0 (>= 0 with the other rules). Default 1e-3.
        hypergrad_lr: The speed at which the rate moves, as in ``SGDHD``. None means 0.02 with
            rule="multiplicative". The other rules need a value.
        rule: "multiplicative" (the default), "additive" or "normalized", as in ``SGDHD``.
        betas: As in torch.optim.AdamW, two numbers in [0, 1). Default (0.9, 0.999).
        eps: As in torch.optim.AdamW, >= 0. Default 1e-8.
        weight_decay: Decoupled weight decay, >= 0. Default 0.01.
        lr_min: Lower bound of the rate, default 0. None means no bound.
        lr_max: Upper bound of the rate. None, the default, means no bound.
        foreach: True processes all tensors of a group at once, False one after the other. None
            means True for tensors on a GPU.

    Raises:
        InputError: An argument is out of its range, or, in a step, a gradient is sparse or complex.

    Example:
        >>> import gputune, torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 3)
        >>> module = torch.nn.Linear(3, 1)
        >>> optimizer = gputune.optim.AdamWHD(module.parameters(), lr=0.001)
        >>> for step in range(50):
        ...     optimizer.zero_grad()
        ...     loss = ((module(x) - x.sum(1, keepdim=True)) ** 2).mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> optimizer.param_groups[0]["lr"] > 0.001  # it has grown
        True
    """

    _decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        hypergrad_lr: float | None = None,
        rule: HypergradRule = "multiplicative",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        lr_min: float | None = 0.0,
        lr_max: float | None = None,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(**_arguments(locals()))

    def _directions(self, group: Group, params: Tensors, grads: Tensors) -> Tensors:
        directions = super()._directions(group, params, grads)
        torch._foreach_add_(directions, params, alpha=group["weight_decay"])
        return directions


def _arguments(names: Mapping[str, object]) -> Group:
    """Return the arguments of a constructor call as a dict, from its ``locals()``."""
    return {name: value for name, value in names.items() if name not in ("self", "__class__")}


def _check_group(group: Group) -> Group:
    """Check the hyperparameters of a parameter group, and return them as Python numbers.

    Raises InputError if a hyperparameter is out of range.
    """
    rule = group["rule"]
    if rule not in ONLINE_RULES:
        rules = ", ".join(ONLINE_RULES)
        remedy = f"{ONLINE_RULES[0]!r} does not depend on the scale of the model."
        raise InputError("rule", f"must be one of {rules}", got=rule, remedy=remedy)
    scaled = rule == "multiplicative"
    if group["hypergrad_lr"] is None:
        if not scaled:
            reason = f"with {option('rule', rule)}, because its scale depends on the model"
            remedy = f"Try powers of ten, or use {option('rule', 'multiplicative')}."
            raise InputError("hypergrad_lr", f"must be set {reason}", got=None, remedy=remedy)
        group = {**group, "hypergrad_lr": DEFAULTS["hypergrad_lr"]}
    numbers: Group = {
        "lr": _number(group, "lr", "0.001", low_counts=not scaled),
        # A factor of 0 or below would end the training for good: a multiple of zero stays zero.
        "hypergrad_lr": _number(group, "hypergrad_lr", "0.02", high=1.0 if scaled else math.inf),
        "weight_decay": _number(group, "weight_decay", "0.01"),
    }
    for name in ("lr_min", "lr_max"):
        if group[name] is not None:
            numbers[name] = _number(group, name, "0.1", low=-math.inf)
    if not numbers.get("lr_min", -math.inf) <= numbers["lr"] <= numbers.get("lr_max", math.inf):
        bounds = f"{option('lr_min', group['lr_min'])} and {option('lr_max', group['lr_max'])}"
        rule = f"must be between {bounds}"
        raise InputError("lr", rule, got=numbers["lr"], remedy="None means no bound.")
    if "momentum" in group:
        momentum = _number(group, "momentum", "0.9", high=1.0)
        if group["nesterov"] and not momentum:
            rule = f"must be > 0 with {option('nesterov', True)}"
            raise InputError("momentum", rule, got=0.0, remedy="For example momentum=0.9.")
        return numbers | {"momentum": momentum}
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        remedy = "For example betas=(0.9, 0.999)."
        raise InputError("betas", "must be two numbers in [0, 1)", got=betas, remedy=remedy)
    named = {"betas[0]": betas[0], "betas[1]": betas[1]}
    numbers["betas"] = tuple(_number(named, name, "0.9", high=1.0) for name in named)
    numbers["eps"] = _number(group, "eps", "1e-8")
    return numbers


def _number(
    group: Group,
    name: str,
    example: str,
    *,
    low: float = 0.0,
    high: float = math.inf,
    low_counts: bool = True,
) -> float:
    """Return a hyperparameter as a float, or raise InputError if it is out of range."""
    value = group[name]
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        number = float(value)  # a Fraction just below 1 may round to 1.0
        if number < high and (number >= low if low_counts else number > low):
            return number
    rule = "must be a finite number"
    if low > -math.inf:
        rule = f"{rule} {'>=' if low_counts else '>'} {low:g}"
    if high < math.inf:
        rule = f"{rule} and < {high:g}"
    raise InputError(name, rule, got=value, remedy=f"For example {example}.")


GradientPair = tuple[Tensor, Tensor]


def parts_together(pairs: Sequence[GradientPair], foreach: bool | None) -> list[list[int]]:
    """Group tensors that one PyTorch call can process together, and return the indices of each
    group.

    A group has all tensors of one device and dtype. With ``foreach=False``, each tensor is a
    separate group.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    together = all(x.is_cuda for x, _ in pairs) if foreach is None else foreach
    for place, (x, y) in enumerate(pairs):
        key: Hashable = place
        if together:
            key = (x.device, x.dtype, y.dtype)
        groups[key].append(place)
    return list(groups.values())


def sums_of_products(products: list[list[GradientPair]], foreach: bool | None) -> list[float]:
    """Return the sum of the products of all entries, for each list of tensor pairs."""
    dots: list[Tensor] = []
    owners = []  # the position of each dot's list
    for number, pairs in enumerate(products):
        for part in parts_together(pairs, foreach):
            left = _flat([pairs[place][0] for place in part])
            right = _flat([pairs[place][1] for place in part])
            dots.append(torch.dot(left, right))
            owners.append(number)
    sums = [0.0] * len(products)
    if dots:
        # All sums are transferred in one synchronization with the GPU.
        device = dots[0].device
        values = torch.stack([dot.to(device) for dot in dots]).tolist()
        for number, value in zip(owners, values):
            sums[number] += value
    return sums


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Join the entries of several tensors into one vector, in float32 or a wider dtype."""
    if len(tensors) == 1:
        flat = tensors[0].reshape(-1)
    else:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    # Squares easily leave the range of half precision.
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def share(part: float, whole: float) -> float:
    """Return the quotient part / whole, or 0 if ``whole`` is zero or the quotient is not finite."""
    if not whole > 0:  # also for NaN
        return 0.0
    quotient = part / whole
    return quotient if math.isfinite(quotient) else 0.0
