"""Converts the options of a command line into the arguments of ``gputune.tune``."""

import math
import re
from argparse import Namespace
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from scipy import stats

from gputune.data.folds import parse_cv
from gputune.executors.cluster import Cluster, named_cluster
from gputune.ground.entry_points import import_extra, integrations
from gputune.ground.errors import InputError, Verbatim
from gputune.ground.types import PER_LAYER, Config
from gputune.methods.halving import Halving
from gputune.methods.optuna import OptunaSampler
from gputune.spaces.config import RANGES, WORDS
from gputune.spaces.distributions import log_int
from gputune.tuning.method import Method, method_class, method_classes
from gputune.tuning.options import RULES, Options, make_options


def options_of(arguments: Namespace, study_file: Path) -> Options:
    """Return the arguments of ``gputune.tune`` for the command line of ``tune`` or ``train``.

    Raises InputError for a value that is not valid.
    """
    typed = typed_options(arguments)
    if "space" in typed:
        texts = typed["space"]
        named = len(texts) == 1 and "=" not in texts[0]
        typed["space"] = texts[0] if named else parse_specs(texts) or None
    if "cv" in typed:
        typed["cv"] = parse_cv(typed["cv"])
    if "include" in typed:
        typed["include"] = [_config(texts, "--include") for texts in typed["include"]]
    if "kinds" in typed:
        typed["kinds"] = _pairs(typed["kinds"], "--kind", "zip=category")
    if typed.get("class_weight", "balanced") != "balanced":
        typed["class_weight"] = _weights(typed["class_weight"])
    if arguments.command == "train":
        # ``train`` is a search with one included trial.
        typed |= {
            "n_trials": 0,
            "include_default": False,
            "include": [_config(arguments.config or (), "--set")],
        }
    else:
        typed["method"] = _method(arguments)
        if typed["method"].differentiates:
            typed.setdefault("n_trials", 8)  # each is a starting point
    return make_options(**{**typed, "study": study_file})


def loop_options_of(arguments: Namespace, study_file: Path) -> Options:
    """Return the arguments of ``gputune.search`` for the command line of ``search``.

    Raises InputError for a value that is not valid.
    """
    typed = typed_options(arguments)
    # The objective decides how often it reports. ``search_loop`` receives the typed value.
    typed.pop("max_epochs", None)
    typed["space"] = parse_specs(arguments.space, own_keys=True)
    if "include" in typed:
        typed["include"] = [_config(texts, "--include") for texts in typed["include"]]
    typed["method"] = _method(arguments)
    return make_options(**{**typed, "study": study_file})


def typed_options(arguments: Namespace) -> Config:
    """Return the search options that the user wrote on the command line, by name.

    Raises InputError if both processes and a cluster were given.
    """
    typed = {}
    for name in RULES.keys() - {"study"}:
        value = getattr(arguments, name, None)
        if value is not None:
            typed[name] = value
    for name in integrations("clusters"):
        address = getattr(arguments, name, None)
        if address is None:
            continue
        chosen = typed.get("workers", "auto")
        if chosen != "auto":
            other = f"--{chosen.name}" if isinstance(chosen, Cluster) else f"--workers {chosen}"
            rule = f"{other} and --{name} exclude each other"
            raise InputError(None, rule, remedy="Leave one out.")
        typed["workers"] = named_cluster(name, address=address)
    return typed


def _config(texts: Sequence[str], flag: str) -> Config:
    """Return one configuration (hyperparameter -> value) from several KEY=VALUE texts.

    Raises InputError for lists and ranges.
    """
    config = parse_specs(texts, flag)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == 1:  # a tuple
            config[key] = value = value[0]
        if isinstance(value, list) or hasattr(value, "rvs"):
            spec = next(text for text in texts if text.partition("=")[0].strip() == key)
            remedy = "Lists and ranges are for gputune tune --space."
            raise InputError(flag, "takes one value for each key", got=spec, remedy=remedy)
    return config


