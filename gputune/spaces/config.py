"""Check a configuration (one trial's hyperparameter values): its keys, and the type and range of
each value."""

import math
from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np

from gputune.ground.errors import InputError, Verbatim, option
from gputune.ground.text import nearest
from gputune.ground.types import (
    ACTIVATIONS,
    DECAY_FACTOR,
    LR_FACTOR,
    NUMBERS,
    ONLINE,
    ONLINE_RULES,
    OPTIMIZERS,
    PER_LAYER,
    SCHEDULES,
    Config,
)
from gputune.optimizers.classes import CLASSES, OPTIMIZER_PREFIX, has_weight_decay, optimizer_word
from gputune.spaces.layers import check_layers


class Range(NamedTuple):
    """The range of valid values of a numeric hyperparameter, with a text for error messages."""

    rule: str
    example: str
    low: float
    high: float = math.inf
    ends: str = "[)"  # as in mathematics: "[" and "]" include an end, "(" and ")" exclude it
    integer: bool = False

    def includes(self, value: float) -> bool:
        """Return True if a numeric value lies in this range."""
        inside = self.low < value < self.high
        return (
            inside
            or ("[" in self.ends and value == self.low)
            or ("]" in self.ends and value == self.high)
        )


RANGES: Mapping[str, Range] = {
    "lr": Range("a finite number > 0", "0.001", 0, ends="()"),
    "hypergrad_lr": Range("a number in [0, 1)", "0.02", 0, 1),
    "batch_size": Range("an integer >= 1", "32", 1, integer=True),
    "width": Range("an integer >= 1", "128", 1, integer=True),
    "depth": Range("an integer >= 1", "2", 1, integer=True),
    "dropout": Range("a number in [0, 1)", "0.1", 0, 1),
    "weight_decay": Range("a finite number >= 0", "0.01", 0),
    "momentum": Range("a number in [0, 1)", "0.9", 0, 1),
    "beta2": Range("a number in [0, 1)", "0.95", 0, 1),
    "clip_norm": Range("a number > 0, inf for no clipping", "1.0", 0, ends="(]"),
    "ema": Range("a number in [0, 1), 0 for no average", "0.999", 0, 1),
    "C": Range("a number > 0, inf for no penalty", "1.0", 0, ends="(]"),
    "l1_ratio": Range("a number in [0, 1], 0 for l2 and 1 for l1", "0.5", 0, 1, "[]"),
    "rank": Range("an integer >= 1, the rank of a LoRA", "8", 1, integer=True),
    "alpha": Range("a finite number > 0", "16", 0, ends="()"),
    "init_seed": Range("an integer >= 0, the seed of the initial weights", "1", 0, integer=True),
}

WORDS: Mapping[str, tuple[str, ...]] = {
    "activation": ACTIVATIONS,
    "optimizer": OPTIMIZERS,
    **dict.fromkeys(("schedule", "weight_decay_schedule", "dropout_schedule"), SCHEDULES),
    "hypergrad_rule": ONLINE_RULES,
    "penalty": ("l2", "l1", "none"),
    "numbers": NUMBERS,
}

FLAGS = ("rslora",)
"""The keys whose values are True or False."""

KEYS = (*RANGES, *WORDS, *FLAGS)
"""The keys of a configuration for all kinds of models, except ``module__*``."""

OPTIMIZERS_WITH: Mapping[str, tuple[str, ...]] = {
    "weight_decay": (*OPTIMIZERS, *(name for name in CLASSES if has_weight_decay(name))),
    "momentum": ("sgd", "nesterov", "rmsprop", "muon", "sgdhd", "nesterovhd"),
    "beta2": ("adam", "adamw", "muon", "schedulefree"),
    "hypergrad_lr": ONLINE,
    "hypergrad_rule": ONLINE,
}
"""For each key, the optimizers that use its value. Other optimizers ignore the key."""

MODULE_PREFIX = "module__"
PREFIXES = (MODULE_PREFIX, "loss__", OPTIMIZER_PREFIX, LR_FACTOR, DECAY_FACTOR)
"""The prefixes of configuration keys that end in a name of the user's choice.

The prefixes are for the arguments of a module, of its loss and of a class of torch.optim, and for
factors on the learning rate or weight decay of some parameters of a module.
"""

ConfigCheck = Callable[..., Config]
"""The function that checks a configuration: ``check_config``, or ``plain_config`` for a custom
training loop."""

# Examples of one value for each hidden layer.
_LAYERS = {"width": "(100, 50)", "activation": "('relu', 'tanh')", "dropout": "(0.1, 0.3)"}

_FACTOR = Range("a finite number >= 0", "0.1", 0)

