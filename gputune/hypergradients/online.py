"""Optimizers that adapt their learning rate while they run, by the slope of the loss in the rate of
the last step.

After a step w_t = w_{t-1} - lr u_{t-1} the loss is a function of lr, and with the gradient g_t at
w_t its slope is dL(w_t)/dlr = -g_t . u_{t-1} = -h_t. Every step first moves lr by what h_t says,
then goes with it. The first step has no u, and leaves lr. Here u is all that lr multiplies
(momentum, Adam's scaling, decoupled weight decay), and L2 weight decay is part of g. The sums run
over all parameters of a group, which has one rate.

rule                change of lr                            hypergrad_lr is
"multiplicative"    lr * hypergrad_lr * h / (|g_t| |u|)     the largest relative change of lr in one step
"additive"          hypergrad_lr * h                        in units of lr squared over loss
"normalized"        hypergrad_lr * h / (|g_{t-1}| |u|)      in units of lr

Sources: "additive" is Baydin, Cornish, Martinez Rubio, Schmidt and Wood (2018), "Online learning
rate adaptation with hypergradient descent", arXiv:1703.04782, and "multiplicative" the same made
free of scale; "normalized" is Chu, Gao, Ye and Udell (2025), arXiv:2502.11229, as for plain
gradient descent it divides by |g_{t-1}|^2. Departure from the
first: lr does not fall below 0 unless ``lr_min`` is None.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from gputune.errors import InputError
from gputune.types import DEFAULTS, ONLINE_RULES

__all__ = ["SGDHD", "AdamHD", "AdamWHD"]

Rule = Literal["multiplicative", "additive", "normalized"]
Group = dict[str, Any]
Pair = tuple[Tensor, Tensor]


class _Online(Optimizer):
    """A descent whose groups adapt their ``lr``; a subclass says in which direction it goes.

    The state of a parameter has its ``direction`` of the last step, if that step moved it. A group
    has
    ``grad_norm``, the norm of its gradient at the last step, for the rule that divides by it.
    """

    _decoupled = False  # whether weight decay is part of the direction, not of the gradient

    def __init__(self, params: ParamsT, **defaults: object) -> None:
        groups = params if isinstance(params, list | tuple) else [params]
        if any(
            isinstance(g.get("params") if isinstance(g, dict) else g, nn.Module) for g in groups
        ):
            raise InputError(
                "params must be the parameters of a module, got a module: "
                f"{type(self).__name__}(module.parameters())."
            )
        super().__init__(params, {**defaults, "grad_norm": 0.0})

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """Return the directions u of this step in tensors of their own; the moments move."""
        raise NotImplementedError

    def _gradients(self, group: Group, params: list[Tensor]) -> list[Tensor]:
        """Return the gradients that h is made of, L2 weight decay included; ``p.grad`` stays as it
        is."""
        grads = [p.grad for p in params if p.grad is not None]
        for grad in grads:
            if grad.layout != torch.strided or grad.is_complex():
                raise InputError(
                    f"params must have dense, real gradients, got one of {grad.layout} and "
                    f"{grad.dtype}. Build an embedding with sparse=False, and a complex parameter "
                    "from torch.view_as_real."
                )
        decay = 0 if self._decoupled else group["weight_decay"]
        return list(torch._foreach_add(grads, params, alpha=decay)) if decay and grads else grads

    def _moments(self, name: str, params: list[Tensor]) -> list[Tensor]:
        """Return the tensors of one name in the state, zero before the first step."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with hyperparameters of their own where they are given. Raises
        InputError."""
        super().add_param_group({**param_group, **_check_group({**self.defaults, **param_group})})

    def load_state_dict(self, state_dict: Group) -> None:
        """Go on, bit for bit, where an optimizer of the same class was. Raises InputError for
        another class."""
        keys = self.defaults.keys() - {"differentiable"}  # which torch adds of itself when it loads
        if lacking := sorted(
            {key for group in state_dict["param_groups"] for key in keys - group.keys()}
        ):
            raise InputError(
                f"state_dict must be one of {type(self).__name__}, got groups without "
                f"{', '.join(lacking)}. Leave the state of another optimizer out; the parameters "
                "are all that this one needs."
            )
        super().load_state_dict(state_dict)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Adapt the ``lr`` of every group, then go with it; ``closure`` computes the loss anew and
        returns it."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = self._gradients(group, params)
            self._adapt(group, params, grads)
            for part in _parts(list(zip(params, grads)), group["foreach"]):
                moved = [params[i] for i in part]
                downhill = [grads[i] for i in part]
                directions = self._directions(group, moved, downhill)
                torch._foreach_add_(moved, directions, alpha=-group["lr"])
                for p, direction in zip(moved, directions):
                    self.state[p]["direction"] = direction
            for p in group["params"]:
                # it stays where it is, so the next h has no part of it
                if p.grad is None and p in self.state:
                    self.state[p].pop("direction", None)
        return loss

    def _adapt(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Move the rate of a group by its rule: one rate for all its tensors, whatever their
        order."""
        rule = group["rule"]
        lr = group["lr"]
        moved = [p for p in group["params"] if "direction" in self.state.get(p, ())]
        last = {p: self.state[p]["direction"] for p in moved}
        slope = [(g, last[p]) for p, g in zip(params, grads) if p in last]
        squares = (
            [[(g, g) for g in grads], [(u, u) for u in last.values()]] if rule != "additive" else []
        )
        h, *both = _sums([slope, *squares], group["foreach"])
        if rule == "additive":
            change = _share(h, 1.0)
        else:
            grad_norm, norm = map(math.sqrt, both)
            part, length = (
                (lr * h, grad_norm) if rule == "multiplicative" else (h, group["grad_norm"])
            )
            change = _share(part, length * norm)
            group["grad_norm"] = grad_norm
        lr += group["hypergrad_lr"] * change
        lr = lr if group["lr_min"] is None else max(lr, group["lr_min"])
        group["lr"] = float(lr if group["lr_max"] is None else min(lr, group["lr_max"]))