def _pairs(texts: Sequence[str], flag: str, example: str) -> dict[str, str]:
    """Return the (key, value) pairs of several KEY=VALUE texts.

    Raises InputError with an example if a text has another form.
    """
    pairs = {}
    for text in texts:
        # A name may contain "=", so the last one separates.
        key, equals, value = text.rpartition("=")
        if not key or not equals or not value:
            raise InputError(flag, f"must be written like {flag} {example}", got=text)
        pairs[key] = value
    return pairs


def _weights(text: str) -> dict[str, float]:
    """Return the weight of each class from the text of ``--class-weight``."""
    example = "left=5,stayed=1"
    pairs = _pairs(text.split(","), "--class-weight", f"{example}, or balanced")
    try:
        return {label: float(weight) for label, weight in pairs.items()}
    except ValueError:
        rule = f"must have a number for each class, for example {example}"
        raise InputError("--class-weight", rule, got=text) from None


def _method(arguments: Namespace) -> Method:
    """Return the search method that the user chose on the command line.

    Raises InputError for options that belong to another method.
    """
    name = arguments.method or "random"
    chosen = method_class(name)
    legal = chosen.flags
    options = {}
    for other, kind in method_classes().items():
        for key, rule in kind.flags.items():
            value = getattr(arguments, key, None)  # ``search`` lacks some of the options
            if value is None:
                continue
            if key not in legal:
                remedy = "Leave the option out, or choose that method."
                if (name, other) == ("tpe", "halving"):
                    remedy = "For halving with TPE, write --method halving --sampler tpe."
                raise InputError(
                    rule.name,
                    f"belongs to --method {other}",
                    got=Verbatim(f"--method {name}"),
                    remedy=remedy,
                )
            options[key] = value
    if getattr(arguments, "sampler", None) is None:
        return chosen(**options)
    sampler_flag = f"--sampler {arguments.sampler}"
    if name not in ("random", "halving"):
        raise InputError(
            sampler_flag,
            "needs --method random or halving",
            got=Verbatim(f"--method {name}"),
            remedy="Leave one out.",
        )
    samplers = import_extra("optuna.samplers", extra="optuna", used_by=sampler_flag)
    if name == "halving":
        return OptunaSampler("tpe", halving=Halving(**options))
    # Without constant_liar the proposals of one batch would be similar.
    sampler = samplers.TPESampler(seed=arguments.random_state or 0, constant_liar=True)
    return OptunaSampler(sampler)


OWN_KEY = "module__"
"""A key without rules of its own, like the keys of a user's objective."""

_EXAMPLES = (
    "Examples: width=32,64,128 (a list), width=16..256 (all integers between), width=16..256:log, "
    "lr=1e-4..1e-1:log, dropout=0..0.5, activation=relu,tanh."
)


def parse_specs(
    texts: Iterable[str], flag: str = "--space", *, own_keys: bool = False
) -> dict[str, object]:
    """Return the space of several ``KEY=SPEC`` texts, for ``check_space``.

    With ``own_keys=True``, the keys belong to the user's objective, so "depth" may be any text or
    number. Raises InputError for a key that is given twice.
    """
    space: dict[str, object] = {}
    for text in texts:
        key, value = parse_spec(text, own_keys=own_keys)
        if key in space:
            join = f"Join them: {key}=A,B." if flag == "--space" else "Leave one out."
            got = Verbatim(f"{key!r} twice")
            raise InputError(flag, "must name each key once", got=got, remedy=join)
        space[key] = value
    return space


_OTHER_RANGE = re.compile(
    r"(log_?uniform|uniform|randint|log_int|choice|linspace|logspace|range)\(.*\)"
    r"|(?=.*(?:[.e]|:log))[-+.\de]+:[-+.\de]+(:log)?"  # 16:9 may be a text
)
"""A range as Python or another program would write it, such as loguniform(1e-4, 1) or 1e-4:1."""