INTEGER_REMEDY = "Use a list, scipy.stats.randint(low, high + 1) or gputune.log_int(low, high)."

# Names of our keys in scikit-learn, skorch, PEFT and papers, which a spell checker would not match.
_OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("learning_rate", "learning_rate_init"), "lr"),
    **dict.fromkeys(("hidden_layer_sizes", "hidden_size", "units"), "width"),
    **dict.fromkeys(("n_layers", "num_layers"), "depth"),
    "alpha": "weight_decay",
    "solver": "optimizer",
    # PEFT
    **dict.fromkeys(("r", "lora_r"), "rank"),
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
}


def legal_keys(model: Literal["mlp", "logistic", "module"], optimizer: str) -> tuple[str, ...]:
    """Return the keys (hyperparameter names) that a search space for a kind of model may have.

    A module may also have ``module__*`` keys. ``optimizer="exact"`` is the logistic regression that
    a solver fits to convergence, without training steps. Its space has only the key ``numbers``
    (scaling of numeric columns) and the keys of its penalty.
    """
    if model == "logistic" and optimizer == "exact":
        return ("C", "l1_ratio", "penalty", "numbers")
    trained = (
        "lr batch_size weight_decay weight_decay_schedule momentum beta2 optimizer schedule "
        "clip_norm ema numbers"
    )
    online = "hypergrad_lr hypergrad_rule" if optimizer in ONLINE else ""
    shaping = {
        "mlp": "width depth activation dropout",
        "module": "dropout dropout_schedule init_seed",
    }.get(model, "")
    return tuple(f"{trained} {online} {shaping}".split())


def key_of(word: str) -> str | None:
    """Return the key (hyperparameter name) for a name in gputune or in another library.

    Returns None if the name is unknown. For example, "learning_rate" is the key "lr".
    """
    key = _OTHER_NAMES.get(word, word)
    return key if key in KEYS or key.startswith(PREFIXES) else None


def check_key(key: object, *, keys: Collection[str], module: bool, name: str) -> None:
    """Raise InputError, with the most similar legal key, unless ``key`` is one of ``keys``.

    If ``module`` is True, keys with a prefix such as ``module__*`` are legal too. ``name`` is the
    name of the dict in the error.
    """
    with_prefix = isinstance(key, str) and any(
        key.startswith(p) and len(key) > len(p) for p in PREFIXES
    )
    if key in keys or (with_prefix and module):
        return
    if with_prefix:
        raise InputError(
            name,
            f"has the key {key!r}, but {'*, '.join(PREFIXES)}* keys need an nn.Module class as "
            "the model",
            remedy="Leave it out.",
        )
    legal = sorted(keys) + [f"{prefix}*" for prefix in PREFIXES if module]
    raise InputError(
        name,
        f"must have only the keys {', '.join(legal)}",
        got=key,
        remedy=_key_remedy(str(key), keys, module),
    )


_EPOCHS = ("max_epochs", "epochs", "n_epochs", "num_epochs", "num_train_epochs")


def _key_remedy(key: str, keys: Collection[str], module: bool) -> str:
    """Return advice for the user, for the error about a key that is not legal."""
    if key in ("hypergrad_lr", "hypergrad_rule"):
        example = option("optimizer", "adamwhd")
        return f"Only the optimizers {', '.join(ONLINE)} have it, for example {example}."
    if key in _EPOCHS:
        return f"All trials train for the same number of epochs. Pass {option('max_epochs', 20)}."
    argument = f"Write an argument of the module as '{MODULE_PREFIX}{key}'." if module else ""
    if near := nearest(key, sorted(keys), others=_OTHER_NAMES):
        return f"Did you mean {near!r}? {argument}".rstrip()
    if module:
        return argument
    if "lr" not in keys and key in legal_keys("logistic", "adamw"):
        trained = option("optimizer", "adamw")
        return (
            f"The solved logistic regression has no {key}. Pass {trained} to train it by gradient "
            "descent."
        )
    if "C" not in keys and key in legal_keys("logistic", "exact"):
        solved = option("optimizer", "exact")
        return f"Only the logistic regression solved with {solved} has {key}."
    return "Leave it out."


