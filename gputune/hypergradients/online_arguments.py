"""The arguments of the online optimizers, checked: numbers in their range, one rule, bounds that hold the rate."""

import math
from numbers import Real
from typing import Any

from gputune.errors import InputError
from gputune.types import DEFAULTS, ONLINE_RULES

Group = dict[str, Any]


def checked(group: Group) -> Group:
    """Return the hyperparameters of a group in Python's own numbers; raise InputError where one is out of range."""
    rule = group["rule"]
    if rule not in ONLINE_RULES:
        raise InputError(
            f"rule must be one of {', '.join(ONLINE_RULES)}, got {rule!r}. The scale-free one is {ONLINE_RULES[0]!r}."
        )
    scaled = rule == "multiplicative"
    checked = {
        "lr": _number(group, "lr", "0.001", low_counts=not scaled),
        "hypergrad_lr": _hypergrad_lr(group, scaled),
        "weight_decay": _number(group, "weight_decay", "0.01"),
        **{
            key: _number(group, key, "0.1", low=-math.inf)
            for key in ("lr_min", "lr_max")
            if group[key] is not None
        },
    }
    low, high = checked.get("lr_min", -math.inf), checked.get("lr_max", math.inf)
    if not low <= checked["lr"] <= high:
        raise InputError(
            f"lr must be within lr_min and lr_max, got lr={checked['lr']}, lr_min={group['lr_min']}, "
            f"lr_max={group['lr_max']}. Begin with a rate between them; None is no bound."
        )
    return checked | (_checked_sgd(group) if "momentum" in group else _checked_adam(group))


def _hypergrad_lr(group: Group, scaled: bool) -> float:
    if group["hypergrad_lr"] is None:
        if scaled:
            return float(DEFAULTS["hypergrad_lr"])
        raise InputError(
            f"hypergrad_lr must be given with rule={group['rule']!r}, whose unit depends on the model, got None. "
            "Try powers of ten, or use rule='multiplicative'."
        )
    # A factor of 0 or below would end the training for good: a multiple of zero stays zero.
    return _number(group, "hypergrad_lr", "0.02", high=1.0 if scaled else math.inf)


def _checked_sgd(group: Group) -> Group:
    momentum = _number(group, "momentum", "0.9", high=1.0)
    if group["nesterov"] and not momentum:
        raise InputError("momentum must be > 0 with nesterov=True, got 0.0. For example momentum=0.9.")
    return {"momentum": momentum}


def _checked_adam(group: Group) -> Group:
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise InputError(
            f"betas must be two numbers in [0, 1), got {betas!r}. For example betas=(0.9, 0.999)."
        )
    named = {f"betas[{i}]": beta for i, beta in enumerate(betas)}
    return {
        "betas": tuple(_number(named, name, "0.9", high=1.0) for name in named),
        "eps": _number(group, "eps", "1e-8"),
    }


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
        number = float(value)
        above = number >= low if low_counts else number > low
        if above and number < high:
            return number
    least = "" if low == -math.inf else f" >= {low:g}" if low_counts else f" > {low:g}"
    most = "" if high == math.inf else f" and < {high:g}"
    raise InputError(f"{name} must be a finite number{least}{most}, got {value!r}. For example {example}.")