def parse_spec(text: str, *, own_keys: bool = False) -> tuple[str, object]:
    """Return the key and the values of one ``KEY=SPEC`` text, for ``check_space``.

    - ``a,b,c`` is a list.
    - ``a..b`` is a uniform range. For an integer key it holds all integers, including both ends.
    - ``a..b:log`` is a log-uniform range.
    - ``(a,b)`` is one value, a tuple. It works for ``module__*`` and for ``width``.
    - Anything else is one fixed value.

    With ``own_keys=True``, every key is read like a ``module__*`` key. A ``module__*`` value is read
    as a number or as true or false, otherwise as text. Its range has integers if both ends are
    written as integers. Raises InputError.
    """
    key, equals, spec = (part.strip() for part in text.partition("="))
    if not equals or not key or not spec:
        rule = "A hyperparameter must be written KEY=SPEC"
        raise InputError(None, rule, got=text, remedy=_EXAMPLES)
    ends = re.fullmatch(r"([^,]*?)\.\.([^:,]*)(:.*)?", spec)
    kind = OWN_KEY if own_keys else key
    if ends and (kind in RANGES or None not in (_number(ends[1]), _number(ends[2]))):
        return key, _parse_range(kind, ends[1], ends[2], (ends[3] or "").strip(), text)
    if _OTHER_RANGE.fullmatch(spec):
        rule = "A range must be written LOW..HIGH, with ':log' for a log scale"
        raise InputError(None, rule, got=text, remedy=_EXAMPLES)
    values = [_parse_value(kind, part.strip(), text) for part in re.split(r",(?![^()]*\))", spec)]
    return key, values if len(values) > 1 or isinstance(values[0], tuple) else values[0]


def _parse_range(key: str, low_text: str, high_text: str, scale: str, text: str) -> object:
    """Return the distribution for a range LOW..HIGH. An ending ":log" makes it log-uniform."""
    low = _number(low_text)
    high = _number(high_text)
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        rule = "A range must be LOW..HIGH with two finite numbers"
        raise InputError(None, rule, got=text, remedy=_EXAMPLES)
    if scale not in ("", ":log"):
        rule = f"A range may end in ':log', but not in {scale!r}"
        raise InputError(None, rule, got=text, remedy=_EXAMPLES)
    if low >= high:
        remedy = f"Swap the ends, or write {key}={low_text.strip()} for one value."
        raise InputError(None, "A range must have LOW < HIGH", got=text, remedy=remedy)
    if scale and low <= 0:
        example = f"{high / 1000:g}..{high:g}" if high > 0 else "1e-4..1e-1"
        remedy = f"For example {key}={example}:log."
        raise InputError(None, "A log range must have LOW > 0", got=text, remedy=remedy)
    written_as_integers = isinstance(low, int) and isinstance(high, int)
    if RANGES[key].integer if key in RANGES else written_as_integers:
        if low != int(low) or high != int(high):
            rule = f"A range of {key} must have integer ends"
            raise InputError(None, rule, got=text, remedy=_EXAMPLES)
        low = int(low)
        high = int(high)
        # randint excludes its upper end.
        return log_int(low, high) if scale else stats.randint(low, high + 1)
    return stats.loguniform(low, high) if scale else stats.uniform(low, high - low)


def _parse_value(key: str, text: str, spec: str) -> str | float | bool | tuple[object, ...]:
    """Convert a text to one value of a search space: a string, a number, a boolean or a tuple."""
    if not text:
        raise InputError(None, "A list must have no empty value", got=spec, remedy=_EXAMPLES)
    accepts_tuples = key not in (*RANGES, *WORDS) or key in PER_LAYER
    if accepts_tuples and text[0] == "(" and text[-1] == ")":
        return tuple(_parse_value(key, part.strip(), spec) for part in text[1:-1].split(","))
    if key in WORDS:
        return text
    number = _number(text)
    if number is not None:
        return number
    if key in RANGES:
        got = Verbatim(f"the text {text!r} in {spec!r}")
        raise InputError(key, f"must be {RANGES[key].rule}", got=got, remedy=_EXAMPLES)
    return {"true": True, "false": False}.get(text.lower(), text)


def _number(text: str) -> int | float | None:
    """Return the int or float that a text spells, or None if the text is not a number."""
    for read in (int, float):
        with suppress(ValueError):
            return read(text)
    return None