def check_config(config: Mapping[str, object], *, name: str = "config") -> Config:
    """Check a configuration, and return it with plain Python values and sorted keys.

    The function translates ``penalty``: 'l2' becomes l1_ratio = 0, 'l1' becomes l1_ratio = 1, and
    None or 'none' becomes C = inf. ``name`` is the name of the configuration in an error. Raises
    InputError for a wrong key or a value out of range.
    """
    for key in config:
        check_key(key, keys=KEYS, module=True, name=name)
    check_penalty(config, name)
    checked = {key: check_value(key, value, f"{name}[{key!r}]") for key, value in config.items()}
    rule = checked.get("hypergrad_rule", "multiplicative")
    if rule != "multiplicative" and "hypergrad_lr" not in checked:
        raise InputError(
            name,
            f"must have a value for 'hypergrad_lr', because it has hypergrad_rule={rule!r}",
            remedy="The unit of 'hypergrad_lr' depends on the model. Try powers of ten, or use "
            "the rule 'multiplicative'.",
        )
    check_layers(checked, name)
    if (penalty := checked.pop("penalty", None)) is not None:
        checked["l1_ratio"] = 1.0 if penalty == "l1" else 0.0
    if penalty == "none":
        checked["C"] = math.inf
    return dict(sorted(checked.items()))


def plain_config(config: Mapping[str, object], *, name: str = "") -> Config:
    """Return a configuration of a custom training loop with plain Python values and sorted keys.

    The function has the signature of ``check_config`` but checks nothing.
    """
    return {key: _plain(config[key]) for key in sorted(config)}


def _plain(value: object) -> object:
    """Convert a NumPy scalar to a Python scalar, and return any other value unchanged."""
    is_scalar = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return value.item() if is_scalar else value  # type: ignore[attr-defined]


def check_penalty(keys: Collection[str], name: str) -> None:
    """Raise InputError if a space has both ``penalty`` and ``l1_ratio``. Both set the penalty, and
    ``penalty`` is the older name."""
    if "penalty" in keys and "l1_ratio" in keys:
        raise InputError(
            name,
            "must have only one of 'penalty' and 'l1_ratio', which have the same meaning",
            got=Verbatim("both"),
            remedy="Use only 'l1_ratio': 0 is l2, 1 is l1, and a value between is elastic net.",
        )


def check_value(key: str, value: object, name: str) -> Any:
    """Check the value of the hyperparameter ``key``, and return it as a plain Python value.

    Raises InputError if the value is out of range.
    """
    value = _plain(value)
    if key in PER_LAYER and isinstance(value, list | tuple):  # a value for each hidden layer
        if not value:
            raise InputError(
                name,
                "must have a value for each hidden layer",
                got=value,
                remedy=f"For example {_LAYERS[key]}.",
            )
        layer = f"each layer of {option(name)}"
        return tuple(_check_single_value(key, _plain(part), layer) for part in value)
    return _check_single_value(key, value, name)


def _check_single_value(key: str, value: object, name: str) -> Any:
    """Check a value that is no tuple with one value for each hidden layer. Raises InputError."""
    if key in RANGES or key.startswith((LR_FACTOR, DECAY_FACTOR)):
        return _check_number(RANGES.get(key, _FACTOR), value, name)
    if key == "optimizer":
        return optimizer_word(value, name)
    if key in FLAGS and not isinstance(value, bool):
        raise InputError(name, "must be True or False", got=value, remedy="For example False.")
    if key not in WORDS:
        return value  # module__* and similar keys accept any value
    words = WORDS[key]
    if key == "penalty" and value is None:
        return "none"
    if isinstance(value, str) and value in words:
        return value
    if isinstance(value, str) and (near := nearest(value, words)):
        remedy = f"Did you mean {near!r}?"
    elif key == "penalty":
        remedy = "For elastic net, leave 'penalty' out and set 'l1_ratio' between 0 and 1."
    else:
        remedy = f"For example {words[0]!r}."
    raise InputError(name, f"must be one of {', '.join(words)}", got=value, remedy=remedy)


def _check_number(rule: Range, value: object, name: str) -> float | int:
    """Check a numeric value, and return it as an int or a float. Raises InputError if the value is
    out of range."""
    if type(value) is float and not rule.integer and rule.includes(value):
        return value  # at once, because the other tests take ten times as long
    number = math.nan  # in no range
    remedy = f"For example {rule.example}."
    got = value
    if isinstance(value, str):
        got = Verbatim(f"the text {value!r}")
    elif isinstance(value, bool) or not isinstance(value, Real):
        remedy = (
            f"Use a number, for example {rule.example}, a list, or a frozen scipy.stats "
            "distribution."
        )
    else:
        try:
            number = float(value)
        except OverflowError:  # an int of more than 308 digits
            number = math.inf
        if rule.integer and math.isfinite(number) and not number.is_integer():
            number = math.nan
            remedy = INTEGER_REMEDY
    if not rule.includes(number):
        raise InputError(name, f"must be {rule.rule}", got=got, remedy=remedy)
    if not rule.integer:
        return number
    # a float would lose digits of a large int
    return value if isinstance(value, int) else int(number)