class SGDHD(_Online):
    """torch.optim.SGD, heavy-ball and Nesterov momentum included, with a learning rate that adapts
    itself.

    lr: where the rate begins, > 0 (>= 0 with the other rules); ``param_groups[i]["lr"]`` is the
        present one, a float.
    hypergrad_lr: how fast it moves, see the module's table. None is 0.02 with rule="multiplicative"
    (in [0, 1)): 35 steps that agree double the rate. The other rules depend on the scale of the
    model and need a value.
    rule: "multiplicative", which is free of scale, "additive" or "normalized".
    momentum, nesterov, weight_decay (L2): as in torch.optim.SGD.
    lr_min, lr_max: bounds of the rate; None is no bound, and then the rate may become negative.
    foreach: all tensors of a group at once (None: if they are on a GPU) or one after the other; the
        same numbers.

    A norm of zero, or one that is not finite, leaves the rate. A parameter without gradient is
    skipped, and counts as zero in g and u. A scheduler that multiplies the rate (StepLR,
    ExponentialLR) goes well with it; one that sets it (LambdaLR, OneCycleLR) overwrites what was
    learnt. Raises InputError, also at a sparse or complex gradient.

    What it can do is to repair a rate that is much too small. On digits (64-64-64-10, ReLU, batches
    of 32, 30 epochs, mean of two seeds) the lowest validation loss from lr = 0.001, 0.01, 0.1, 0.5
    is 0.365, 0.203, 0.151, 0.097; at constant rates 2.287, 1.325, 0.115, 0.074. So it does not
    replace a search of lr:

    - It is greedy: it asks for the best loss after one step, and such rates are too small for a
      long training (Wu, Ren, Liao and Grosse, 2018, arXiv:1803.02021). Above, the rate that began
      at 0.1 ended at 0.023, and with hypergrad_lr=0.05 at 0.010.
    - With rule="additive" hypergrad_lr must be tuned for every model, since h is a sum over all its
      parameters.
    - A rate that is much too large may ruin the parameters before it has fallen: above, from lr = 2
      the loss is 2.209.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        hypergrad_lr: float | None = None,
        rule: Rule = "multiplicative",
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        lr_min: float | None = 0.0,
        lr_max: float | None = None,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(**_arguments(locals()))

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        if not (mu := group["momentum"]):
            return list(torch._foreach_mul(grads, 1.0))  # copies, in one launch
        buffers = self._moments("momentum_buffer", params)
        torch._foreach_mul_(buffers, mu)
        torch._foreach_add_(buffers, grads)
        if group["nesterov"]:
            return list(torch._foreach_add(grads, buffers, alpha=mu))
        return list(torch._foreach_mul(buffers, 1.0))


class AdamHD(_Online):
    """torch.optim.Adam with a learning rate that adapts itself; ``weight_decay`` is L2, in the
    gradient.

    hypergrad_lr, rule, lr_min, lr_max, foreach: as for SGDHD, with its warnings. Raises InputError
    as it does.

    Expect less than from SGDHD: Adam scales its steps already. In the runs that the paper's authors
    published, logistic regression on MNIST has a validation loss of 0.2723 after ten epochs, and
    0.2719 with Adam. On the digits of SGDHD's docstring it ends at 0.141, 0.118, 0.091, 0.080 from
    lr = 1e-5, 1e-4, 1e-3, 1e-2; at constant rates 2.247, 0.556, 0.104, 0.076.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        hypergrad_lr: float | None = None,
        rule: Rule = "multiplicative",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lr_min: float | None = 0.0,
        lr_max: float | None = None,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(**_arguments(locals()))

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        (beta1, beta2), states = group["betas"], [self.state[p] for p in params]
        for state in states:
            state["step"] = state.get("step", 0) + 1
        m = self._moments("exp_avg", params)
        v = self._moments("exp_avg_sq", params)
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        # m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
        below = torch._foreach_sqrt(v)
        torch._foreach_div_(below, [math.sqrt(1 - beta2 ** state["step"]) for state in states])
        torch._foreach_add_(below, group["eps"])
        torch._foreach_mul_(below, [1 - beta1 ** state["step"] for state in states])
        return list(torch._foreach_div(m, below))


class AdamWHD(AdamHD):
    """torch.optim.AdamW with a learning rate that adapts itself: the decay, decoupled, is part of
    the direction u.

    The arguments are those of AdamHD, and so is what it can do: on the same digits it ends at
    0.142, 0.117, 0.091, 0.074 from lr = 1e-5, 1e-4, 1e-3, 1e-2; at constant rates 2.247, 0.557,
    0.105, 0.068.
    """

    _decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        hypergrad_lr: float | None = None,
        rule: Rule = "multiplicative",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        lr_min: float | None = 0.0,
        lr_max: float | None = None,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(**_arguments(locals()))

    def _directions(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        directions = super()._directions(group, params, grads)
        torch._foreach_add_(directions, params, alpha=group["weight_decay"])
        return directions


def _arguments(names: Mapping[str, object]) -> Group:
    """Return what a constructor was called with, of its local names."""
    return {name: value for name, value in names.items() if name not in ("self", "__class__")}


def _check_group(group: Group) -> Group:
    """Return the hyperparameters of a group in Python's own numbers; raise InputError where one is
    out of range."""
    rule = group["rule"]
    if rule not in ONLINE_RULES:
        raise InputError(
            f"rule must be one of {', '.join(ONLINE_RULES)}, got {rule!r}. The scale-free one is "
            f"{ONLINE_RULES[0]!r}."
        )
    scaled = rule == "multiplicative"
    if group["hypergrad_lr"] is None:
        if not scaled:
            raise InputError(
                f"hypergrad_lr must be given with rule={rule!r}, whose unit depends on the model, "
                "got None. Try powers of ten, or use rule='multiplicative'."
            )
        group = {**group, "hypergrad_lr": DEFAULTS["hypergrad_lr"]}
    numbers: Group = {
        "lr": _number(group, "lr", "0.001", low_counts=not scaled),
        # A factor of 0 or below would end the training for good: a multiple of zero stays zero.
        "hypergrad_lr": _number(group, "hypergrad_lr", "0.02", high=1.0 if scaled else math.inf),
        "weight_decay": _number(group, "weight_decay", "0.01"),
    }
    for name in ("lr_min", "lr_max"):
        numbers |= {} if group[name] is None else {name: _number(group, name, "0.1", low=-math.inf)}
    if not numbers.get("lr_min", -math.inf) <= numbers["lr"] <= numbers.get("lr_max", math.inf):
        raise InputError(
            f"lr must be within lr_min and lr_max, got lr={numbers['lr']}, "
            f"lr_min={group['lr_min']}, lr_max={group['lr_max']}. Begin with a rate between them; "
            "None is no bound."
        )
    if "momentum" in group:
        momentum = _number(group, "momentum", "0.9", high=1.0)
        if group["nesterov"] and not momentum:
            raise InputError(
                "momentum must be > 0 with nesterov=True, got 0.0. For example momentum=0.9."
            )
        return numbers | {"momentum": momentum}
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise InputError(
            f"betas must be two numbers in [0, 1), got {betas!r}. For example betas=(0.9, 0.999)."
        )
    named = {f"betas[{i}]": beta for i, beta in enumerate(betas)}
    betas = tuple(_number(named, name, "0.9", high=1.0) for name in named)
    return numbers | {"betas": betas, "eps": _number(group, "eps", "1e-8")}


def _number(
    group: Group,
    name: str,
    example: str,
    *,
    low: float = 0.0,
    high: float = math.inf,
    low_counts: bool = True,
) -> float:
    value = group[name]
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        number = float(value)  # a fraction below 1 may round to it
        if number < high and (number >= low if low_counts else number > low):
            return number
    least = "" if low == -math.inf else f" >= {low:g}" if low_counts else f" > {low:g}"
    most = "" if high == math.inf else f" and < {high:g}"
    raise InputError(
        f"{name} must be a finite number{least}{most}, got {value!r}. For example {example}."
    )


def _parts(pairs: Sequence[Pair], foreach: bool | None) -> list[list[int]]:
    """Return the positions of what is worked on at once: all of one device and dtype, or each
    tensor alone."""
    alike = defaultdict(list)
    together = all(x.is_cuda for x, _ in pairs) if foreach is None else foreach
    for i, (x, y) in enumerate(pairs):
        alike[(x.device, x.dtype, y.dtype) if together else i].append(i)
    return list(alike.values())


def _sums(products: list[list[Pair]], foreach: bool | None) -> list[float]:
    """Return, for each list of pairs of tensors, the sum of the products of all their entries."""
    parts = [
        [zip(*(pairs[i] for i in part)) for part in _parts(pairs, foreach)] for pairs in products
    ]
    dots = [[torch.dot(*map(_flat, part)) for part in group] for group in parts]
    every = [dot for group in dots for dot in group]
    # one sync
    values = iter(torch.stack([dot.to(every[0].device) for dot in every]).tolist() if every else [])
    return [sum(next(values) for _ in group) for group in dots]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    flat = (
        tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])
    )
    # Squares soon leave the range of half precision.
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def _share(part: float, whole: float) -> float:
    """Return part / whole, or 0 where nothing can be said: a norm of zero, or one that is no longer
    finite."""
    return share if whole > 0 and math.isfinite(share := part / whole) else 0.0
